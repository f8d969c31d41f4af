"""merge, unmerge and compose against their oracle, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result, flat
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference

MODES = ("sum", "mean", "plain_mean", "amax", "amin", "prune", "maxnorm", "halving")
EXTREMES = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    mode: str = "mean"
    batch: int = 2
    tokens: int = 45
    channels: int = 24
    num_out: int = 20
    dtype: torch.dtype = torch.float32
    size: bool = False
    weight: bool = False
    garbage: bool = False
    integers: bool = False
    special: str = ""

    def inputs(self) -> tuple:
        rng = generator(3)
        shape = (self.batch, self.tokens)
        x = torch.randn(*shape, self.channels, generator=rng)
        token_map = torch.randint(0, max(self.num_out, 1), shape, generator=rng, dtype=torch.int32)
        if self.garbage:
            high = self.num_out + 3
            token_map = torch.randint(-3, high, shape, generator=rng, dtype=torch.int32)
            token_map[:, 1], token_map[:, -1] = EXTREMES.min, EXTREMES.max
        size = torch.randint(1, 6, shape, generator=rng).float()
        weight = torch.rand(shape, generator=rng) + 0.1
        if self.integers:
            x, weight = (8 * x).round(), (4 * weight).round()
        if self.special == "zero size":
            size[:, ::2] = 0
        elif self.special:
            x[:, 4::7, ::2] = float(self.special)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (
            x.to(self.dtype),
            token_map,
            self.num_out,
            size.to(wide) if self.size else None,
            weight.to(wide) if self.weight else None,
            self.mode,
        )


TABLES = [(False, False), (True, False), (False, True), (True, True)]
CASES = [
    *(
        Case(mode, size=s, weight=w, dtype=dtype)
        for mode in MODES
        for s, w in TABLES
        for dtype in FLOATS
    ),
    *(Case(mode, size=True, weight=True, dtype=torch.float64) for mode in MODES),
    *(Case(mode, garbage=True, size=True) for mode in MODES),
    *(Case(mode, num_out=n, garbage=True, weight=True) for mode in MODES for n in (0, 1, 100)),
    *(Case(mode, size=True, special="zero size") for mode in MODES),
    *(Case(mode, special=value) for mode in MODES for value in ("nan", "inf", "-inf")),
    *(
        Case("mean", batch, tokens, channels, num_out, size=True)
        for batch, tokens, channels, num_out in (
            (0, 5, 4, 3),
            (2, 0, 4, 3),
            (2, 5, 0, 3),
            (1, 1, 1, 1),
            (3, 7, 1, 2),
            (1, 3, 769, 2),
            (2, 300, 17, 1),
            (2, 3000, 9, 2100),
        )
    ),
    *(
        Case(mode, 3, 197, 192, 181, dtype, size=True)
        for mode in ("mean", "maxnorm")
        for dtype in FLOATS
    ),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    y, size = backend.run("merge", *inputs)
    exact_y, exact_size = reference.merge(*widened(inputs))
    plain_y, plain_size = reference.merge(*inputs)
    assert y.dtype == case.dtype and size.dtype == plain_size.dtype
    slack = (
        torch.finfo(case.dtype).eps * exact_y.nan_to_num(0, 0, 0).abs().max().item()
        if y.numel()
        else 0
    )
    assert_as_accurate(y, exact_y, plain_y, slack, "y")
    assert_as_accurate(size, exact_size, plain_size, 0, "size")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["sum", "amax", "amin", "prune"])
def test_integers_are_exact(backend: Backend, mode: str, dtype: torch.dtype) -> None:
    case = Case(mode, size=True, weight=mode == "prune", garbage=True, integers=True, dtype=dtype)
    inputs = case.inputs()
    expected = reference.merge(*widened(inputs))
    for result, exact in zip(backend.run("merge", *inputs), expected, strict=True):
        assert torch.equal(result.double(), exact)


def test_prune_keeps_the_heaviest_and_the_first_of_several(backend: Backend) -> None:
    x = torch.arange(6.0).reshape(1, 6, 1)
    token_map = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    nan = torch.nan
    for weights, expected in (
        ([1, 3, 2, 5, 5, 4], [1, 3]),
        ([nan, -1, nan, nan, nan, nan], [1, 3]),
        ([-2, -1, -3, 0, nan, 1], [1, 5]),
    ):
        weight = torch.tensor([weights], dtype=torch.float32)
        y, _ = backend.run("merge", x, token_map, 2, None, weight, "prune")
        assert y.flatten().tolist() == expected
    y, _ = backend.run("merge", x, token_map, 2, mode="prune")
    assert y.flatten().tolist() == [0, 3]


def test_halving_is_the_fold_in_order_of_position(backend: Backend) -> None:
    """HoliTom: h <- (h + x_i) / 2 for every dropped token i, h being the token that stays."""
    rng = generator(4)
    x, weight = torch.randn(1, 12, 5, generator=rng), torch.zeros(1, 12)
    token_map = torch.tensor([[0, 1, 0, 0, -1, 1, 0, 2, 0, 9, 1, 0]], dtype=torch.int32)
    kept = {0: 3, 1: 1, 2: 7}
    weight[0, list(kept.values())] = 1
    y, size = backend.run("merge", x, token_map, 4, None, weight, "halving")
    for slot, keeper in kept.items():
        h = x[0, keeper]
        for i in range(12):
            if token_map[0, i] == slot and i != keeper:
                h = (h + x[0, i]) / 2
        torch.testing.assert_close(y[0, slot], h)
    assert (y[0, 3] == 0).all() and size.tolist() == [[6, 3, 1, 0]]
    first, _ = backend.run("merge", x, token_map, 4, mode="halving")
    torch.testing.assert_close(first[0, 1], ((x[0, 1] + x[0, 5]) / 2 + x[0, 10]) / 2)


def test_a_discard_slot_is_dropped_by_all_three(backend: Backend) -> None:
    """EMS merges what resembles no centre into a class that is thrown away: entry -1."""
    x, token_map, *_ = Case(num_out=6).inputs()
    zero_class = torch.where(token_map == 5, -1, token_map)
    kept, size = backend.run("merge", x, zero_class, 5)
    y, all_sizes = backend.run("merge", x, token_map, 6)
    assert_bitwise_equal((kept, size), (y[:, :5], all_sizes[:, :5]))
    dropped = (zero_class == -1).nonzero()
    back = backend.run("unmerge", kept, zero_class)
    assert len(dropped) and (back[dropped[:, 0], dropped[:, 1]] == 0).all()
    second = torch.tensor([[0, -1, 1, 0, 2]], dtype=torch.int32).expand(2, 5)
    both = backend.run("compose", second, zero_class)
    assert ((both == -1) == ((zero_class == -1) | (zero_class == 1))).all()
    sums, _ = backend.run("merge", x, zero_class, 5, mode="sum")
    twice, _ = backend.run("merge", sums, second, 3, mode="sum")
    once, _ = backend.run("merge", x, both, 3, mode="sum")
    torch.testing.assert_close(twice, once)


def test_equals_gather_and_scatter_reduce(backend: Backend) -> None:
    """ToMe's weighted average: gather both sides, scatter the products, divide, concatenate."""
    rng = generator(9)
    x, size = torch.randn(2, 40, 16, generator=rng), torch.rand(2, 40, 1, generator=rng) + 1
    edges = torch.stack([torch.randperm(20, generator=rng) for _ in range(2)])
    gone, kept = edges[:, :8, None], edges[:, 8:, None]
    target = torch.randint(0, 20, (2, 8, 1), generator=rng)

    def apply(values: Tensor) -> Tensor:
        width = values.shape[2]
        source, destination = values[:, ::2], values[:, 1::2]
        moved = source.gather(1, gone.expand(-1, -1, width))
        index = target.expand(-1, -1, width)
        stayed = source.gather(1, kept.expand(-1, -1, width))
        return torch.cat([stayed, destination.scatter_reduce(1, index, moved, "sum")], 1)

    token_map = torch.empty(2, 40, dtype=torch.int32)
    token_map[:, 1::2] = torch.arange(12, 32)
    token_map.scatter_(1, 2 * kept[..., 0], torch.arange(12).int().expand(2, 12))
    token_map.scatter_(1, 2 * gone[..., 0], 12 + target[..., 0].int())
    y, merged = backend.run("merge", x, token_map, 32, size[..., 0])
    expected_size = apply(size)
    torch.testing.assert_close(merged, expected_size[..., 0])
    torch.testing.assert_close(y, apply(x * size) / expected_size)


@pytest.mark.parametrize("mode", MODES)
def test_views_equal_their_copies(kernels: Backend, mode: str) -> None:
    rng = generator(2)
    x = torch.randn(21, 2, 40, generator=rng).transpose(0, 1)[..., 5:24]
    token_map = torch.randint(0, 9, (2, 42), generator=rng, dtype=torch.int32)[:, ::2]
    size = torch.rand(1, 21, generator=rng).expand(2, 21)
    weight = torch.rand(21, 2, generator=rng).t()
    views = (x, token_map, 9, size, weight, mode)
    copies = [t.contiguous() if isinstance(t, Tensor) else t for t in views]
    assert_bitwise_equal(kernels.run("merge", *views), kernels.run("merge", *copies))
    assert_bitwise_equal(
        kernels.run("unmerge", x, token_map), kernels.run("unmerge", x.contiguous(), token_map)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_out_buffers_get_the_same_bits(kernels: Backend, mode: str, dtype: torch.dtype) -> None:
    x, token_map, num_out, size, weight, _ = Case(
        mode, size=True, garbage=True, dtype=dtype
    ).inputs()
    inputs = move((x, token_map, num_out, size, weight, mode), kernels.device)
    y, merged = kernels.function("merge")(*inputs)
    out = y.new_full((2, num_out, 2 * y.shape[2]), torch.nan)[..., : y.shape[2]]
    out_size = merged.new_full((num_out, 2), torch.nan).t()
    if kernels.name == "simt":
        torch.ops.tokred_simt.merge_out(x, token_map, size, weight, mode, out, out_size)
    else:
        returned = tokred.merge(*inputs, out=out, out_size=out_size)
        assert returned[0] is out and returned[1] is out_size
    assert_bitwise_equal((out.cpu(), out_size.cpu()), (y.cpu(), merged.cpu()))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_unmerge_and_compose_are_gathers(backend: Backend, dtype: torch.dtype) -> None:
    x, first, num_out, *_ = Case(garbage=True, dtype=dtype).inputs()
    second = Case(garbage=True, tokens=num_out, num_out=11).inputs()[1]
    y = x[:, :num_out]
    assert_bitwise_equal(backend.run("unmerge", y, first), reference.unmerge(y, first))
    both = backend.run("compose", second, first)
    assert_bitwise_equal(both, reference.compose(second, first))
    inside = (first >= 0) & (first < num_out)
    assert (both[~inside] == -1).all()


def test_compose_is_two_merges(backend: Backend) -> None:
    x, first, *_ = Case(num_out=20).inputs()
    second = Case(tokens=20, num_out=7).inputs()[1]
    step, step_size = backend.run("merge", x, first, 20, mode="sum")
    twice, twice_size = backend.run("merge", step, second, 7, step_size, mode="sum")
    once, once_size = backend.run("merge", x, backend.run("compose", second, first), 7, mode="sum")
    torch.testing.assert_close(twice, once)
    assert torch.equal(twice_size, once_size)


def gradients(backend: Backend, inputs: tuple, grad_y: Tensor, grad_size: Tensor) -> list[Tensor]:
    """The gradients of x, size and weight, which must all be given."""
    x, token_map, num_out, size, weight, mode = inputs
    if backend.name == "simt":
        args = (grad_y, grad_size, x, token_map, size, weight, mode)
        return list(torch.ops.tokred_simt.merge_backward(*args))
    leaves = [move(t, backend.device).detach().requires_grad_() for t in (x, size, weight)]
    results = backend.function("merge")(
        leaves[0], move(token_map, backend.device), num_out, leaves[1], leaves[2], mode
    )
    grads = torch.autograd.grad(
        results, leaves, move([grad_y, grad_size], backend.device), allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if g is None else g.cpu()
        for g, leaf in zip(grads, leaves, strict=True)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_tokens_alone(kernels: Backend, mode: str) -> None:
    """The same bits where those of sizes and weights are not wanted, and then not computed."""
    inputs = Case(mode, size=True, weight=True, garbage=True).inputs()
    rng = generator(8)
    grad_y, grad_size = torch.randn(2, 20, 24, generator=rng), torch.randn(2, 20, generator=rng)
    x, token_map, num_out, size, weight, _ = inputs
    if kernels.name == "simt":
        args = (grad_y, grad_size, x, token_map, size, weight, mode, True)
        alone, *others = torch.ops.tokred_simt.merge_backward(*args)
        assert not any(other.any() for other in others)
    else:
        leaf, *rest = move([x, token_map, size, weight], kernels.device)
        leaf.requires_grad_()
        y, _ = kernels.function("merge")(leaf, rest[0], num_out, rest[1], rest[2], mode)
        alone = torch.autograd.grad(y, leaf, move(grad_y, kernels.device))[0].cpu()
    assert_bitwise_equal(alone, gradients(kernels, inputs, grad_y, grad_size)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_against_float64(kernels: Backend, mode: str, dtype: torch.dtype) -> None:
    inputs = Case(mode, size=True, weight=True, garbage=True, dtype=dtype).inputs()
    rng = generator(8)
    grad_y = torch.randn(2, 20, 24, generator=rng).to(dtype)
    grad_size = torch.randn(2, 20, generator=rng)
    oracle = Backend("reference")
    exact = gradients(oracle, widened(inputs), grad_y.double(), grad_size.double())
    plain = gradients(oracle, inputs, grad_y, grad_size)
    actual = gradients(kernels, inputs, grad_y, grad_size)
    for name, a, e, p in zip(("x", "size", "weight"), actual, exact, plain, strict=True):
        assert a.dtype == (dtype if name == "x" else torch.float32)
        slack = 4 * torch.finfo(a.dtype).eps * e.abs().max().item()
        assert_as_accurate(a, e, p, slack, f"gradient of {name}")


@pytest.mark.parametrize("mode", ["amax", "amin"])
def test_ties_share_a_gradient(kernels: Backend, mode: str) -> None:
    x = torch.tensor([[[1.0, 2.0], [1.0, 3.0], [1.0, 2.0], [4.0, 4.0]]])
    token_map = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32)
    ones = torch.ones(1, 4)
    grad_y = torch.tensor([[[3.0, 6.0], [1.0, 1.0]]])
    grad_x, *_ = gradients(kernels, (x, token_map, 2, ones, ones, mode), grad_y, torch.zeros(1, 2))
    second = [0, 6, 0, 1] if mode == "amax" else [3, 0, 3, 1]
    assert grad_x[0, :, 0].tolist() == [1, 1, 1, 1] and grad_x[0, :, 1].tolist() == second


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(one_thread: None, mode: str) -> None:
    inputs = Case(mode, 1, 9, 3, 4, torch.float64, True, True, garbage=True).inputs()
    leaves = [inputs[i].requires_grad_() for i in (0, 3, 4)]

    def function(x: Tensor, size: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return tokred.merge(x, inputs[1], 4, size, weight, mode)

    assert torch.autograd.gradcheck(function, leaves)


def test_gradcheck_unmerge(one_thread: None) -> None:
    x, token_map, *_ = Case(
        garbage=True, tokens=9, num_out=4, channels=3, dtype=torch.float64
    ).inputs()
    y = x[:, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tokred.unmerge(t, token_map), y)


def test_only_what_requires_grad_gets_one() -> None:
    x, token_map, num_out, size, weight, _ = Case(size=True, weight=True).inputs()
    y, merged = tokred.merge(x.requires_grad_(), token_map, num_out, size, weight)
    assert y.requires_grad and not merged.requires_grad
    y.sum().backward()  # an expanded gradient, with stride 0 everywhere
    assert x.grad is not None and size.grad is None and weight.grad is None
    y, merged = tokred.merge(x.detach(), token_map, num_out, size.requires_grad_(), weight)
    assert y.requires_grad and merged.requires_grad
    with torch.no_grad():
        assert not tokred.merge(x, token_map, num_out, size)[0].requires_grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_batch_does_not_matter(kernels: Backend, mode: str, dtype: torch.dtype) -> None:
    inputs = Case(mode, 8, size=True, weight=True, garbage=True, dtype=dtype).inputs()
    grads = torch.randn(8, 20, 24, generator=generator()).to(dtype), torch.randn(8, 20)

    def run(index: slice | Tensor) -> list[Tensor]:
        part = tuple(t[index] if isinstance(t, Tensor) else t for t in inputs)
        outputs = flat(kernels.run("merge", *part))
        return outputs + gradients(kernels, part, *(g[index] for g in grads))

    whole = run(slice(None))
    assert_bitwise_equal(run(slice(None)), whole, "again")
    order = torch.randperm(8, generator=generator())
    assert_bitwise_equal(run(order), [t[order] for t in whole], "permuted")
    one = slice(3, 4)
    assert_bitwise_equal(run(one), [t[one] for t in whole], "alone")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_isa_and_threads_do_not_matter(on_every_cpu, mode: str, dtype: torch.dtype) -> None:
    case = Case(mode, 2, 150, 77, 60, dtype, size=True, weight=True, garbage=True)
    inputs = case.inputs()
    grads = torch.randn(2, 60, 77, dtype=dtype), torch.randn(2, 60).to(inputs[3].dtype)
    function = Backend("cpu")
    results = on_every_cpu(lambda: [*tokred.merge(*inputs), *gradients(function, inputs, *grads)])
    assert_one_result(results)
