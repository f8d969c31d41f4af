"""Plants one bug after another in a copy of the kernels, and shows which test finds it.

`python tests/mutants.py` plants all of them, and `python tests/mutants.py lost wrong` those whose
names begin so. Exits with 1 if one is not found. The copy and its build lie in build/mutants; only
what a bug touches is built again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
SOURCES = ("CMakeLists.txt", "csrc", "tests/simt", "python/tokred/_version.py")
OPTIONS = ("TOKRED_SIMT=ON", "TOKRED_CUDA=OFF")
LIBRARIES = ("tokred", "tokred_simt")
HANGS_S = 1200  # so long a test run is a bug that was found, too


@dataclass(frozen=True)
class Mutant:
    """A bug: what replaces a text of a file of csrc that must occur there once."""

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]  # folders or files of the quick suite that should find it


MUTANTS = (
    Mutant(
        "dropped barrier",
        "topk/cuda/inverse_transform_sample.cuh",
        "sums[j] = sum += share(j, divisor);\n    __syncthreads();\n",
        "sums[j] = sum += share(j, divisor);\n",
        ("topk",),
    ),
    Mutant(
        "off-by-one tile edge",
        "topk/cuda/compact.cuh",
        "if (j + i < end) mask |=",
        "if (j + i <= end) mask |=",
        ("topk",),
    ),
    Mutant(
        "wrong tie rule",
        "match/cpu/match.cpp",
        "index[n] = select_greater(score, best[n], splat(columns.row[j]), index[n]);",
        "index[n] = select_greater(best[n], score, index[n], splat(columns.row[j]));",
        ("match",),
    ),
    Mutant(
        "stale scale",
        "kv_pack/cpu/kv_unpack.cpp",
        "d < f.head_dim; ++params, ++offset) {",
        "d < f.head_dim; ++offset) {",
        ("kv_pack",),
    ),
    Mutant(
        "missing mask",
        "match/cpu/match.cpp",
        "if (position < 0 || row_masked(p.b, item, position)) continue;",
        "if (position < 0) continue;",
        ("match",),
    ),
    Mutant(
        "int32 offset",
        "topk/cpu/gather_tokens.cpp",
        "source + token * item.stride_token,",
        "source + static_cast<int32_t>(token * item.stride_token),",
        ("ops/test_edges.py",),
    ),
    Mutant(
        "unordered reduction",
        "merge/cpu/merge.cpp",
        "slot.members[m];\n    const T* x = slot.x(token) + c;",
        "slot.members[slot.item % 2 ? slot.count - 1 - m : m];\n"
        "    const T* x = slot.x(token) + c;",
        ("merge",),
    ),
    Mutant(
        "wrong group",
        "score/cpu/qk_score.cpp",
        "kv_head * p.k.stride_head",
        "row % p.heads_kv * p.k.stride_head",
        ("score/test_qk_score.py",),
    ),
    Mutant(
        "missing -1 guard",
        "topk/cpu/gather_tokens.cpp",
        "if (token >= 0 && token < item.tokens) {",
        "if (token < item.tokens) {",
        ("topk",),
    ),
    Mutant(
        "swapped axis",
        "score/cpu/qk_score.cpp",
        "item * p.mask_stride_batch + key * p.mask_stride_token",
        "item * p.mask_stride_token + key * p.mask_stride_batch",
        ("score/test_qk_score.py",),
    ),
    Mutant(
        "lost tail",
        "merge/cpu/merge.cpp",
        "for (; c < p.channels; c += kLanes) {",
        "for (; c + kLanes <= p.channels; c += kLanes) {",
        ("merge",),
    ),
    Mutant(
        "rotation of another size",
        "kv_pack/cpu/kv_unpack.cpp",
        "rotate_row(number, f.head_dim);",
        "rotate_row(number, f.head_dim / 2);",
        ("kv_pack",),
    ),
)


def copy_sources() -> None:
    """Files that have not changed keep their times, so that they are not built again."""
    for name in SOURCES:
        source = ROOT / name
        files = [path for path in source.rglob("*") if path.is_file()] or [source]
        for path in files:
            target = COPY / path.relative_to(ROOT)
            if not target.exists() or target.read_bytes() != path.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    for path in (COPY / "csrc").rglob("*"):
        if path.is_file() and not (ROOT / path.relative_to(COPY)).exists():
            path.unlink()


def configure() -> None:
    """One instruction set stands for all: they share their sources."""
    from tokred import _C

    options = [
        *OPTIONS,
        f"TOKRED_ONLY_ISA={_C.best_cpu_isa()}",
        f"Python_EXECUTABLE={sys.executable}",
    ]
    if shutil.which("ccache"):
        options.append("CMAKE_CXX_COMPILER_LAUNCHER=ccache")
    command = ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", *(f"-D{o}" for o in options)]
    subprocess.run(command, cwd=COPY, check=True, stdout=subprocess.DEVNULL)


def build() -> None:
    command = ["cmake", "--build", "build", "--target", *LIBRARIES]
    done = subprocess.run(command, cwd=COPY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}")


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The copy with the bug, until the block is left."""
    path = COPY / "csrc" / mutant.file
    clean = path.read_text()
    path.write_text(clean.replace(mutant.text, mutant.replacement))
    try:
        yield
    finally:
        path.write_text(clean)


def occurrences(mutant: Mutant) -> int:
    """How often its text is in its file."""
    return (ROOT / "csrc" / mutant.file).read_text().count(mutant.text)


def check_texts() -> None:
    for mutant in MUTANTS:
        count = occurrences(mutant)
        if count != 1:
            raise SystemExit(
                f"{mutant.name}: its text must occur once in csrc/{mutant.file}, it occurs "
                f"{count} times: {mutant.text!r}"
            )


def finder(tests: tuple[str, ...]) -> str | None:
    """The first test that fails with the libraries of the copy; None if all pass."""
    environment = os.environ | {
        "TOKRED_LIBRARY_FOLDER": str(COPY / "build"),
        "TOKRED_SIMT_LIBRARY": str(COPY / "build" / "libtokred_simt.so"),
        "OMP_NUM_THREADS": "1",
    }
    options = ["-q", "-x", "-m", "not wide", "-r", "fE", "-p", "no:cacheprovider"]
    paths = [str(ROOT / "tests" / name) for name in tests]
    command = [sys.executable, "-m", "pytest", *options, *paths]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS_S
        )
    except subprocess.TimeoutExpired:
        return f"{' '.join(tests)}: hangs"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        crashed = re.search(r"in (test_\w+)$", done.stderr, re.MULTILINE)  # as faulthandler says
        name = crashed[1] if crashed else "the interpreter"
        return f"{' '.join(tests)}: {name} ends with signal {-done.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:  # pytest's own troubles find no bug
        raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return failed[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="how the names of those to plant begin (all)")
    names = tuple(parser.parse_args().names)
    chosen = [m for m in MUTANTS if not names or m.name.startswith(names)]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    check_texts()
    copy_sources()
    configure()
    build()
    for tests in dict.fromkeys(mutant.tests for mutant in chosen):
        if found := finder(tests):
            raise SystemExit(f"fails without a bug: {found}")
    missed = 0
    for mutant in chosen:
        with planted(mutant):
            build()
            found = finder(mutant.tests)
        missed += found is None
        print(f"{mutant.name} in {mutant.file}: {found or 'NOT FOUND'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
