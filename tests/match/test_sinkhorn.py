"""sinkhorn against its float64 oracle and against Sinkhorn's algorithm as it is usually written."""

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
from tokred.reference.match import transport_cost


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    sources: int = 37
    anchors: int = 21
    channels: int = 24
    positions: bool = False
    times: bool = False
    offset: bool = False
    masks: bool = False
    eps: float = 0.1
    iterations: int = 12
    tolerance: float = 0.0
    dtype: torch.dtype = torch.float32
    batch: int = 2

    def inputs(self) -> dict:
        rng = generator(self.sources + self.anchors)
        sides = {"x": self.sources, "anchors": self.anchors}
        some: dict = {"position_weight": 0.7, "time_scale": 1.2}
        for name, count in sides.items():
            shape = (self.batch, count, self.channels)
            some[name] = torch.randn(shape, generator=rng).to(self.dtype)
            if self.positions:
                some[f"position_{name}"] = torch.rand(self.batch, count, 2, generator=rng)
            if self.times:
                time = torch.randint(0, 4, (self.batch, count), generator=rng)
                some[f"time_{name}"] = time.float()
            if self.masks:
                mask = torch.rand(self.batch, count, generator=rng) < 0.6
                mask[:, :1] = True
                some[f"mask_{name}"] = mask
        if self.offset:
            some["offset"] = torch.rand(self.batch, generator=rng)
        options = {"eps": self.eps, "iterations": self.iterations, "tolerance": self.tolerance}
        return {**some, **options}


CASES = [
    Case(),
    *(Case(dtype=dtype, positions=True, times=True, masks=True) for dtype in FLOATS),
    *(Case(positions=p, times=t, offset=o) for p, t, o in [(1, 0, 0), (0, 1, 0), (1, 1, 1)]),
    *(Case(sources, anchors) for sources, anchors in [(1, 1), (1, 40), (40, 1), (16, 16)]),
    *(Case(sources, anchors) for sources, anchors in [(0, 5), (5, 0), (100, 33), (70, 130)]),
    Case(channels=0),
    Case(channels=130, positions=True),
    Case(batch=0),
    Case(eps=0.004, iterations=200),
    Case(eps=0.004, iterations=3, masks=True),
    Case(iterations=1),
]


def widened(inputs: dict) -> dict:
    return {
        name: t.double() if isinstance(t, Tensor) and t.dtype != torch.bool else t
        for name, t in inputs.items()
    }


def check(inputs: dict, result: tuple[Tensor, ...], slack: float = 1.0) -> None:
    """Errors of log_u and log_v are those of cost / eps; the rest follows."""
    expected = reference.sinkhorn(**widened(inputs))
    unit = slack * 3e-6 / inputs["eps"]
    names = ("aggregation", "load", "peak", "log_u", "log_v")
    for name, found, wanted in zip(names, result, expected, strict=False):
        assert found.dtype == torch.float32 and found.shape == wanted.shape, name
        known = wanted.isfinite()
        assert torch.equal(found.double()[~known], wanted[~known]), name
        scale = float(wanted[known].abs().max()) if known.any() else 0.0
        scale = 1 + scale if name.startswith("log") else scale
        assert ((found.double() - wanted)[known].abs() <= unit * scale).all(), name
    assert result[5].dtype == torch.int32 and torch.equal(result[5], expected[5])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    check(inputs, backend.run("sinkhorn", **inputs))


def test_every_item_stops_by_itself(backend: Backend) -> None:
    inputs = replace(Case(), tolerance=1e-3, iterations=300, positions=True, batch=3).inputs()
    inputs["x"][1] = inputs["x"][1, :1]  # all the same: right after one step
    result = backend.run("sinkhorn", **inputs)
    check(inputs, result)
    steps = result[5]
    assert 1 < steps[0] < 300 and steps[1] < steps[0]


def test_the_plan_has_its_marginals(kernels: Backend) -> None:
    case = Case(iterations=400, masks=True, positions=True)
    inputs = case.inputs()
    aggregation, load, peak, log_u, log_v, steps = kernels.run("sinkhorn", **inputs)
    cost = transport_cost(
        inputs["x"], inputs["anchors"], (inputs["position_x"], inputs["position_anchors"]),
        (None, None), None, 0.7, 1.2,
    )  # fmt: skip
    plan = (log_u[:, :, None] + log_v[:, None] - cost / case.eps).exp()
    masks = inputs["mask_x"], inputs["mask_anchors"]
    rows, columns = (mask / mask.sum(1, keepdim=True) for mask in masks)
    torch.testing.assert_close(plan.sum(2), rows, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(load, columns, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(aggregation, plan.mT @ inputs["x"], rtol=1e-3, atol=1e-5)
    shares = plan.amax(2) / plan.sum(2).clamp(min=1e-30)
    torch.testing.assert_close(peak, shares, rtol=1e-3, atol=1e-6)
    assert steps.eq(400).all()


def test_it_is_sinkhorn_as_it_is_usually_written(backend: Backend) -> None:
    """Scaling vectors r and c of K = exp(-cost / eps), AOT's cost within frames."""
    inputs = Case(60, 13, positions=True, batch=1, iterations=100, tolerance=1e-2).inputs()
    x, anchors = (inputs[name][0].double() for name in ("x", "anchors"))
    cosine = (
        torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(anchors, dim=1).T
    )
    apart = torch.cdist(inputs["position_x"][0], inputs["position_anchors"][0]).double()
    k = torch.exp(-(1 - cosine + 0.7 * apart) / 0.1)
    r, c = torch.ones(60).double(), torch.ones(13).double()
    expected_steps = 0
    while expected_steps < 100:
        before, expected_steps = r, expected_steps + 1
        r = 1 / 60 / (k @ c)
        c = 1 / 13 / (k.T @ r)
        if (r - before).abs().mean() < 1e-2:
            break
    plan = r[:, None] * k * c
    aggregation, load, _, _, _, steps = backend.run("sinkhorn", **inputs)
    assert steps.tolist() == [expected_steps]
    torch.testing.assert_close(aggregation[0].double(), plan.T @ x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(load[0].double(), plan.sum(0), rtol=1e-4, atol=1e-7)


def test_rows_taken_out_are_not_looked_at(kernels: Backend) -> None:
    inputs = Case(masks=True, positions=True, times=True).inputs()
    clean = kernels.run("sinkhorn", **inputs)
    for side in ("x", "anchors"):
        inputs[side][~inputs[f"mask_{side}"]] = torch.nan
        inputs[f"position_{side}"][~inputs[f"mask_{side}"]] = torch.inf
    assert_bitwise_equal(kernels.run("sinkhorn", **inputs), clean)


@pytest.mark.parametrize("side", ["x", "anchors"])
def test_nobody_is_left(backend: Backend, side: str) -> None:
    inputs = Case(masks=True).inputs()
    inputs[f"mask_{side}"][0] = False
    aggregation, load, peak, log_u, log_v, steps = backend.run("sinkhorn", **inputs)
    for zero in (aggregation, load, peak, steps):
        assert zero[0].eq(0).all()
    assert log_u[0].eq(-torch.inf).all() and log_v[0].eq(-torch.inf).all()
    check(inputs, (aggregation, load, peak, log_u, log_v, steps))


def test_views_equal_their_copies(kernels: Backend) -> None:
    x = torch.randn(30, 2, 24, generator=generator()).transpose(0, 1)[..., 3:19]
    position = torch.rand(2, 15, 3, generator=generator())[..., 1:]
    time = torch.rand(2, 30, generator=generator())[:, ::2]
    views = (x[:, ::2], x[:, 1::2], position, position.flip(0), time, time)
    copied = kernels.run("sinkhorn", *(t.contiguous() for t in views))
    assert_bitwise_equal(kernels.run("sinkhorn", *views), copied)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype) -> None:
    case = Case(batch=4, positions=True, masks=True, tolerance=1e-3, iterations=99, dtype=dtype)
    inputs = case.inputs()
    whole = kernels.run("sinkhorn", **inputs)
    for item in range(case.batch):
        one = slice(item, item + 1)
        part = {n: t[one] if isinstance(t, Tensor) else t for n, t in inputs.items()}
        alone = kernels.run("sinkhorn", **part)
        assert_bitwise_equal(alone, [t[one] for t in whole], f"item {item} alone")


@pytest.mark.parametrize("eps", [0.1, 0.004])
def test_isa_and_threads_do_not_matter(on_every_cpu, eps: float) -> None:
    inputs = Case(131, 67, 40, True, True, eps=eps, batch=5).inputs()
    assert_one_result(on_every_cpu(lambda: tokred.sinkhorn(**inputs)))


@pytest.mark.parametrize("name", ["x", "anchors", "position_x"])
def test_gradients_are_refused(name: str) -> None:
    inputs = Case(positions=True).inputs()
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"sinkhorn.*{name}"):
        tokred.sinkhorn(**inputs)
    with torch.no_grad():
        assert not tokred.sinkhorn(**inputs).load.requires_grad
