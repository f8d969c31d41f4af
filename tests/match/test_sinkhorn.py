"""sinkhorn against its float64 oracle and against Sinkhorn's algorithm as it is usually written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
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
def test_nothing_is_left(backend: Backend, side: str) -> None:
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


# Gradients --------------------------------------------------------------------------------------

TENSORS = (
    "x", "anchors", "position_x", "position_anchors", "time_x", "time_anchors", "mask_x",
    "mask_anchors", "offset",
)  # fmt: skip
OPTIONS = ("position_weight", "time_scale", "eps", "iterations")


def output_gradients(inputs: dict) -> tuple[Tensor, Tensor]:
    rng, shape = generator(5), inputs["anchors"].shape
    return torch.randn(shape, generator=rng), torch.randn(shape[:2], generator=rng)


def gradients(backend: Backend, inputs: dict, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The gradients of x and anchors, through aggregation and load."""
    if backend.name == "simt":
        steps = torch.ops.tokred_simt.sinkhorn(**inputs)[5]
        tensors = (inputs.get(name) for name in TENSORS)
        options = (inputs[name] for name in OPTIONS)
        return list(torch.ops.tokred_simt.sinkhorn_backward(*grads, *tensors, steps, *options))
    moved = {name: move(value, backend.device) for name, value in inputs.items()}
    leaves = [moved[name].detach().requires_grad_() for name in ("x", "anchors")]
    moved |= dict(zip(("x", "anchors"), leaves, strict=True))
    results = backend.function("sinkhorn")(**moved)[:2]
    found = torch.autograd.grad(
        results, leaves, move(list(grads), backend.device), materialize_grads=True
    )
    return [t.cpu() for t in found]


def check_gradients(backend: Backend, inputs: dict, slack: float = 1.0) -> list[Tensor]:
    grads = output_gradients(inputs)
    found = gradients(backend, inputs, grads)
    exact = gradients(Backend("reference"), widened(inputs), tuple(g.double() for g in grads))
    scale = max((float(t.abs().max()) for t in exact if t.numel()), default=0.0)
    for name, actual, wanted in zip(("x", "anchors"), found, exact, strict=True):
        assert actual.dtype == inputs[name].dtype and actual.shape == wanted.shape, name
        assert wanted.isfinite().all(), name
        limit = slack * 5e-6 / inputs["eps"] * scale
        rounding = torch.finfo(actual.dtype).eps * wanted.abs() + torch.finfo(actual.dtype).tiny
        error = (actual.double() - wanted).abs() - rounding
        assert (error <= limit).all(), f"{name}: {float(error.max()):.3g}, allowed {limit:.3g}"
    return found


GRADIENT_CASES = [
    *(Case(dtype=dtype, positions=True, times=True, offset=True, masks=True) for dtype in FLOATS),
    Case(), Case(positions=True), Case(times=True), Case(offset=True), Case(masks=True),
    Case(iterations=1), Case(iterations=2), Case(iterations=60),
    *(Case(sources, anchors) for sources, anchors in [(1, 1), (1, 40), (40, 1), (16, 16)]),
    *(Case(sources, anchors) for sources, anchors in [(0, 5), (5, 0), (100, 33), (70, 130)]),
    Case(channels=0), Case(channels=130, positions=True), Case(batch=0),
    Case(eps=0.02, iterations=40), Case(eps=0.004, iterations=3, masks=True),
    Case(eps=0.004, iterations=200), Case(eps=3.0),
]  # fmt: skip


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=label)
def test_gradients_against_float64(kernels: Backend, case: Case) -> None:
    found = check_gradients(kernels, case.inputs())
    if case.sources > 1 and case.anchors > 1 and case.batch and case.channels:
        assert all(t.abs().max() > 0 for t in found)


def test_gradients_of_items_that_stop_by_themselves(kernels: Backend) -> None:
    inputs = replace(Case(), tolerance=1e-3, iterations=300, positions=True, batch=3).inputs()
    inputs["x"][1] = inputs["x"][1, :1]
    steps = kernels.run("sinkhorn", **inputs)[5]
    assert len(set(steps.tolist())) > 1 and steps.max() < 300
    check_gradients(kernels, inputs)


def test_gradients_of_one_output_alone(kernels: Backend) -> None:
    inputs = Case(positions=True).inputs()
    grads = output_gradients(inputs)
    whole = gradients(kernels, inputs, grads)
    parts = [
        gradients(kernels, inputs, (grads[0], torch.zeros_like(grads[1]))),
        gradients(kernels, inputs, (torch.zeros_like(grads[0]), grads[1])),
    ]
    for both, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(both, first + second, rtol=1e-3, atol=1e-4)


def test_rows_without_length_or_part_have_no_gradient(kernels: Backend) -> None:
    inputs = Case(masks=True, positions=True, times=True).inputs()
    for side in ("x", "anchors"):
        inputs[side][:, 0] = 0
        inputs[f"mask_{side}"][:, 2] = False
    clean = check_gradients(kernels, inputs)
    assert clean[1][:, 0].eq(0).all()  # of x the aggregation has a part
    grads = output_gradients(inputs)
    for side, grad in zip(("x", "anchors"), clean, strict=True):
        out = ~inputs[f"mask_{side}"]
        assert grad[out].eq(0).all()
        inputs[side][out] = torch.nan
        inputs[f"position_{side}"][out] = torch.inf
        inputs[f"time_{side}"][out] = torch.nan
    for grad in grads:
        grad[~inputs["mask_anchors"]] = torch.nan
    assert_bitwise_equal(gradients(kernels, inputs, grads), clean)


@pytest.mark.parametrize("side", ["x", "anchors"])
def test_no_row_has_a_gradient(kernels: Backend, side: str) -> None:
    inputs = Case(masks=True).inputs()
    inputs[f"mask_{side}"][0] = False
    found = check_gradients(kernels, inputs)
    assert all(t[0].eq(0).all() for t in found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_and_strides_do_not_matter_to_gradients(kernels: Backend, dtype: torch.dtype) -> None:
    case = Case(batch=4, positions=True, masks=True, tolerance=1e-3, iterations=99, dtype=dtype)
    inputs = case.inputs()
    grads = output_gradients(inputs)
    whole = gradients(kernels, inputs, grads)
    for item in range(case.batch):
        one = slice(item, item + 1)
        part = {n: t[one] if isinstance(t, Tensor) else t for n, t in inputs.items()}
        alone = gradients(kernels, part, tuple(g[one] for g in grads))
        assert_bitwise_equal(alone, [t[one] for t in whole], f"item {item} alone")
    odd = torch.empty(21, 4, 27).transpose(0, 1)[..., 3:].copy_(grads[0])
    views = gradients(kernels, inputs, (odd, grads[1].mT.contiguous().mT))
    assert_bitwise_equal(views, whole, "views")


@pytest.mark.parametrize("eps", [0.1, 0.004])
def test_isa_and_threads_do_not_matter_to_gradients(on_every_cpu, eps: float) -> None:
    inputs = Case(131, 67, 40, True, True, eps=eps, batch=5).inputs()
    grads = output_gradients(inputs)
    assert_one_result(on_every_cpu(lambda: gradients(Backend("cpu"), inputs, grads)))


def test_only_aggregation_and_load_have_gradients() -> None:
    inputs = Case().inputs()
    inputs["x"].requires_grad_()
    result = tokred.sinkhorn(**inputs)
    assert [t.requires_grad for t in result] == [True, True, False, False, False, False]
    result.load.sum().backward()  # an expanded gradient
    (grad,) = torch.autograd.grad(
        tokred.sinkhorn(**inputs).aggregation.square().sum(), inputs["x"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="sinkhorn has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("steps", [-3, 0, 1000])
def test_steps_that_were_not_made(kernels: Backend, steps: int) -> None:
    """No more than `iterations`, and none where there are none."""
    inputs = Case(batch=1).inputs()
    grads = output_gradients(inputs)
    ops = torch.ops.tokred_simt if kernels.name == "simt" else torch.ops.tokred
    found = kernels_backward(kernels, ops, inputs, grads, steps)
    if steps <= 0:
        assert all(t.eq(0).all() for t in found)
    else:
        assert_bitwise_equal(found, kernels_backward(kernels, ops, inputs, grads, 12))


def kernels_backward(
    backend: Backend, ops: Any, inputs: dict, grads: tuple[Tensor, Tensor], steps: int
) -> list[Tensor]:
    tensors = [inputs.get(name) for name in TENSORS]
    given = [*grads, *tensors, torch.tensor([steps], dtype=torch.int32)]
    options = (inputs[name] for name in OPTIONS)
    found = ops.sinkhorn_backward(*move(given, backend.device), *options)
    return [t.cpu() for t in found]


@pytest.mark.parametrize("name", ["position_x", "time_anchors", "offset"])
def test_other_gradients_are_refused(name: str) -> None:
    inputs = Case(positions=True, times=True, offset=True).inputs()
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"sinkhorn has gradients in x, anchors alone, but {name}"):
        tokred.sinkhorn(**inputs)
    with torch.no_grad():
        assert not tokred.sinkhorn(**inputs).load.requires_grad
