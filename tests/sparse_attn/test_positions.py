"""biased_attention where positions say who sees whom: draft trees, iterations, scattered keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator
from cases.oracle import reference

INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)


def randoms(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q with two heads a key head, k and v."""
    rng = generator(3)
    shapes = ((2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 24))
    return tuple(torch.randn(shape, generator=rng).to(dtype) for shape in shapes)


def table(rng: torch.Generator, batch: int, tokens: int, columns: int) -> Tensor:
    return torch.randint(0, 40, (batch, tokens, columns), generator=rng, dtype=torch.int32)


def as_mask(query_position: Tensor, key_position: Tensor) -> Tensor:
    """The mask that says the same: [B | 1, 1, L, N]."""
    return (key_position[:, None] <= query_position[:, :, None]).all(-1)[:, None]


def random_tree(nodes: int) -> tuple[Tensor, Tensor]:
    """Its (entry, -exit) table [nodes, 2], and which nodes are ancestors or self [nodes, nodes]."""
    rng = generator(8)
    parents = [-1] + [int(torch.randint(0, i, (), generator=rng)) for i in range(1, nodes)]
    ancestors = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        ancestors[node] |= ancestors[parents[node]]
    numbers = torch.zeros(nodes, 2, dtype=torch.int32)
    clock = 0

    def visit(node: int) -> None:
        nonlocal clock
        clock += 1
        numbers[node, 0] = clock
        for child in range(node + 1, nodes):
            if parents[child] == node:
                visit(child)
        clock += 1
        numbers[node, 1] = -clock

    visit(0)
    return numbers, ancestors


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 0, "atol": 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tree_attention(backend: Backend, dtype: torch.dtype) -> None:
    """Tokens of a draft tree behind a prefix that all of them see."""
    prefix, nodes = 50, 37
    numbers, ancestors = random_tree(nodes)
    q, k, v = randoms(nodes, prefix + nodes, dtype)
    keys = torch.cat((torch.full((prefix, 2), INT32_MIN, dtype=torch.int32), numbers))
    mask = torch.cat((torch.ones(nodes, prefix, dtype=torch.bool), ancestors), 1)
    arguments = (None, False, None, None, numbers[None], keys[None])
    out, lse = backend.run("biased_attention", q, k, v, *arguments)
    wide = (t.double() for t in (q, k, v))
    exact, exact_lse = reference.biased_attention(*wide, mask=mask[None, None])
    torch.testing.assert_close(out.double(), exact, **tolerance(dtype))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries, keys", [(1, 40), (19, 150), (90, 90), (5, 0), (0, 5)])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_against_a_mask(
    backend: Backend, queries: int, keys: int, columns: int, shared: bool
) -> None:
    """As (position, iteration) of scattered tokens, beside the causal rule and a mask."""
    rng = generator(5)
    q, k, v = randoms(queries, keys)
    query_position = table(rng, 1 if shared else 2, queries, columns)
    key_position = table(rng, 2, keys, columns)
    visible = as_mask(query_position, key_position)
    padding = torch.rand(2, 1, 1, keys, generator=rng) < 0.8
    for causal, mask in ((False, None), (True, padding)):
        arguments = (None, causal, None, mask, query_position, key_position)
        out, lse = backend.run("biased_attention", q, k, v, *arguments)
        wide = (t.double() for t in (q, k, v))
        both = visible if mask is None else visible & mask
        exact, exact_lse = reference.biased_attention(*wide, None, causal, None, both)
        torch.testing.assert_close(out.double(), exact, **tolerance(q.dtype))
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries, keys", [(70, 133), (133, 70)])
def test_one_column_is_causal(kernels: Backend, queries: int, keys: int) -> None:
    """Equal to the last bit in order; out of order, the same rows."""
    q, k, v = randoms(queries, keys)
    query_position = (torch.arange(queries) + keys - queries).int()[None, :, None]
    key_position = torch.arange(keys).int()[None, :, None]
    causal = kernels.run("biased_attention", q, k, v, None, True)
    arguments = (None, False, None, None)
    in_order = kernels.run("biased_attention", q, k, v, *arguments, query_position, key_position)
    assert_bitwise_equal(in_order, causal)
    rng = generator(9)
    rows, columns = (torch.randperm(n, generator=rng) for n in (queries, keys))
    shuffled = kernels.run(
        "biased_attention",
        q[:, :, rows],
        k[:, :, columns],
        v[:, :, columns],
        *arguments,
        query_position[:, rows],
        key_position[:, columns],
    )
    for a, b in zip(shuffled, causal, strict=True):
        torch.testing.assert_close(a, b[:, :, rows], rtol=0, atol=2e-5)


def test_sentinels(backend: Backend) -> None:
    """The largest query position sees all keys, the lowest only those of the lowest."""
    q, k, v = randoms(3, 33)
    key_position = torch.randint(INT32_MIN, INT32_MAX, (1, 33, 1), generator=generator()).int()
    key_position[0, 3:6, 0] = INT32_MIN
    key_position[0, 7, 0] = INT32_MAX
    query_position = torch.tensor([INT32_MAX, INT32_MIN, 0], dtype=torch.int32)[None, :, None]
    arguments = (None, False, None, None, query_position, key_position)
    out, lse = backend.run("biased_attention", q, k, v, *arguments)
    dense, dense_lse = reference.biased_attention(q[:, :, :1], k, v)
    torch.testing.assert_close(out[:, :, :1], dense, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse[:, :, :1], dense_lse)
    few = [t[:, :, 3:6] for t in (k, v)]
    lowest, lowest_lse = reference.biased_attention(q[:, :, 1:2], *few)
    torch.testing.assert_close(out[:, :, 1:2], lowest, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse[:, :, 1:2], lowest_lse)
    hidden = torch.full_like(query_position, INT32_MIN)
    key_position.clamp_(min=INT32_MIN + 1)
    arguments = (None, False, None, None, hidden, key_position)
    out, lse = backend.run("biased_attention", q, k, v, *arguments)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_views_equal_their_copies(kernels: Backend) -> None:
    q, k, v = randoms(20, 70)
    rng = generator(5)
    query_position = table(rng, 40, 2, 3).transpose(0, 1)[:, ::2, :2]
    key_position = table(rng, 1, 70, 4)[..., 1:3].expand(2, -1, -1)
    arguments = (None, False, None, None)
    first = kernels.run("biased_attention", q, k, v, *arguments, query_position, key_position)
    copies = query_position.contiguous(), key_position.contiguous()
    assert_bitwise_equal(first, kernels.run("biased_attention", q, k, v, *arguments, *copies))


def gradients(backend: Backend, inputs: tuple, positions: tuple, grads: tuple) -> list[Tensor]:
    if backend.name == "simt":
        options = (False, None, None)
        results = torch.ops.tokred_simt.biased_attention(*inputs, None, *options, *positions)
        return torch.ops.tokred_simt.biased_attention_backward(
            *grads, *inputs, None, *results, *options, *positions
        )[:3]
    leaves = [move(t, backend.device).detach().requires_grad_() for t in inputs]
    rest = (None, False, None, None, *move(positions, backend.device))
    results = backend.function("biased_attention")(*leaves, *rest)
    return [g.cpu() for g in torch.autograd.grad(results, leaves, move(grads, backend.device))]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(kernels: Backend, columns: int, dtype: torch.dtype) -> None:
    rng = generator(5)
    inputs = randoms(33, 70, dtype)
    positions = table(rng, 1, 33, columns), table(rng, 2, 70, columns)
    grads = torch.randn(2, 4, 33, 24, generator=rng).to(dtype), torch.randn(2, 4, 33, generator=rng)
    actual = gradients(kernels, inputs, positions, grads)
    wide = tuple(t.double() for t in inputs)
    exact = gradients(Backend("reference"), wide, positions, tuple(g.double() for g in grads))
    for a, e in zip(actual, exact, strict=True):
        slack = torch.finfo(dtype).eps * e.abs().max() * (16 if dtype == torch.float32 else 6)
        torch.testing.assert_close(a.double(), e, rtol=0, atol=slack.item())


def test_gradcheck(one_thread: None) -> None:
    rng = generator(5)
    q, k, v = (t.double()[:1, :, :, :4].requires_grad_() for t in randoms(5, 7))
    positions = table(rng, 1, 5, 2) + 20, table(rng, 1, 7, 2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        out, lse = tokred.biased_attention(q, k, v, None, False, None, None, *positions)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_isa_and_threads_do_not_matter(on_every_cpu, dtype: torch.dtype) -> None:
    rng = generator(5)
    inputs = randoms(170, 133, dtype)
    positions = table(rng, 1, 170, 2), table(rng, 2, 133, 2)
    arguments = (None, False, None, None, *positions)
    out, lse = tokred.biased_attention(*inputs, *arguments)
    grads = torch.randn_like(out), torch.randn_like(lse)

    def run() -> list[Tensor]:
        results = tokred.biased_attention(*inputs, *arguments)
        return [*results, *gradients(Backend("cpu"), inputs, positions, grads)]

    assert_one_result(on_every_cpu(run))


def test_position_errors() -> None:
    q, k, v = randoms(3, 5)
    rng = generator()
    good = table(rng, 1, 3, 1), table(rng, 1, 5, 1)
    bad = [
        (good[0], None),
        (good[0], table(rng, 1, 5, 2)),
        (table(rng, 1, 4, 1), good[1]),
        (good[0].short(), good[1]),
        (table(rng, 3, 3, 1), good[1]),
        (table(rng, 1, 3, 3), table(rng, 1, 5, 3)),
    ]
    for query_position, key_position in bad:
        with pytest.raises(RuntimeError, match="position"):
            tokred.biased_attention(
                q, k, v, query_position=query_position, key_position=key_position
            )
