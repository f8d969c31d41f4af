"""similarity_stats and transition_stats against their float64 oracles, and bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference
from tokred.reference.match import similarity

METRICS = ("cosine", "dot", "l2", "half_cosine")
ENERGIES = (("none", 0.0), ("elu", 0.45), ("gaussian", 0.5))
EPS = torch.finfo(torch.float32).eps


def make_rows(shape: tuple[int, ...], distribution: str, seed: int) -> Tensor:
    rng = generator(seed)
    x = torch.randn(shape, generator=rng)
    special = torch.rand(shape[:2], generator=rng) < 0.3
    if distribution == "ties":
        return torch.randint(-1, 2, shape, generator=rng).float()
    if distribution == "constant":
        return torch.ones(shape) * torch.linspace(-1, 1, shape[2])
    if distribution == "close":
        return x * 1e-3 + torch.linspace(-1, 1, shape[2])
    if distribution == "zero_rows":
        x[special] = 0
    elif distribution == "nan":
        x[..., 0][special] = torch.nan
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
    threshold: float = 0.1
    energy: tuple[str, float] = ("none", 0.0)
    exclude_self: bool = False
    block_size: int = 0
    masks: str = "none"

    def inputs(self) -> tuple:
        rng = generator(7)
        a = make_rows((self.batch, self.rows, self.channels), self.distribution, 1)
        b = make_rows((self.batch, self.columns, self.channels), self.distribution, 2)
        mask_a = torch.rand(a.shape[:2], generator=rng) < 0.7
        mask_b = torch.rand(b.shape[:2], generator=rng) < 0.7
        if self.masks == "nothing":
            mask_b[:] = False
        return (
            *(a.to(self.dtype), b.to(self.dtype), self.metric, self.threshold, *self.energy),
            *(self.exclude_self, self.block_size),
            mask_a if self.masks in ("a", "both") else None,
            mask_b if self.masks in ("b", "both", "nothing") else None,
        )


SIZES = [
    Case(),
    Case(1, 1, 1, 1),
    Case(1, 5, 230, 17),
    Case(1, 130, 5, 3),
    Case(2, 33, 17, 65),
    Case(1, 7, 9, 1000),
    Case(1, 200, 300, 16, energy=("elu", 0.2)),
    Case(2, 0, 5, 8),
    Case(2, 5, 0, 8),
    Case(0, 5, 6, 8),
    Case(1, 4, 4, 0),
]
OPTIONS = [
    *(
        Case(metric=m, energy=e, distribution=d)
        for m in METRICS
        for e in ENERGIES[1:]
        for d in ("randn", "zero_rows", "nan")
    ),
    *(Case(metric=m, masks="both", exclude_self=True) for m in METRICS),
    *(Case(distribution=d) for d in ("ties", "constant", "close", "zero_rows", "nan")),
    *(Case(masks=masks) for masks in ("a", "b", "nothing")),
    *(
        Case(rows=150, columns=170, block_size=s, exclude_self=s % 2 == 1, masks=m)
        for s in (1, 7, 16, 64, 100, 1000)
        for m in ("none", "both")
    ),
    Case(rows=100, columns=20, block_size=8),
]


def flat(results: Any) -> list[Tensor]:
    """The six results: a dataclass of the public function, a tuple elsewhere."""
    return list(astuple(results) if is_dataclass(results) else results)


def run(backend: Backend, inputs: tuple) -> list[Tensor]:
    return [t.cpu() for t in flat(backend.run("similarity_stats", *inputs))]


def wide(inputs: tuple) -> tuple:
    return (inputs[0].double(), inputs[1].double(), *inputs[2:])


def check_stats(inputs: tuple, actual: list[Tensor]) -> None:
    """Numbers as accurate as plain torch's; choices and counts exact where rounding cannot matter.

    Rounding may add up to `unit` times the norms of a pair to its similarity: twice the largest
    such error of plain torch, plus (8 + sqrt(C)) units in the last place.
    """
    a, b, metric, threshold = inputs[:4]
    exact = reference.similarity_stats(*wide(inputs))
    plain = reference.similarity_stats(*inputs)
    scores = similarity(a.double(), b.double(), metric)
    error = (similarity(a, b, metric).double() - scores).abs().nan_to_num(0)
    magnitude = scores.abs().nan_to_num(0)
    size = magnitude.max().item() if magnitude.numel() else 0.0
    bound = (2 * error.max().item() if error.numel() else 0.0) + (8 + a.shape[2] ** 0.5) * EPS * (
        1 + size
    )

    mean, variance, largest, index, count, energy = actual
    names = ("mean", "variance", "largest", "index", "count", "energy")
    for name, x, e in zip(names, actual, exact, strict=True):
        assert x.shape == e.shape, name
        assert x.dtype == (torch.int32 if name in ("index", "count") else torch.float32), name
    assert_as_accurate(mean, exact[0], plain[0], bound, "mean")
    assert_as_accurate(variance, exact[1], plain[1], bound * (1 + size), "variance")
    assert_as_accurate(largest, exact[2], plain[2], bound, "largest")
    assert_as_accurate(energy, exact[5], plain[5], 4 * bound, "energy")

    alone = exact[2] == -torch.inf
    assert torch.equal(index == -1, alone)
    if scores.shape[2] == 0:
        return
    rated = scores.nan_to_num(-torch.inf)
    chosen = rated.gather(2, index.clamp(min=0).long()[..., None])[..., 0]
    assert (chosen >= exact[2] - 2 * bound)[~alone].all()
    low, high = (
        reference.similarity_stats(*wide((*inputs[:3], threshold + d, *inputs[4:])))[4]
        for d in (bound, -bound)
    )
    assert (low <= count).all() and (count <= high).all()


CASES = [replace(c, dtype=FLOATS[i % 3]) for i, c in enumerate([*SIZES, *OPTIONS])]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    check_stats(inputs, run(backend, inputs))


@pytest.mark.parametrize("masks", ["none", "both"])
def test_exact_arithmetic_gives_exact_choices(backend: Backend, masks: str) -> None:
    case = Case(rows=70, columns=90, channels=8, distribution="ties", metric="dot", masks=masks)
    inputs = replace(case, threshold=2.0, exclude_self=True, block_size=33).inputs()
    results, expected = run(backend, inputs), reference.similarity_stats(*inputs)
    assert_bitwise_equal(results[3:5], expected[3:5])
    assert torch.equal(results[2], expected[2])


@pytest.mark.parametrize("metric", METRICS)
def test_the_first_of_equals_wins(backend: Backend, metric: str) -> None:
    case = Case(rows=40, columns=150, distribution="constant", metric=metric, masks="b")
    inputs = replace(case, exclude_self=True).inputs()
    expected = reference.similarity_stats(*inputs)[3]
    assert_bitwise_equal(run(backend, inputs)[3], expected)


def test_variance_of_nearly_equal_scores(backend: Backend) -> None:
    """Where mean of squares minus square of mean would leave nothing but rounding."""
    inputs = Case(1, 20, 700, 16, distribution="close", metric="dot").inputs()
    exact = reference.similarity_stats(*wide(inputs))[1]
    torch.testing.assert_close(run(backend, inputs)[1].double(), exact, rtol=1e-2, atol=0)


def test_masked_tokens_may_hold_anything(kernels: Backend) -> None:
    a, b, *options = Case(masks="both", energy=("elu", 0.3)).inputs()
    expected = run(kernels, (a, b, *options))
    a[~options[6]] = torch.nan
    b[~options[7]] = torch.inf
    assert_bitwise_equal(run(kernels, (a, b, *options)), expected)


def test_strides(kernels: Backend) -> None:
    a, b, *options = Case(masks="both").inputs()
    spaced = [torch.stack([t, t], 2)[:, :, 0] for t in (a, b)]
    assert_bitwise_equal(run(kernels, (*spaced, *options)), run(kernels, (a, b, *options)))


def test_one_set_of_tokens(one_thread: None) -> None:
    a, *_ = Case().inputs()
    mask = torch.rand(2, 37, generator=generator()) < 0.5
    alone = flat(tokred.similarity_stats(a, exclude_self=True, mask_a=mask))
    pair = flat(tokred.similarity_stats(a, a, exclude_self=True, mask_a=mask, mask_b=mask))
    assert_bitwise_equal(alone, pair)


BITWISE = [
    Case(3, 150, 170, 40, energy=("elu", 0.3), masks="both", exclude_self=True),
    Case(3, 150, 170, 40, energy=("gaussian", 0.3), block_size=50),
    Case(3, 211, 103, 65, metric="l2"),
]


@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_does_not_matter(kernels: Backend, case: Case) -> None:
    inputs = replace(case, dtype=torch.bfloat16).inputs()
    whole = run(kernels, inputs)
    for item in range(3):
        one = slice(item, item + 1)
        part = tuple(t[one] if isinstance(t, Tensor) else t for t in inputs)
        assert_bitwise_equal(run(kernels, part), [t[one] for t in whole], f"item {item}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_isa_and_threads_do_not_matter(
    on_every_cpu: Callable[[Callable[[], Any]], dict[str, Any]], case: Case, dtype: torch.dtype
) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    before, after = inputs[0], inputs[0].flip(1)

    def results() -> list[Tensor]:
        return [
            *flat(tokred.similarity_stats(*inputs)),
            *tokred.transition_stats(before, after),
        ]

    assert_one_result(on_every_cpu(results))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 7, 24), (1, 1, 1), (2, 5, 1000), (1, 130, 80), (2, 0, 8), (0, 3, 8), (1, 3, 0)]
)
def test_transitions_against_float64(
    backend: Backend, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    before, after = (torch.randn(shape, generator=generator(s)).to(dtype) for s in (1, 2))
    if min(shape) > 1:
        before[0, 0] = 0
        after[1, 1] = 0
        after[0, 1] = before[0, 1]
        after[0, 2] = -2 * before[0, 2]
        before[1, 2, 0] = torch.nan
    exact = reference.transition_stats(before.double(), after.double())
    plain = reference.transition_stats(before, after)
    results = backend.run("transition_stats", before, after)
    for name, x, e, p in zip(("ratio", "cosine"), results, exact, plain, strict=True):
        assert x.dtype == torch.float32 and x.shape == e.shape
        # Beside a zero row the ratio is huge.
        huge = e.abs() > 1e6
        torch.testing.assert_close(x[huge].double(), e[huge], rtol=1e-5, atol=0)
        x, e, p = (t.masked_fill(huge, 0) for t in (x, e, p))
        assert_as_accurate(x, e, p, (8 + shape[2] ** 0.5) * EPS * 4, name)


def test_transitions_read_strides(kernels: Backend) -> None:
    x = torch.randn(2, 9, 2, 20, generator=generator())
    views = x.unbind(2)
    copies = [t.contiguous() for t in views]
    assert_bitwise_equal(
        kernels.run("transition_stats", *views), kernels.run("transition_stats", *copies)
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_set_beside_itself(backend: Backend, metric: str, dtype: torch.dtype) -> None:
    """Each pair is multiplied once there, and rows have the bits that two sets give."""
    x = make_rows((2, 109, 132), "randn", 3).to(dtype)
    mask = torch.rand(2, 109, generator=generator(4)) < 0.8
    mask[1, 20:] = False
    for energy, exclude_self, masks in (
        (("none", 0.0), True, None), (("elu", 0.45), False, mask), (("gaussian", 0.5), True, mask),
    ):  # fmt: skip
        options = (metric, 0.1, *energy, exclude_self, 0, masks, masks)
        found = run(backend, (x, x, *options))
        assert_bitwise_equal(found, run(backend, (x, x.clone(), *options)))
