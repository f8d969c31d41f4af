"""match with k > 1: the k best partners of every row, in order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from tokred import reference

METRICS = ("cosine", "dot", "l2", "half_cosine")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    rows: int = 37
    columns: int = 41
    k: int = 5
    metric: str = "cosine"
    channels: int = 16
    masks: bool = False
    weights: bool = False
    band: int = -1
    dtype: torch.dtype = torch.float32
    batch: int = 2

    def inputs(self, ties: bool) -> dict:
        """Inputs; with `ties`, rows of +-1 of norm 4, whose scores are exact."""
        rng = generator(self.rows + self.k)
        shapes = [(self.batch, n, self.channels) for n in (self.rows, self.columns)]
        if ties:
            a, b = (torch.randint(0, 2, shape, generator=rng) * 2.0 - 1 for shape in shapes)
        else:
            a, b = (torch.randn(shape, generator=rng) for shape in shapes)
        some = {"a": a.to(self.dtype), "b": b.to(self.dtype), "metric": self.metric}
        for name, count in (("a", self.rows), ("b", self.columns)):
            if self.masks:
                mask = torch.rand(self.batch, count, generator=rng) < 0.6
                some[f"mask_{name}"] = mask
            if self.weights:
                weight = torch.randint(1, 3, (self.batch, count), generator=rng) / 2
                some[f"weight_{name}"] = weight
        return {**some, "band": self.band, "k": self.k}


CASES = [
    Case(),
    *(Case(metric=metric, masks=masks) for metric in METRICS for masks in (False, True)),
    *(Case(metric=metric, weights=True, band=9) for metric in METRICS),
    *(Case(k=k) for k in (2, 3, 40, 41, 50)),
    *(Case(rows, columns) for rows, columns in ((1, 1), (3, 0), (0, 3), (150, 20), (20, 300))),
    Case(masks=True, band=3, weights=True, k=8),
    Case(batch=0),
    Case(130, 200, 7, "l2", 64),
]


def wide(inputs: dict) -> dict:
    """The tensors in float64, except masks."""
    floats = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.dtype != torch.bool}
    return {**inputs, **{name: t.double() for name, t in floats.items()}}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_exact_arithmetic_equals_the_reference(
    backend: Backend, case: Case, dtype: torch.dtype
) -> None:
    inputs = replace(case, dtype=dtype).inputs(ties=True)
    expected = reference.match(**wide(inputs))
    score, index = backend.run("match", **inputs)
    assert score.shape == index.shape == (case.batch, case.rows, case.k)
    assert torch.equal(index, expected[1]) and torch.equal(score.double(), expected[0])


@pytest.mark.parametrize("case", [case for case in CASES if case.rows > 1], ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    """Every place holds a partner as good as the one that belongs there, but for rounding."""
    inputs = case.inputs(ties=False)
    score, index = backend.run("match", **inputs)
    best, choice = reference.match(**wide(inputs))
    assert torch.equal(index < 0, choice < 0)
    there = choice >= 0
    bound = 1e-5 * (1 if "cosine" in case.metric else 4 * case.channels)
    assert (score.double() - best)[there].abs().le(bound).all()
    assert score[~there].eq(-torch.inf).all()
    everything = reference.match(**wide(inputs) | {"k": max(case.columns, 2)})
    known = torch.full((case.batch, case.rows, case.columns + 1), -torch.inf).double()
    places = everything[1].long() % (case.columns + 1)
    known.scatter_(2, places, everything[0])
    chosen = known.gather(2, index.long() % (case.columns + 1))
    assert (chosen - best)[there].abs().le(bound).all()
    distinct = torch.where(there, index, -1 - torch.arange(case.k)).sort().values.diff()
    assert distinct.ne(0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_first_is_the_best(kernels: Backend, metric: str) -> None:
    inputs = Case(metric=metric).inputs(ties=True)
    score, index = kernels.run("match", **inputs)
    one = kernels.run("match", **inputs | {"k": 1})
    assert_bitwise_equal((score[..., 0], index[..., 0]), one)


def test_nan_and_infinity(backend: Backend) -> None:
    a = torch.ones(1, 2, 2)
    b = torch.tensor([[[torch.nan, 0], [1, 0], [torch.inf, 0], [-torch.inf, 0], [2, 0]]])
    score, index = backend.run("match", a, b, metric="dot", k=4)
    assert index.tolist() == [[[2, 4, 1, -1]] * 2]
    assert score[0, 0].tolist() == [torch.inf, 2, 1, -torch.inf]


def test_views_equal_their_copies(kernels: Backend) -> None:
    x = torch.randn(30, 2, 24, generator=generator()).transpose(0, 1)
    views = (x[:, ::2, 3:19], x[:, 1::2, 3:19])
    copied = kernels.run("match", *(t.contiguous() for t in views), k=4)
    assert_bitwise_equal(kernels.run("match", *views, k=4), copied)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype) -> None:
    case = Case(70, 90, 6, batch=4, channels=33, dtype=dtype)
    inputs = case.inputs(ties=False)
    whole = kernels.run("match", **inputs)
    for item in range(case.batch):
        one = slice(item, item + 1)
        part = {n: t[one] if isinstance(t, Tensor) else t for n, t in inputs.items()}
        assert_bitwise_equal(kernels.run("match", **part), [t[one] for t in whole], str(item))


@pytest.mark.parametrize("metric", METRICS)
def test_isa_and_threads_do_not_matter(on_every_cpu, metric: str) -> None:
    inputs = Case(211, 203, 9, metric, 65).inputs(ties=False)
    assert_one_result(on_every_cpu(lambda: tokred.match(**inputs)))
