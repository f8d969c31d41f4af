"""segment_weights and segment_pool against their oracle, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference

POOL_MODES = ("sum", "mean", "sqrt", "amax", "last", "softmax", "gaussian")
WEIGHT_MODES = ("sqrt", "last", "softmax", "gaussian")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    mode: str = "mean"
    batch: int = 2
    tokens: int = 45
    channels: int = 24
    segments: int = 8
    dtype: torch.dtype = torch.float32
    weight: bool = False
    offsets: bool = False
    sigma: float | None = None
    special: str = ""

    def inputs(self) -> dict[str, Any]:
        rng = generator(3)
        shape = self.batch, self.tokens
        x = torch.randn(*shape, self.channels, generator=rng)
        x += torch.arange(self.channels) % 3  # segments whose mean is far from 0
        weight = 2 * torch.randn(shape, generator=rng)
        if self.mode in ("sum", "mean", "sqrt"):
            weight = weight.abs() + 0.1
        if self.special == "-inf":
            weight[:, ::2] = -torch.inf
        elif self.special == "all -inf":
            weight[:] = -torch.inf
        elif self.special:
            x[:, 4::7, ::2] = float(self.special)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        inputs: dict[str, Any] = {"x": x.to(self.dtype), "mode": self.mode}
        if self.offsets:
            cuts = torch.randint(0, self.tokens + 1, (self.batch, self.segments + 1), generator=rng)
            inputs["offsets"] = cuts.sort(-1).values.int()
        else:
            ids = torch.randint(-1, self.segments + 2, shape, generator=rng, dtype=torch.int32)
            inputs |= {"ids": ids, "num_segments": self.segments}
        if self.weight or self.mode == "softmax":
            inputs["weight"] = weight.to(wide)
        if self.sigma is not None:
            inputs["sigma"] = self.sigma
        return inputs


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in inputs.items()
    }


WEIGHTED = ("sum", "mean", "sqrt", "softmax", "gaussian")
CASES = [
    *(Case(mode, dtype=dtype, offsets=o) for mode in POOL_MODES for dtype in FLOATS
      for o in (False, True)),
    *(Case(mode, dtype=torch.float64) for mode in POOL_MODES),
    *(Case(mode, weight=True, dtype=dtype) for mode in WEIGHTED for dtype in FLOATS),
    *(Case("gaussian", sigma=4.0, weight=w, dtype=dtype) for w in (False, True)
      for dtype in FLOATS),
    *(Case("softmax", special=s) for s in ("-inf", "all -inf")),
    *(Case(mode, special=value) for mode in ("amax", "last", "sum") for value in ("nan", "inf")),
    *(Case(mode, batch, tokens, channels, segments, offsets=o)
      for mode in ("softmax", "gaussian", "sqrt", "last") for o in (False, True)
      for batch, tokens, channels, segments in (
          (0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0), (1, 1, 1, 1), (1, 300, 17, 1),
          (1, 40, 300, 3))),
    *(Case(mode, 1, 1500, 9, 200) for mode in ("softmax", "gaussian")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=label)
def test_pool_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    y = backend.run("segment_pool", **inputs)
    exact, plain = reference.segment_pool(**widened(inputs)), reference.segment_pool(**inputs)
    assert y.dtype == case.dtype and y.shape == (case.batch, case.segments, case.channels)
    largest = exact.nan_to_num(0, 0, 0).abs().max().item() if y.numel() else 0
    assert_as_accurate(y, exact, plain, 4 * torch.finfo(case.dtype).eps * largest, "y")


@pytest.mark.parametrize("mode", WEIGHT_MODES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_weights_against_float64(backend: Backend, mode: str, dtype: torch.dtype) -> None:
    inputs = Case(mode, dtype=dtype, weight=mode == "gaussian").inputs()
    if mode != "gaussian":
        del inputs["x"]
    weights = backend.run("segment_weights", **inputs)
    exact, plain = reference.segment_weights(**widened(inputs)), reference.segment_weights(**inputs)
    assert_as_accurate(weights, exact, plain, 4 * torch.finfo(weights.dtype).eps, "weights")
    ids = inputs["ids"]
    outside = (ids < 0) | (ids >= 8)
    assert outside.any() and (weights[outside] == 0).all()
    if mode in ("softmax", "gaussian"):
        ones = torch.ones(2, 8, dtype=weights.dtype)
        total = torch.zeros(2, 8, dtype=weights.dtype)
        total.scatter_add_(1, ids.clamp(0, 7).long(), weights)
        torch.testing.assert_close(total, ones)


@pytest.mark.parametrize("mode", POOL_MODES)
def test_pool_is_the_formula(backend: Backend, mode: str) -> None:
    """Ragged segments in a loop over slices of the tokens."""
    rng = generator(5)
    x, weight = torch.randn(7, 5, generator=rng), torch.rand(7, generator=rng) + 0.2
    offsets = torch.tensor([1, 3, 3, 7], dtype=torch.int32)
    weighted = mode in WEIGHTED
    y = backend.run("segment_pool", x, offsets, mode=mode, weight=weight if weighted else None)
    for s, (begin, end) in enumerate(((1, 3), (3, 3), (3, 7))):
        part, w = x[begin:end], weight[begin:end, None]
        if begin == end:
            assert (y[s] == 0).all()
            continue
        pivot = part[w[:, 0].argmax()]
        d = (part - pivot).square().sum(-1, keepdim=True)
        kernel = torch.exp(-d / (2 * (d.mean() + 1e-8)))
        expected = {
            "sum": (w * part).sum(0),
            "mean": (w * part).sum(0) / w.sum(),
            "sqrt": (w * part).sum(0) / (end - begin) ** 0.5,
            "amax": part.amax(0),
            "last": part[-1],
            "softmax": (w.softmax(0) * part).sum(0),
            "gaussian": (kernel * part).sum(0) / kernel.sum(),
        }[mode]
        torch.testing.assert_close(y[s], expected)


def test_pivot_is_the_middle_without_weights(backend: Backend) -> None:
    x = torch.tensor([[[0.0], [3.0], [4.0], [9.0]]])
    ids = torch.zeros(1, 4, dtype=torch.int32)
    how = {"ids": ids, "num_segments": 1, "mode": "gaussian", "x": x, "sigma": 1.0}
    weights = backend.run("segment_weights", **how)
    kernel = torch.exp(-0.5 * (x[..., 0] - 4).square())
    torch.testing.assert_close(weights, kernel / kernel.sum())


def test_heads_and_shared_offsets(kernels: Backend) -> None:
    """[B, H, N, D] with offsets for every head, and one list of offsets for all."""
    rng = generator(6)
    x = torch.randn(2, 3, 20, 8, generator=rng)
    cuts = torch.randint(0, 21, (2, 3, 5), generator=rng).sort(-1).values.int()
    y = kernels.run("segment_pool", x, cuts)
    assert y.shape == (2, 3, 4, 8)
    for b in range(2):
        for h in range(3):
            assert_bitwise_equal(kernels.run("segment_pool", x[b, h], cuts[b, h]), y[b, h])
    shared = kernels.run("segment_pool", x, cuts[0, 0])
    assert_bitwise_equal(shared[1, 2], kernels.run("segment_pool", x[1, 2], cuts[0, 0]))


def test_values_pool_with_the_weights_of_keys(kernels: Backend) -> None:
    rng = generator(7)
    keys, values = torch.randn(2, 20, 8, generator=rng), torch.randn(2, 20, 4, generator=rng)
    ids = torch.randint(0, 5, (2, 20), generator=rng, dtype=torch.int32)
    how = {"ids": ids, "num_segments": 5}
    weights = kernels.run("segment_weights", **how, mode="gaussian", x=keys)
    pooled = kernels.run("segment_pool", keys, **how, mode="gaussian")
    again = kernels.run("segment_pool", keys, **how, mode="sum", weight=weights)
    assert_bitwise_equal(again, pooled)
    member = ids[:, None] == torch.arange(5)[:, None]
    y = kernels.run("segment_pool", values, **how, mode="sum", weight=weights)
    torch.testing.assert_close(y, (member * weights[:, None]) @ values)


@pytest.mark.parametrize("mode", ["softmax", "gaussian"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_against_float64(kernels: Backend, mode: str, dtype: torch.dtype) -> None:
    inputs = Case(mode, dtype=dtype).inputs()
    if mode == "softmax":
        del inputs["x"]
    leaf = "x" if mode == "gaussian" else "weight"
    grad = torch.randn(2, 45, generator=generator(8))

    def gradient(function: Any, inputs: dict[str, Any], grad: Tensor) -> Tensor:
        at = inputs[leaf].detach().requires_grad_()
        (found,) = torch.autograd.grad(function(**(inputs | {leaf: at})), at, grad)
        return found.cpu()

    exact = gradient(reference.segment_weights, widened(inputs), grad.double())
    plain = gradient(reference.segment_weights, inputs, grad)
    if kernels.name == "simt":
        how = (inputs["ids"], 8, mode, inputs.get("weight"), inputs.get("x"), None)
        weights = torch.ops.tokred_simt.segment_weights(*how)
        actual = torch.ops.tokred_simt.segment_weights_backward(grad, weights, *how)
    else:
        there = dict(zip(inputs, move(list(inputs.values()), kernels.device), strict=True))
        actual = gradient(tokred.segment_weights, there, move(grad, kernels.device))
    slack = 8 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert_as_accurate(actual, exact, plain, slack, "gradient")


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(one_thread: None, mode: str, weighted: bool) -> None:
    weighted = mode == "softmax" or (weighted and mode in WEIGHTED)
    inputs = Case(mode, 2, 9, 3, 3, torch.float64, weight=weighted).inputs()
    names = ["x"] if not weighted or mode == "gaussian" else ["x", "weight"]
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *t: tokred.segment_pool(**(inputs | dict(zip(names, t, strict=True)))), leaves
    )


def test_gradcheck_of_gaussian_weights_of_given_width(one_thread: None) -> None:
    inputs = Case("gaussian", 2, 9, 3, 3, torch.float64, sigma=2.0).inputs()
    x = inputs.pop("x").requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tokred.segment_weights(x=t, **inputs), x)


def test_second_derivatives_are_refused() -> None:
    inputs = Case("softmax", 1, 6, 3, 2, torch.float64).inputs()
    del inputs["x"]
    weight = inputs.pop("weight").requires_grad_()
    weights = tokred.segment_weights(weight=weight, **inputs)
    (grad,) = torch.autograd.grad(weights.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="segment_weights has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", WEIGHT_MODES)
def test_batch_and_strides_do_not_matter(kernels: Backend, mode: str) -> None:
    inputs = Case(mode, 5, dtype=torch.bfloat16, weight=mode == "gaussian").inputs()
    if mode != "gaussian":
        del inputs["x"]
    whole = kernels.run("segment_weights", **inputs)
    one = {n: t[3:4] if isinstance(t, Tensor) else t for n, t in inputs.items()}
    assert_bitwise_equal(kernels.run("segment_weights", **one), whole[3:4], "alone")
    wide = {
        n: torch.cat([t, t], -1)[..., : t.shape[-1]] if isinstance(t, Tensor) else t
        for n, t in inputs.items()
    }
    if mode == "gaussian":
        wide["x"] = torch.cat([wide["x"], wide["x"]], -1)[..., 1:25]
        wide["x"] = wide["x"].copy_(inputs["x"])
    assert_bitwise_equal(kernels.run("segment_weights", **wide), whole, "views")


@pytest.mark.parametrize("mode", WEIGHT_MODES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_isa_and_threads_do_not_matter(on_every_cpu, mode: str, dtype: torch.dtype) -> None:
    inputs = Case(mode, 2, 150, 77, 40, dtype, weight=mode == "gaussian").inputs()
    if mode != "gaussian":
        del inputs["x"]
    leaf = {"softmax": "weight", "gaussian": "x"}.get(mode)

    def run() -> list[Tensor]:
        if leaf is None:
            return [tokred.segment_weights(**inputs)]
        at = inputs[leaf].detach().requires_grad_()
        weights = tokred.segment_weights(**(inputs | {leaf: at}))
        grad = torch.randn(weights.shape, generator=generator(1), dtype=weights.dtype)
        return [weights.detach(), *torch.autograd.grad(weights, at, grad)]

    assert_one_result(on_every_cpu(run))


def test_compiles_in_one_graph() -> None:
    x, offsets = torch.randn(2, 20, 8), torch.tensor([0, 3, 11, 20], dtype=torch.int32)
    for mode in ("mean", "gaussian", "sqrt"):
        compiled = torch.compile(
            lambda t, mode=mode: tokred.segment_pool(t, offsets, mode=mode),
            fullgraph=True, backend="eager",
        )  # fmt: skip
        torch.testing.assert_close(compiled(x), tokred.segment_pool(x, offsets, mode=mode))
