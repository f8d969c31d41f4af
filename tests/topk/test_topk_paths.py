"""The paths of the CUDA kernels of topk, each at the sizes and in the data where it could go wrong.

The paths are those of csrc/topk/cuda/plan.h; every backend must agree on all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import generator, wide
from cases.oracle import reference

PART = 8192  # columns of a part of a list that several blocks share
ROOM = 8192  # keys that a block holds


def run(backend: Backend, scores: Tensor, k: int, **options: Any) -> None:
    for order in ("score", "position"):
        inputs = {"scores": scores, "k": k, "order": order, **options}
        name = "topk" if backend.name == "simt" else "topk_with_counts"
        actual = backend.run(name, **inputs)
        assert_bitwise_equal(actual, reference.topk_with_counts(**inputs), order)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(3))


@pytest.mark.parametrize("k", [4097, 9000])
@pytest.mark.parametrize("columns", [5000, 8192, 12289, 40000])
def test_lists_sorted_whole(kernels: Backend, columns: int, k: int) -> None:
    scores = randn(2, columns)
    run(kernels, scores, k)
    run(kernels, scores.round(), k, lengths=torch.tensor([columns, columns // 3]).int())
    run(kernels, scores.softmax(-1), k, top_p=0.9)


def test_a_part_that_hands_on_too_much(kernels: Backend) -> None:
    """All that is chosen lies in one part, which has no room for it."""
    scores = randn(2, 2 * PART)
    scores[0, :PART] += 100
    scores[1, PART:] += 100
    run(kernels, scores, 4000)


@pytest.mark.parametrize("rows", [2, 130])
def test_ties_begin_where_the_choice_ends(kernels: Backend, rows: int) -> None:
    """More ties than a block holds, of which none, one, or many are chosen."""
    scores = torch.zeros(rows, 2 * PART + 5)
    best = torch.randperm(scores.shape[1], generator=generator(4))[:2000]
    scores[:, best] = 1 + torch.rand(2000, generator=generator(5))
    for k in (2000, 3900):
        run(kernels, scores, k)


@pytest.mark.parametrize("rows", [2, 130])
def test_a_sample_that_misleads(kernels: Backend, rows: int) -> None:
    """The best entries lie between the samples, so that the guess takes in far too much."""
    scores = randn(rows, 2 * PART)
    scores[:, 8:16384:32] += 50
    scores[:, 0:16384:32] -= 50
    for k in (500, 600, 2048):
        run(kernels, scores, k)


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(2, torch.float32), (2, torch.bfloat16), (130, torch.float32), *wide((130, torch.bfloat16))],
)
def test_forced_entries_of_any_alignment(kernels: Backend, rows: int, dtype: torch.dtype) -> None:
    """Forced entries that no score would choose begin and end within 16 bytes."""
    scores = randn(rows, 2 * PART + 3).to(dtype)
    columns = scores.shape[1]
    for ends in (1, 6):
        scores[:, :ends] = scores[:, columns - ends :] = -100
        run(kernels, scores, 300, num_sinks=ends, num_locals=ends)
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    keep[:, 77::991] = True
    run(kernels, scores, 20, must_keep=keep)
    run(kernels, scores, 300, must_keep=keep, threshold=1.0)


def test_more_forced_entries_than_room(kernels: Backend) -> None:
    scores = randn(2, 2 * PART)
    run(kernels, scores, 3000, num_locals=ROOM + 100)
    run(kernels, scores, 4096, must_keep=scores.abs() < 2)


def drifting(rows: int, columns: int, kind: str) -> Tensor:
    """Rows that resemble those before them, until they do not."""
    scores = randn(rows, columns)
    row = torch.arange(rows)[:, None]
    if kind == "slowly":
        scores += row * 0.01
    elif kind == "in jumps":
        scores += (row % 7 == 6) * 100.0 - (row % 11 == 5) * 1e30
    elif kind == "in scale":
        scores *= 2.0 ** (row % 40 - 20)
    elif kind == "ties":
        scores = (scores * 8).round() / 8
    elif kind == "few values":
        scores = scores.round()
    elif kind == "signed zeros":
        scores = torch.where(scores.abs() < 1, scores * 0.0, scores)
    elif kind == "special":
        scores[::3, ::5], scores[1::3, ::4], scores[::4, 1::9] = torch.nan, -torch.inf, torch.inf
    return scores


KINDS = (
    "not at all", "slowly", "in jumps", "in scale", "ties", "few values", "signed zeros", "special",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        *((kind, columns) for columns in (5, 16, 31, 289) for kind in KINDS),
        ("in jumps", 2048),
        ("special", 2048),
        *wide(*((kind, 2048) for kind in KINDS if kind not in ("in jumps", "special"))),
    ],
)
def test_rows_that_drift(kernels: Backend, kind: str, columns: int) -> None:
    """Each row is tried near the threshold of the one before, on processors; devices try none."""
    rows = 24 if kernels.name == "simt" else 90
    scores = drifting(rows, columns, kind)
    for k in {1, columns // 5, columns - 1}:
        run(kernels, scores, k)
    run(kernels, scores.to(torch.bfloat16), columns // 4)
    lengths = torch.randint(0, columns + 1, (rows,), generator=generator(8)).int()
    row_k = torch.randint(0, columns // 3 + 1, (rows,), generator=generator(9)).int()
    keep = torch.rand(rows, columns, generator=generator(10)) < 0.05
    run(kernels, scores, columns // 3, lengths=lengths, row_k=row_k)
    run(kernels, scores, columns // 3, must_keep=keep, threshold=0.3)
    run(kernels, scores, columns // 3, num_sinks=2, num_locals=3, lengths=lengths)


def test_a_sample_between_two_entries_picks_the_first(backend: Backend) -> None:
    """The curve of five equal scores is 0, 1/4, .. 1; the samples are 1/4, 5/8 and 1."""
    indices, counts = backend.run("inverse_transform_sample", torch.ones(1, 5), 3, None)
    assert indices.tolist() == [[1, 2, 4]] and counts.tolist() == [3]


def test_sample_of_rows_sorted_in_chunks(kernels: Backend) -> None:
    scores = randn(2, 9000).abs()
    scores[1] = scores[1].round()
    args = (scores, 700, torch.rand(2, 9000, generator=generator(6)) < 0.8)
    expected = reference.inverse_transform_sample(*args)
    assert_bitwise_equal(kernels.run("inverse_transform_sample", *args), expected)
