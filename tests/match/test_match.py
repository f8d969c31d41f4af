"""match against its float64 oracle, and bit by bit against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result, flat
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference
from tokred.reference.match import similarity

METRICS = ("cosine", "dot", "l2", "half_cosine")
DISTRIBUTIONS = ("randn", "ties", "constant", "outliers", "tiny", "zero_rows", "nan", "inf")


def make_rows(shape: tuple[int, ...], distribution: str, seed: int) -> Tensor:
    rng = generator(seed)
    x = torch.randn(shape, generator=rng)
    special = torch.rand(shape[:2], generator=rng) < 0.3
    if distribution == "ties":
        return torch.randint(-1, 2, shape, generator=rng).float()
    if distribution == "constant":
        return torch.ones(shape) * torch.linspace(-1, 1, shape[2])
    if distribution == "outliers":
        x[..., :: max(1, shape[2] // 4)] *= 100
    elif distribution == "tiny":
        x *= 1e-7
    elif distribution == "zero_rows":
        x[special] = 0
    elif distribution in ("nan", "inf"):
        x[..., 0][special] = float(distribution)
    return x


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    rows: int = 37
    columns: int = 41
    channels: int = 24
    dtype: torch.dtype = torch.float32
    distribution: str = "randn"
    metric: str = "cosine"
    masks: str = "none"
    weights: bool = False
    band: int = -1

    def inputs(self) -> tuple:
        rng = generator(7)
        a = make_rows((self.batch, self.rows, self.channels), self.distribution, 1)
        b = make_rows((self.batch, self.columns, self.channels), self.distribution, 2)
        mask_a = torch.rand(a.shape[:2], generator=rng) < 0.7
        mask_b = torch.rand(b.shape[:2], generator=rng) < 0.7
        if self.masks == "nothing":
            mask_b[:] = False
        weights = [torch.rand(t.shape[:2], generator=rng) + 0.5 for t in (a, b)]
        return (
            a.to(self.dtype),
            b.to(self.dtype),
            mask_a if self.masks in ("a", "both") else None,
            mask_b if self.masks in ("b", "both", "nothing") else None,
            *(weights if self.weights else (None, None)),
            self.metric,
            self.band,
        )


SIZES = [
    Case(),
    Case(1, 1, 1, 1),
    Case(1, 5, 130, 17),
    Case(1, 130, 5, 3),
    Case(2, 33, 17, 65),
    Case(3, 16, 16, 16),
    Case(1, 7, 9, 1000),
    Case(2, 0, 5, 8),
    Case(2, 5, 0, 8),
    Case(0, 5, 6, 8),
    Case(1, 4, 4, 0),
]
LARGE = [
    Case(1, 1100, 1500, 16),
    Case(3, 99, 98, 64),
    Case(1, 300, 700, 64),
    Case(2, 197, 197, 40),
    Case(1, 64, 64, 768),
]
OPTIONS = [
    *(Case(metric=m, distribution=d) for m in METRICS for d in DISTRIBUTIONS),
    *(Case(metric=m, masks="both", weights=True) for m in METRICS),
    *(Case(masks=masks) for masks in ("a", "b", "nothing")),
    *(Case(band=band, masks=masks) for band in (0, 1, 9, 50) for masks in ("none", "both")),
    Case(rows=60, columns=8, band=3),
    Case(distribution="nan", weights=True, masks="both", band=5),
]
CASES = [
    *(replace(case, dtype=dtype) for case in [*SIZES, *LARGE] for dtype in FLOATS),
    *OPTIONS,
    *(replace(case, dtype=torch.bfloat16) for case in OPTIONS),
]


def pair_magnitude(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """What a rounding error of the similarity is relative to."""
    norm_a, norm_b = a.norm(dim=-1)[:, :, None], b.norm(dim=-1)[:, None, :]
    if metric == "dot":
        return norm_a * norm_b
    if metric == "l2":
        return (norm_a + norm_b).square()
    return torch.ones_like(norm_a * norm_b)


def check_match(inputs: tuple, score: Tensor, index: Tensor) -> None:
    """Scores as accurate as plain torch's; the exact choice wherever rounding cannot decide it.

    Rounding may add up to `bound` to a score: twice the largest error of a plain float32
    computation of all pairs, plus (8 + sqrt(C)) units in the last place. So a chosen partner may be
    worse than the best one by 2 * bound, and is the best one wherever the gap is greater.
    """
    a, b, mask_a, mask_b, weight_a, weight_b, metric, _ = inputs
    wide = [None if t is None else t.double() for t in (a, b, weight_a, weight_b)]
    exact = similarity(wide[0], wide[1], metric)
    magnitude = pair_magnitude(wide[0], wide[1], metric)
    plain = similarity(a.float(), b.float(), metric).double()
    for weight, dim in ((wide[2], 2), (wide[3], 1)):
        if weight is not None:
            exact, magnitude = (t * weight.abs().unsqueeze(dim) for t in (exact, magnitude))
            plain = plain * weight.unsqueeze(dim)
    relative = ((plain - exact).abs() / magnitude).nan_to_num(0, 0, 0)
    unit = 2 * (relative.max() if relative.numel() else 0)
    unit = unit + (8 + a.shape[2] ** 0.5) * 2.0**-24

    best, choice = reference.match(*wide[:2], mask_a, mask_b, *wide[2:], *inputs[6:])
    assert score.dtype == torch.float32 and index.dtype == torch.int32
    alone = best == -torch.inf
    assert (index[alone] == -1).all() and (score[alone] == -torch.inf).all()
    assert ((index >= 0) & (index < max(b.shape[1], 1)))[~alone].all()
    if alone.all():
        return
    column = index.clamp(min=0).long()[..., None]
    chosen = exact.gather(2, column)[..., 0]
    bound = unit * magnitude.nan_to_num(0, 0, 0).amax(2)
    infinite = best == torch.inf
    assert torch.equal(index[infinite], choice[infinite]) and (score == best)[infinite].all()
    usual = ~alone & ~infinite
    assert (score.double() - chosen).abs()[usual].le(bound[usual]).all()
    assert (best - chosen)[usual].le(2 * bound[usual]).all()
    if mask_b is not None:
        assert mask_b.gather(1, column[..., 0])[usual].all()
    if inputs[7] >= 0:
        distance = (column[..., 0] - torch.arange(a.shape[1])).abs()
        assert (distance <= inputs[7])[usual].all()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    check_match(inputs, *backend.run("match", *inputs))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [16, 64])
def test_exact_arithmetic_equals_the_reference(
    backend: Backend, metric: str, channels: int
) -> None:
    """Rows of +-1 have norms 4 and 8: every score is exact, and ties are everywhere."""
    rng = generator(3)
    a, b = (torch.randint(0, 2, (2, n, channels), generator=rng) * 2.0 - 1 for n in (45, 38))
    expected = reference.match(a.double(), b.double(), metric=metric)
    for dtype in FLOATS:
        score, index = backend.run("match", a.to(dtype), b.to(dtype), metric=metric)
        assert torch.equal(score.double(), expected[0]) and torch.equal(index, expected[1])


@pytest.mark.parametrize("metric", METRICS)
def test_identical_partners_tie_to_the_lowest(kernels: Backend, metric: str) -> None:
    a = make_rows((2, 40, 33), "randn", 5)
    b = make_rows((2, 1, 33), "randn", 6).expand(2, 70, 33).contiguous()
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, :9] = False
    for dtype in FLOATS:
        _, index = kernels.run("match", a.to(dtype), b.to(dtype), None, mask, metric=metric)
        assert index[0].eq(0).all() and index[1].eq(9).all()


def test_signed_zeros_tie(backend: Backend) -> None:
    a = torch.ones(1, 2, 2)
    b = torch.tensor([[[-0.0, -0.0], [0.0, 0.0], [-1.0, -1.0]]])
    score, index = backend.run("match", a, b, metric="dot")
    assert index.eq(0).all() and score.eq(0).all()


def test_zero_rows_have_cosine_zero(backend: Backend) -> None:
    a = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    b = torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    score, index = backend.run("match", a, b)
    assert score.tolist() == [[0.0, 0.0]] and index.tolist() == [[0, 1]]


def test_nan_weights_never_win(backend: Backend) -> None:
    a, b = make_rows((1, 6, 8), "randn", 1), make_rows((1, 5, 8), "randn", 2)
    weight_a, weight_b = torch.ones(1, 6), torch.ones(1, 5)
    weight_a[0, 2] = weight_b[0, 3] = torch.nan
    score, index = backend.run("match", a, b, None, None, weight_a, weight_b)
    assert index[0, 2] == -1 and score[0, 2] == -torch.inf
    assert not index.eq(3).any()


def test_views_equal_their_copies(kernels: Backend) -> None:
    """Any outer strides, expanded weights, strided masks."""
    a = make_rows((7, 2, 24), "randn", 1).transpose(0, 1)[..., 3:19]
    b = make_rows((2, 18, 16), "randn", 2)[:, ::2]
    mask = (torch.rand(2, 18, generator=generator()) < 0.8)[:, ::2]
    weight = torch.rand(1, 7, generator=generator()).expand(2, 7)
    views = (a, b, None, mask, weight)
    copies = [None if t is None else t.contiguous() for t in views]
    assert_bitwise_equal(kernels.run("match", *views), kernels.run("match", *copies))


BITWISE = [
    Case(8, 45, 52, 33),
    Case(8, 120, 110, 64, metric="l2"),
    Case(8, 31, 64, 40, masks="both", weights=True, band=12),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_does_not_matter(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    whole = kernels.run("match", *inputs)
    assert_bitwise_equal(kernels.run("match", *inputs), whole, "again")

    def rows(index: slice | Tensor) -> tuple:
        return tuple(t[index] if isinstance(t, Tensor) else t for t in inputs)

    order = torch.randperm(case.batch, generator=generator())
    permuted = [t[order] for t in flat(whole)]
    assert_bitwise_equal(kernels.run("match", *rows(order)), permuted, "permuted")
    for item in range(case.batch):
        one = slice(item, item + 1)
        alone = kernels.run("match", *rows(one))
        assert_bitwise_equal(alone, [t[one] for t in flat(whole)], f"item {item} alone")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [*BITWISE, Case(2, 211, 203, 65)], ids=label)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_one_result(on_every_cpu(lambda: tokred.match(*inputs)))


def test_weights_that_require_grad_are_detached() -> None:
    a = torch.randn(1, 4, 8, requires_grad=True)
    score, _ = tokred.match(a, a, weight_a=torch.ones(1, 4, requires_grad=True))
    assert not score.requires_grad
