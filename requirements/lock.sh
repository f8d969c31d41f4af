#!/usr/bin/env bash
# Makes the lock files: every package of an environment, direct and indirect, for all Pythons.
# Each file holds the one before it. Called by `make lock`, with uv as the argument.
set -euo pipefail
cd "$(dirname "$0")/.."
before=/dev/null
for name in build demo test bench; do
    sources=("requirements/$name.in")
    [ "$name" = build ] || sources+=(pyproject.toml --extra demo)
    case $name in test | bench) sources+=(--extra test) ;; esac
    # Only what its ranges leave open changes in a file that is there; without it, all is the newest.
    "$@" --config-file requirements/uv.toml pip compile --quiet --universal --python-version 3.10 \
        --no-annotate --custom-compile-command "make lock" --constraint "$before" \
        "${sources[@]}" --output-file "requirements/$name.txt"
    before="requirements/$name.txt"
done
