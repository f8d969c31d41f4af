"""linear_attention against its recurrence and the masked quadratic form, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
from cases.compare import assert_as_accurate, assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    tokens: int = 75
    head_dim: int = 16
    value_dim: int = 24
    dtype: torch.dtype = torch.float32
    decay: float = 0.1
    state: bool = True
    mask: str = ""
    scale: float = 0.5

    def inputs(self) -> tuple:
        rng = generator(5)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def heads(count: int, dim: int) -> Tensor:
            rows = torch.randn(self.batch, count, self.tokens, dim, generator=rng)
            return rows.to(self.dtype)

        q, k = heads(self.heads_q, self.head_dim), heads(self.heads_kv, self.head_dim)
        v = heads(self.heads_kv, self.value_dim)
        state = torch.randn(self.batch, self.heads_kv, self.head_dim, self.value_dim, generator=rng)
        decay = self.decay * torch.arange(1, self.heads_kv + 1)
        mask = None
        if self.mask == "random":
            mask = torch.rand(self.batch, self.tokens, generator=rng) < 0.6
        elif self.mask:
            mask = torch.full((1, self.tokens), self.mask == "all")
        decay, state = decay.to(wide), state.to(wide)
        return q, k, v, decay, state if self.state else None, self.scale, mask


CASES = [
    *(Case(dtype=dtype) for dtype in (*FLOATS, torch.float64)),
    *(Case(dtype=dtype, mask="random") for dtype in (*FLOATS, torch.float64)),
    *(Case(state=False, mask=mask) for mask in ("", "random", "all", "none")),
    *(Case(tokens=n, mask=mask) for n in (0, 1, 2, 32, 33, 64, 130) for mask in ("", "random")),
    *(Case(decay=decay) for decay in (0.0, 1e-6, 20.0, 1e30, torch.inf)),
    *(Case(heads_q=hq, heads_kv=hkv, tokens=n) for hq, hkv in ((1, 1), (3, 3), (9, 1))
      for n in (1, 40)),
    *(Case(head_dim=d, value_dim=dv, tokens=n) for d, dv in ((1, 1), (5, 100), (256, 256), (130, 7))
      for n in (1, 40)),
    Case(batch=0),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    out, state = backend.run("linear_attention", *inputs)
    exact, exact_state = reference.linear_attention(*widened(inputs))
    plain, plain_state = reference.linear_attention(*inputs)
    assert out.dtype == case.dtype and state.dtype == plain_state.dtype
    rounding = torch.finfo(case.dtype).eps if case.dtype in FLOATS[1:] else 0.0
    single = 1e-14 if case.dtype == torch.float64 else 1e-6
    for actual, wide, same, error in (
        (out, exact, plain, max(rounding, single)),
        (state, exact_state, plain_state, single),
    ):
        largest = wide.abs().max().item() if wide.numel() else 0
        assert_as_accurate(actual, wide, same, error * largest)


def quadratic(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> Tensor:
    """(q k^T * M) v, with M[i, j] = exp(-decay (i - j)) for j <= i, and what the state adds."""
    group, position = q.shape[1] // k.shape[1], torch.arange(q.shape[2])
    k, v, rate = (t.repeat_interleave(group, dim) for t, dim in ((k, 1), (v, 1), (decay, 0)))
    age = position[:, None] - position
    weight = (-rate[:, None, None] * age).exp().tril()
    out = (q @ k.mT * weight) @ v
    if state is not None:
        earlier = (-rate[:, None] * (position + 1)).exp()[..., None]
        out = out + earlier * (q @ state.repeat_interleave(group, 1))
    return out


@pytest.mark.parametrize("tokens", [1, 31, 300])
@pytest.mark.parametrize("with_state", [False, True])
def test_is_the_masked_quadratic_form(tokens: int, with_state: bool) -> None:
    case = Case(tokens=tokens, dtype=torch.float64, scale=1.0, state=with_state)
    q, k, v, decay, state, *_ = case.inputs()
    out, _ = tokred.linear_attention(q, k, v, decay, state)
    assert (out - quadratic(q, k, v, decay, state)).abs().max() < 1e-10


@pytest.mark.parametrize("first", [1, 31, 64, 96])
def test_a_sequence_in_pieces_is_the_whole(backend: Backend, first: int) -> None:
    """To rounding; where the pieces end with a chunk, bit by bit."""
    q, k, v, decay, state, scale, _ = Case(tokens=130).inputs()
    whole, last = backend.run("linear_attention", q, k, v, decay, state, scale)
    pieces, carried = [], state
    for begin, end in ((0, first), (first, 130)):
        rows = (t[:, :, begin:end] for t in (q, k, v))
        out, carried = backend.run("linear_attention", *rows, decay, carried, scale)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(carried, last, rtol=1e-4, atol=1e-4)
    if first % 32 == 0:
        assert_bitwise_equal((torch.cat(pieces, 2), carried), (whole, last))


def test_steps_are_the_sequence(backend: Backend) -> None:
    q, k, v, decay, state, scale, _ = Case(tokens=20, heads_q=10).inputs()
    whole, last = backend.run("linear_attention", q, k, v, decay, state, scale)
    for i in range(20):
        rows = (t[:, :, i : i + 1] for t in (q, k, v))
        out, state = backend.run("linear_attention", *rows, decay, state, scale)
        torch.testing.assert_close(out[:, :, 0], whole[:, :, i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(backend: Backend, side: str) -> None:
    """Whatever the padding holds, and on either side of a state."""
    q, k, v, decay, state, scale, _ = Case(tokens=40).inputs()
    expected, last = backend.run("linear_attention", q, k, v, decay, state, scale)
    padding = (0, 0, 9, 0) if side == "left" else (0, 0, 0, 9)
    q, k, v = (torch.nn.functional.pad(t, padding, value=torch.nan) for t in (q, k, v))
    here = slice(9, None) if side == "left" else slice(40)
    mask = torch.zeros(2, 49, dtype=torch.bool)
    mask[:, here] = True
    out, carried = backend.run("linear_attention", q, k, v, decay, state, scale, mask)
    torch.testing.assert_close(out[:, :, here], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(carried, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [3, 40])
def test_what_is_yet_to_come_is_not_seen(kernels: Backend, value: float, place: int) -> None:
    q, k, v, decay, state, scale, _ = Case(tokens=60).inputs()
    clean, _ = kernels.run("linear_attention", q, k, v, decay, state, scale)
    for spoiled in (k, v):
        spoiled[:, :, place] = value
        out, _ = kernels.run("linear_attention", q, k, v, decay, state, scale)
        assert_bitwise_equal(out[:, :, :place], clean[:, :, :place])
        assert not out[:, :, place].isfinite().any()
        spoiled[:, :, place] = 0


def test_a_row_is_the_same_alone_and_on_any_number_of_threads(kernels: Backend) -> None:
    case = Case(batch=3, value_dim=70, mask="random")
    q, k, v, decay, state, scale, mask = case.inputs()
    together = kernels.run("linear_attention", q, k, v, decay, state, scale, mask)
    alone = kernels.run(
        "linear_attention", q[1:2], k[1:2], v[1:2], decay, state[1:2], scale, mask[1:2]
    )
    assert_bitwise_equal(alone, [t[1:2] for t in together])
    torch.set_num_threads(16)
    many = kernels.run("linear_attention", q[:1, :2], k[:1, :1], v[:1, :1], decay[:1], state[:1, :1], scale, mask[:1])  # noqa: E501  # fmt: skip
    torch.set_num_threads(1)
    assert_bitwise_equal(many, (together[0][:1, :2], together[1][:1, :1]))


def gradients(backend: Backend, inputs: tuple, incoming: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The gradients of q, k, v and state."""
    q, k, v, decay, state, scale, mask = inputs
    if backend.name == "simt":
        arguments = (*incoming, q, k, v, decay, state, scale, mask)
        return list(torch.ops.tokred_simt.linear_attention_backward(*arguments))
    leaves = [move(t, backend.device).detach().requires_grad_() for t in (q, k, v, state)]
    decay, mask = move((decay, mask), backend.device)
    results = backend.function("linear_attention")(*leaves[:3], decay, leaves[3], scale, mask)
    grads = torch.autograd.grad(results, leaves, move(incoming, backend.device))
    return list(move(grads, "cpu"))


@pytest.mark.parametrize(
    "case",
    [
        *(Case(dtype=dtype, mask=mask) for dtype in (*FLOATS, torch.float64)
          for mask in ("", "random")),
        Case(heads_q=9, heads_kv=3, head_dim=5, value_dim=40), Case(tokens=1), Case(mask="none"),
        Case(head_dim=160, value_dim=20, tokens=40), Case(decay=0.0), Case(decay=torch.inf),
    ],
    ids=label,
)  # fmt: skip
def test_gradients_against_float64(backend: Backend, case: Case) -> None:
    inputs, rng = case.inputs(), generator(8)
    out, state = reference.linear_attention(*inputs)
    incoming = (
        torch.randn(out.shape, generator=rng).to(out.dtype),
        torch.randn(state.shape, generator=rng).to(state.dtype),
    )
    oracle = Backend("reference")
    wide = tuple(t.double() for t in incoming)
    exact = gradients(oracle, widened(inputs), wide)
    # The recurrence accumulates the gradients of half-precision inputs in float32 too.
    plain = gradients(oracle, inputs, incoming)
    for actual, expected, same in zip(
        gradients(backend, inputs, incoming), exact, plain, strict=True
    ):
        single = 1e-14 if case.dtype == torch.float64 else 2e-6
        rounding = torch.finfo(case.dtype).eps if case.dtype in FLOATS[1:] else 0.0
        slack = max(single, rounding) * expected.abs().max().item()
        assert_as_accurate(actual, expected, same, slack)


def test_the_decay_has_no_gradient() -> None:
    q, k, v, decay, *_ = Case().inputs()
    with pytest.raises(ValueError, match="gradients in q, k, v, state alone, but decay"):
        tokred.linear_attention(q, k, v, decay.requires_grad_())


def test_time_is_linear_in_the_tokens() -> None:
    """Four times the tokens have four times the flops."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(tokens: int) -> int:
        q, k, v, decay, *_ = Case(tokens=tokens).inputs()
        with FlopCounterMode(display=False) as counter:
            tokred.linear_attention(q, k, v, decay)
        return counter.get_total_flops()

    assert flops(512) == 4 * flops(128) > 0
