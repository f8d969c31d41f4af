"""ema_scan against its oracle, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    tokens: int = 45
    channels: int = 24
    dtype: torch.dtype = torch.float32
    state: bool = False
    lengths: bool = False
    rate: str = "any"

    def inputs(self) -> tuple:
        rng = generator(3)
        c = torch.randn(self.batch, self.tokens, self.channels, generator=rng)
        p = torch.rand(self.batch, self.tokens, generator=rng)
        if self.rate == "ends":
            p = p.round()
        elif self.rate == "small":
            p = p / 100
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        state = torch.randn(self.batch, self.channels, generator=rng).to(wide)
        lengths = torch.randint(-1, self.tokens + 2, (self.batch,), generator=rng)
        lengths[:1] = 0
        return (c.to(self.dtype), p.to(wide), state if self.state else None,
                lengths.int() if self.lengths else None)  # fmt: skip


CASES = [
    *(Case(dtype=dtype, state=s, lengths=n) for dtype in FLOATS for s in (False, True)
      for n in (False, True)),
    Case(dtype=torch.float64, state=True, lengths=True),
    *(Case(rate=rate, state=True) for rate in ("ends", "small")),
    *(Case(batch, tokens, channels, state=True, lengths=True)
      for batch, tokens, channels in (
          (0, 5, 4), (2, 0, 4), (2, 5, 0), (1, 1, 1), (3, 33, 300), (2, 16, 31), (2, 512, 33))),
    Case(2, 1100, 7, rate="small", state=True),
    Case(2, 1100, 7, rate="small", state=True, lengths=True),
]  # fmt: skip


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    z, state = backend.run("ema_scan", *inputs)
    exact, exact_state = reference.ema_scan(*widened(inputs))
    plain, plain_state = reference.ema_scan(*inputs)
    assert z.dtype == case.dtype and state.dtype == inputs[1].dtype
    slack = 4 * torch.finfo(case.dtype).eps * largest(exact)
    assert_as_accurate(z, exact, plain, slack, "z")
    slack = 8 * torch.finfo(state.dtype).eps * largest(exact_state)
    assert_as_accurate(state, exact_state, plain_state, slack, "state")
    if case.lengths:
        for b, length in enumerate(inputs[3].clamp_min(0).tolist()):
            assert (z[b, length:] == 0).all()


def test_zero_keeps_and_one_replaces(backend: Backend) -> None:
    c = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    z, state = backend.run("ema_scan", c, torch.tensor([[1.0, 0.0, 1.0, 0.5]]))
    assert z.flatten().tolist() == [1, 1, 4, 6] and state.tolist() == [[6]]


def test_two_calls_are_one(kernels: Backend) -> None:
    """The state passes from one part of the tokens to the next, as in decoding."""
    c, p, state, _ = Case(2, 80, 40, state=True).inputs()
    z, last = kernels.run("ema_scan", c, p, state)
    first, between = kernels.run("ema_scan", c[:, :31], p[:, :31], state)
    second, end = kernels.run("ema_scan", c[:, 31:], p[:, 31:], between)
    torch.testing.assert_close(torch.cat([first, second], 1), z)
    torch.testing.assert_close(end, last)


def test_chunks_are_given_back_to_the_tokens(kernels: Backend) -> None:
    """H-Net's dechunk: smooth the chunks, give each token that of the boundary before it."""
    rng = generator(7)
    boundary = torch.rand(1, 30, generator=rng) < 0.3
    boundary[:, 0] = True
    number = boundary.cumsum(1).int() - 1
    chunks = int(boundary.sum())
    c, p = torch.randn(1, chunks, 8, generator=rng), torch.rand(1, chunks, generator=rng)
    z, _ = kernels.run("ema_scan", c, p)
    tokens = kernels.run("unmerge", z, number)
    at = torch.zeros(8)
    for i in range(30):
        if boundary[0, i]:
            share = p[0, number[0, i]]
            at = (1 - share) * at + share * c[0, number[0, i]]
        torch.testing.assert_close(tokens[0, i], at)


def gradients(backend: Backend, inputs: tuple, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The gradients of c, p and state."""
    c, p, state, lengths = inputs
    if backend.name == "simt":
        z, _ = torch.ops.tokred_simt.ema_scan(*inputs)
        return list(torch.ops.tokred_simt.ema_scan_backward(*grads, c, p, state, lengths, z))
    leaves = [move(t, backend.device).detach().requires_grad_() for t in (c, p, state)]
    out = backend.function("ema_scan")(*leaves, move(lengths, backend.device))
    found = torch.autograd.grad(out, leaves, move(list(grads), backend.device), allow_unused=True)
    return [
        torch.zeros_like(leaf).cpu() if g is None else g.cpu()
        for g, leaf in zip(found, leaves, strict=True)
    ]


GRADIENT_CASES = [
    *(Case(2, 45, 40, dtype, True, True) for dtype in FLOATS),
    Case(2, 1100, 7, state=True, rate="small"),
    Case(1, 1, 1, state=True),
    Case(2, 5, 0, state=True),
    Case(2, 20, 300, state=True, lengths=True),
]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=label)
def test_gradients_against_float64(kernels: Backend, case: Case) -> None:
    inputs = case.inputs()
    rng = generator(8)
    grads = (torch.randn(inputs[0].shape, generator=rng).to(case.dtype),
             torch.randn(inputs[2].shape, generator=rng))  # fmt: skip
    oracle = Backend("reference")
    exact = gradients(oracle, widened(inputs), tuple(g.double() for g in grads))
    plain = gradients(oracle, inputs, grads)
    actual = gradients(kernels, inputs, grads)
    for name, a, e, q in zip(("c", "p", "state"), actual, exact, plain, strict=True):
        # The gradient of p sees z as it was rounded.
        eps = torch.finfo(case.dtype if name == "p" else a.dtype).eps
        assert a.dtype == (case.dtype if name == "c" else torch.float32)
        assert_as_accurate(a, e, q, 8 * eps * largest(e), f"gradient of {name}")


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_gradcheck(one_thread: None, state: bool, lengths: bool) -> None:
    c, p, before, count = Case(3, 6, 4, torch.float64, state, lengths).inputs()
    leaves = [t.requires_grad_() for t in (c, p, before) if t is not None]
    assert torch.autograd.gradcheck(lambda c, p, s=None: tokred.ema_scan(c, p, s, count), leaves)


def test_without_tokens_the_gradient_passes_to_the_state(kernels: Backend) -> None:
    inputs = Case(2, 0, 5, state=True).inputs()
    grads = torch.zeros(2, 0, 5), torch.randn(2, 5, generator=generator(1))
    grad_c, grad_p, grad_state = gradients(kernels, inputs, grads)
    assert grad_c.shape == (2, 0, 5) and grad_p.shape == (2, 0)
    assert torch.equal(grad_state, grads[1])


def test_second_derivatives_are_refused() -> None:
    c, p, *_ = Case(1, 4, 3, torch.float64).inputs()
    z, _ = tokred.ema_scan(c.requires_grad_(), p)
    (grad,) = torch.autograd.grad(z.square().sum(), c, create_graph=True)
    with pytest.raises(RuntimeError, match="ema_scan has no second derivative"):
        grad.sum().backward()


def test_expanded_gradients() -> None:
    c, p, *_ = Case().inputs()
    tokred.ema_scan(c.requires_grad_(), p)[0].sum().backward()
    assert c.grad is not None and c.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_and_strides_do_not_matter(kernels: Backend, dtype: torch.dtype) -> None:
    c, p, state, lengths = inputs = Case(5, 70, 40, dtype, True, True).inputs()
    grads = torch.randn(c.shape, generator=generator(1)).to(dtype), torch.randn(state.shape)

    def run(inputs: tuple, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [*kernels.run("ema_scan", *inputs), *gradients(kernels, inputs, grads)]

    whole = run(inputs, grads)
    one = run(tuple(t[3:4] for t in inputs), tuple(g[3:4] for g in grads))
    assert_bitwise_equal(one, [t[3:4] for t in whole], "alone")
    odd = torch.empty(70, 5, 43, dtype=dtype).transpose(0, 1)[..., 3:]
    views = (odd.copy_(c), p.t().contiguous().t(), torch.cat([state, state], 1)[:, :40], lengths)
    assert_bitwise_equal(run(views, grads), whole, "views")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_isa_and_threads_do_not_matter(on_every_cpu: Any, dtype: torch.dtype) -> None:
    inputs = Case(3, 50, 600, dtype, True, True).inputs()
    grads = torch.randn(inputs[0].shape, dtype=dtype), torch.randn(3, 600).to(inputs[1].dtype)
    results = on_every_cpu(
        lambda: [*tokred.ema_scan(*inputs), *gradients(Backend("cpu"), inputs, grads)]
    )
    assert_one_result(results)
