"""Inputs of the attention ops, and how their results and gradients are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result, flat
from cases.inputs import FLOATS, generator, widened
from cases.oracle import reference

# Where key_bias stands among the arguments of an op, and where out and lse come between them in
# those of its backward op.
KEY_BIAS = {"biased_attention": 3, "sparse_attention": 5, "block_sparse_attention": 8}
RESULTS = {"biased_attention": 4, "sparse_attention": 4, "block_sparse_attention": 6}
FORWARD = {"biased_attention": 9}  # arguments that the backward op takes, positions included
ROTATION = {"sparse_attention": (9, 10)}  # which it does not take


# ---- Inputs -------------------------------------------------------------------------------------


def random_qkv(case: Any, rng: torch.Generator, magnitude: float = 1.0) -> list[Tensor]:
    """q, scaled by the magnitude, k and v."""
    shapes = (
        (case.batch, case.heads_q, case.queries, case.head_dim),
        (case.batch, case.heads_kv, case.keys, case.head_dim),
        (case.batch, case.heads_kv, case.keys, case.value_dim),
    )
    q, k, v = (torch.randn(shape, generator=rng) for shape in shapes)
    return [t.to(case.dtype) for t in (q * magnitude, k, v)]


def random_bias(
    case: Any, rng: torch.Generator, shared: bool = False, hidden: int | None = None
) -> Tensor:
    """A key_bias, by key head or for all, that hides every so many keys."""
    heads = (1, 1) if shared else (case.batch, case.heads_kv)
    bias = torch.randn(*heads, case.keys, generator=rng)
    if hidden:
        bias[..., ::hidden] = -torch.inf
    return bias.to(torch.promote_types(case.dtype, torch.float32))


def random_mask(case: Any, rng: torch.Generator, share: float) -> Tensor | None:
    """The mask that the case names, with so large a share of True."""
    shapes = {
        "keys": (case.batch, 1, 1, case.keys),
        "padding": (case.batch, 1, 1, case.keys),
        "heads": (1, case.heads_q, 1, case.keys),
        "pairs": (1, 1, case.queries, case.keys),
        "full": (case.batch, case.heads_q, case.queries, case.keys),
    }
    if case.mask == "none":
        return None
    return torch.rand(shapes[case.mask], generator=rng) < share


# ---- Against float64 ----------------------------------------------------------------------------


def in_half_precision(inputs: tuple) -> Tensor:
    """Plain torch as tensor cores do it: float32 logits, probabilities rounded before the PV."""
    q, k, v = inputs[:3]
    eye = torch.eye(k.shape[2], dtype=torch.float32).expand(*v.shape[:2], -1, -1)
    weights, _ = reference.biased_attention(q.float(), k.float(), eye, *inputs[3:])
    group = q.shape[1] // k.shape[1]
    rounded = weights.to(v.dtype).float() @ v.float().repeat_interleave(group, 1)
    return rounded.to(v.dtype)


def assert_close_to_exact(
    results: tuple, exact: tuple, plain: tuple, largest_value: float = 0.0
) -> None:
    """out and lse are as accurate as plain torch.

    A logit's rounding error moves the weights by as much, relatively; tensor cores round them.
    """
    (out, lse), (exact_out, exact_lse), (plain_out, plain_lse) = results, exact, plain
    assert out.dtype == plain_out.dtype and lse.dtype == plain_lse.dtype
    largest = exact_lse.nan_to_num(0, 0, 0).abs().max().item() if lse.numel() else 0
    slack = 8 * torch.finfo(lse.dtype).eps * (1 + largest)
    assert_as_accurate(lse, exact_lse, plain_lse, slack, "lse")
    slack = (torch.finfo(out.dtype).eps + slack) * (1 + largest_value)
    assert_as_accurate(out, exact_out, plain_out, slack, "out")


def random_grads(inputs: tuple, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse."""
    q, _, v, *_ = inputs
    rng = generator(seed)
    grad_out = torch.randn(*q.shape[:3], v.shape[3], generator=rng)
    grad_lse = torch.randn(q.shape[:3], generator=rng)
    return grad_out.to(q.dtype), grad_lse.to(torch.promote_types(q.dtype, torch.float32))


def gradients(
    backend: Backend, op: str, inputs: tuple, grad_out: Tensor, grad_lse: Tensor
) -> list[Tensor]:
    """The gradients of q, k, v and, where there is one, key_bias."""
    inputs, bias = list(inputs), inputs[KEY_BIAS[op]]
    if backend.name == "simt":
        ops, middle = torch.ops.tokred_simt, RESULTS[op]
        results = getattr(ops, op)(*inputs)
        missing = [None] * (FORWARD.get(op, 0) - len(inputs))
        rest = [t for i, t in enumerate(inputs) if i >= middle and i not in ROTATION.get(op, ())]
        arguments = (*inputs[:middle], *results, *rest, *missing)
        *grads, grad_bias = getattr(ops, f"{op}_backward")(grad_out, grad_lse, *arguments)
        return grads if bias is None else [*grads, grad_bias.sum_to_size(bias.shape)]
    arguments = move(inputs, backend.device)
    places = [0, 1, 2] if bias is None else [0, 1, 2, KEY_BIAS[op]]
    for place in places:
        arguments[place] = arguments[place].detach().requires_grad_()
    results = backend.function(op)(*arguments)
    leaves = [arguments[place] for place in places]
    grads = torch.autograd.grad(results, leaves, move([grad_out, grad_lse], backend.device))
    return [g.cpu() for g in grads]


def assert_gradients_are_accurate(
    kernels: Backend, op: str, inputs: tuple, magnitude: float = 1.0
) -> None:
    """As accurate as those of plain torch, for queries of that magnitude."""
    grad_out, grad_lse = random_grads(inputs, seed=6)
    oracle = Backend("reference")
    exact = gradients(oracle, op, widened(inputs), grad_out.double(), grad_lse.double())
    plain = gradients(oracle, op, inputs, grad_out, grad_lse)
    actual = gradients(kernels, op, inputs, grad_out, grad_lse)
    dtype = inputs[0].dtype
    for name, a, e, p in zip(("q", "k", "v", "key_bias"), actual, exact, plain, strict=False):
        assert a.shape == e.shape and a.dtype == p.dtype
        # Half precision also rounds out, which delta reads, and on GPUs p and ds; float32 goes
        # through tensor cores in pieces there.
        unit = torch.finfo(dtype).eps * (2 if dtype in FLOATS[1:] else 8)
        slack = unit * (1 + magnitude) * e.abs().max().item() if e.numel() else 0
        assert_as_accurate(a, e, p, slack, f"gradient of {name}")


def gradcheck(op: str, inputs: tuple) -> bool:
    """gradcheck of q, k, v and a key_bias that hides nothing."""
    place = KEY_BIAS[op]
    bias = inputs[place]
    leaves = list(inputs[:3])
    if bias is not None and not bias.isinf().any():
        leaves.append(bias)

    def function(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = bias) -> tuple:
        rest = (*inputs[3:place], key_bias, *inputs[place + 1 :])
        out, lse = getattr(tokred, op)(q, k, v, *rest)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    return torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves])


# ---- The same bits ------------------------------------------------------------------------------


def assert_batch_does_not_matter(kernels: Backend, op: str, inputs: tuple) -> None:
    """Results and gradients of a batch of four: again, permuted, and those of an item alone."""
    grad_out, grad_lse = random_grads(inputs)

    def run(index: slice | Tensor) -> list[Tensor]:
        part = tuple(t[index] if isinstance(t, Tensor) else t for t in inputs)
        outputs = flat(kernels.run(op, *part))
        return outputs + gradients(kernels, op, part, grad_out[index], grad_lse[index])

    whole = run(slice(None))
    assert_bitwise_equal(run(slice(None)), whole, "again")
    order = torch.randperm(4, generator=generator())
    assert_bitwise_equal(run(order), [t[order] for t in whole], "permuted")
    one = slice(2, 3)
    assert_bitwise_equal(run(one), [t[one] for t in whole], "alone")


def assert_same_on_every_cpu(on_every_cpu: Callable, op: str, inputs: tuple) -> None:
    """Results and gradients, bit for bit, on every instruction set and number of threads."""
    grads = random_grads(inputs)

    def run() -> list[Tensor]:
        return [*getattr(tokred, op)(*inputs), *gradients(Backend("cpu"), op, inputs, *grads)]

    assert_one_result(on_every_cpu(run))
