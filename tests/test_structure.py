"""The house: which room of csrc may include which, and what every op must come with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tokred
from cases.op_calls import CALLS, op_names

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FAMILIES = (
    "topk",
    "score",
    "match",
    "cluster",
    "merge",
    "sparse_attn",
    "kv_pack",
    "packed_attn",
    "linear_attn",
)
# Rooms that may be included; the front ends' vocabulary in csrc itself is for everyone.
ALLOWED = {family: {family, "attention", "common"} for family in FAMILIES} | {
    "common": {"common"},
    "attention": {"attention", "common"},
    "ceilings": {"ceilings", "common"},
    "bind": {"bind", "attention", "common", *FAMILIES},
}
ALLOWED["packed_attn"].add("kv_pack")  # attention on packed keys reads the bytes that are packed


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE)


def forbidden(path: str, text: str) -> Iterator[str]:
    """The includes of a file, named from csrc/, that its room may not have."""
    room, _, inside = path.partition("/")
    if not inside:
        return
    for included in includes(text):
        target, _, below = included.partition("/")
        if included == "ops.def" and room != "bind":
            yield f"{path} includes {included}, which is for bind/"
        if below and target not in ALLOWED[room]:
            yield f"{path} includes {included}: {room}/ may include {sorted(ALLOWED[room])}"
        if below and "/cpu/" in path and "/cuda/" in included:
            yield f"{path} includes {included}: CPU kernels know no CUDA"


def sources() -> dict[str, str]:
    kinds = (".h", ".cpp", ".cu", ".cuh", ".inc", ".def")
    paths = [path for path in CSRC.rglob("*") if path.suffix in kinds]
    return {path.relative_to(CSRC).as_posix(): path.read_text() for path in paths}


def test_rooms_include_what_they_may() -> None:
    files = sources()
    assert {path.split("/")[0] for path in files if "/" in path} == set(ALLOWED)
    found = [line for path, text in files.items() for line in forbidden(path, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "included"),
    [
        ("merge/cpu/merge.cpp", "match/params.h"),
        ("common/cpu/row.h", "attention/params.h"),
        ("attention/cuda/tile.cuh", "sparse_attn/params.h"),
        ("kv_pack/cpu/kv_pack.cpp", "packed_attn/params.h"),
        ("topk/topk.h", "bind/register.h"),
        ("topk/topk.h", "ops.def"),
        ("score/cpu/qk_score.cpp", "score/cuda/plan.h"),
    ],
)
def test_a_planted_include_is_found(path: str, included: str) -> None:
    assert any(forbidden(path, f'#include "{included}"\n{sources()["tensor.h"]}'))


def test_includes_exist_and_are_written_from_csrc() -> None:
    simt = {"simt.h", "simt_ptx.h", "simt_ptx_sm90.h"}  # of the emulated device
    missing = [
        f"{path} includes {included}"
        for path, text in sources().items()
        for included in includes(text)
        if included not in simt and not (CSRC / included).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_private_headers_are_used() -> None:
    files = sources()
    included = {name for text in files.values() for name in includes(text)}
    unused = {path for path in files if path.endswith((".h", ".cuh", ".inc"))} - included
    assert not unused, unused


def listed_ops() -> set[str]:
    """The ops of csrc/ops.def."""
    text = (CSRC / "ops.def").read_text()
    return set(re.findall(r"^TOKRED_(?:FRONT|OP|OP_SCRATCH)\((\w+),", text, re.MULTILINE))


def base(op: str) -> str:
    """The public op behind one of its variants: its gradient, or one that writes to arguments."""
    return re.sub(r"(_mask)?_(backward|out|into)$", "", op)


def words(*patterns: str) -> set[str]:
    """Every identifier in files of the checkout."""
    texts = (path.read_text() for pattern in patterns for path in ROOT.glob(pattern))
    return {word for text in texts for word in re.findall(r"\w+", text)}


def fake_kernels() -> set[str]:
    registry = torch._library.simple_registry.singleton
    entries = {op: registry.find(f"tokred::{op}") for op in op_names()}
    return {op for op, entry in entries.items() if entry.fake_impl.kernel is not None}


def test_the_list_of_ops_is_complete() -> None:
    assert listed_ops() == set(op_names())


@pytest.mark.parametrize("op", op_names())
def test_an_op_comes_with_all_it_needs(op: str) -> None:
    public = base(op)
    missing = []
    if not hasattr(tokred.reference, public):
        missing.append(f"tokred.reference.{public}")
    if op not in fake_kernels():
        missing.append("a fake kernel")
    wrapper = getattr(tokred, public, None)
    if wrapper is None or not (wrapper.__doc__ or "").strip():
        missing.append(f"a wrapper tokred.{public} with a docstring")
    if op not in CALLS:
        missing.append("a call in tests/cases/calls/, which opcheck needs")
    if public not in words("tests/**/test_bad_*.py"):
        missing.append("a row of bad input")
    if public not in words("tests/fuzz/op_*.py"):
        missing.append("a case of the fuzzer")
    if public not in words("bench/bench_*.py"):
        missing.append("a row in bench/")
    for page in ("docs/ops.md", "README.md"):
        if f"`{public}`" not in (ROOT / page).read_text():
            missing.append(f"a line in {page}")
    assert not missing, f"{op} lacks {', '.join(missing)}"
