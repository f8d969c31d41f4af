"""forest_roots and forest_merge against their oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, widened
from cases.oracle import reference


def forest(batch: int, tokens: int, seed: int = 0, roots: float = 0.2) -> Tensor:
    """Trees whose tokens stand in any order; roots are -1, or any number outside [0, N)."""
    rng = generator(seed)
    order = torch.rand(batch, tokens, generator=rng).argsort(-1)
    above = (torch.rand(batch, tokens, generator=rng) * torch.arange(tokens)).long()
    is_root = torch.rand(batch, tokens, generator=rng) < roots
    is_root[:, :1] = True
    parent = order.gather(1, above).masked_fill(is_root, -1)
    parent = torch.where(is_root & (above % 3 == 1), tokens + above, parent)
    return torch.empty_like(order).scatter_(1, order, parent).int()


def chain(tokens: int) -> Tensor:
    return (torch.arange(tokens, dtype=torch.int32) - 1)[None]


SHAPES = [(2, 40), (1, 1), (3, 7), (0, 4), (2, 0), (1, 1500)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_roots(backend: Backend, shape: tuple[int, int]) -> None:
    parent = forest(*shape)
    root, children = backend.run("forest_roots", parent)
    assert root.dtype == children.dtype == torch.int32
    for b, row in enumerate(parent.tolist()):
        for i in range(len(row)):
            at = i
            while 0 <= row[at] < len(row):
                at = row[at]
            assert root[b, i] == at
            assert children[b, i] == row.count(i)


@pytest.mark.parametrize("tokens", [2, 3, 511, 512, 513, 1025])
def test_the_longest_chain(backend: Backend, tokens: int) -> None:
    root, children = backend.run("forest_roots", chain(tokens))
    assert (root == 0).all() and children.tolist() == [[1] * (tokens - 1) + [0]]
    root, _ = backend.run("forest_roots", chain(tokens) + 2)
    assert (root == tokens - 1).all()


CYCLES = {
    "itself": ([-1, 1, 0], [1]),
    "pair": ([1, 0, -1, 0, 2], [0, 1, 3]),
    "ring": ([1, 2, 3, 4, 0, -1, 5], [0, 1, 2, 3, 4]),
    "led into": ([3, 0, 1, 4, 5, 3, -1], [0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("name", CYCLES)
def test_cycles(backend: Backend, name: str) -> None:
    """An error on the CPU, and dropped tokens on devices."""
    row, lost = CYCLES[name]
    parent = torch.tensor([[-1] * len(row), row], dtype=torch.int32)
    if backend.name.startswith("cpu"):
        with pytest.raises(RuntimeError, match=f"in item 1 token {lost[0]} leads into a cycle"):
            backend.run("forest_roots", parent)
        return
    root, _ = backend.run("forest_roots", parent)
    assert (root[1] == -1).nonzero()[:, 0].tolist() == lost and (root[0] >= 0).all()
    y, size, _ = backend.run("forest_merge", torch.ones(2, len(row), 3), parent)
    assert size[1].sum() == len(row) - len(lost) and (y[1, lost] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("how", ["counts", "sizes", "reference_compat"])
def test_merge_against_float64(backend: Backend, how: str, dtype: torch.dtype) -> None:
    rng = generator(4)
    x = torch.randn(2, 40, 24, generator=rng).to(dtype)
    size = torch.randint(1, 5, (2, 40), generator=rng).float() if how == "sizes" else None
    inputs = (x, forest(2, 40), size, how == "reference_compat")
    y, merged, root = backend.run("forest_merge", *inputs)
    exact, exact_size, exact_root = reference.forest_merge(*widened(inputs))
    plain = reference.forest_merge(*inputs)[0]
    slack = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    assert_as_accurate(y, exact, plain, slack, "y")
    assert torch.equal(merged.double(), exact_size) and torch.equal(root, exact_root)
    is_root = root == torch.arange(40)
    assert (y[~is_root] == 0).all() and (merged[~is_root] == 0).all()
    assert (merged[is_root] >= 1).all()


def test_counts_are_true_and_those_of_the_published_code_are_not(backend: Backend) -> None:
    """A chain of the magnitudes 1, 2, 4: its mean is 7 / 3, and FlashVID's code makes it 7 / 2."""
    x = torch.tensor([[[1.0], [2.0], [4.0]]])
    y, size, root = backend.run("forest_merge", x, chain(3))
    assert y[0, 0].item() == pytest.approx(7 / 3) and size.tolist() == [[3, 0, 0]]
    assert root.tolist() == [[0, 0, 0]]
    y, size, _ = backend.run("forest_merge", x, chain(3), reference_compat=True)
    assert y[0, 0].item() == pytest.approx(3.5) and size.tolist() == [[2, 0, 0]]


def test_unmerge_takes_the_roots(kernels: Backend) -> None:
    x, parent = torch.randn(2, 30, 8, generator=generator(1)), forest(2, 30)
    y, _, root = kernels.run("forest_merge", x, parent)
    assert_bitwise_equal(kernels.run("unmerge", y, root), reference.unmerge(y, root))


@pytest.mark.parametrize("compat", [False, True])
def test_gradcheck(one_thread: None, compat: bool) -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64, generator=generator(2)).requires_grad_()
    size = (torch.rand(2, 9, dtype=torch.float64, generator=generator(3)) + 1).requires_grad_()
    parent = forest(2, 9)
    if compat:
        assert torch.autograd.gradcheck(lambda t: tokred.forest_merge(t, parent, None, True)[0], x)
    else:
        assert torch.autograd.gradcheck(
            lambda t, s: tokred.forest_merge(t, parent, s)[:2], [x, size]
        )


def test_batch_and_strides_do_not_matter(kernels: Backend) -> None:
    parent = forest(4, 60)
    whole = kernels.run("forest_roots", parent)
    assert_bitwise_equal(kernels.run("forest_roots", parent[2:3]), [t[2:3] for t in whole])
    strided = torch.stack([parent.t(), parent.t()], -1)[..., 0].t()
    assert strided.stride() != parent.stride()
    assert_bitwise_equal(kernels.run("forest_roots", strided), whole)


def test_isa_and_threads_do_not_matter(on_every_cpu: Any) -> None:
    x, parent = torch.randn(3, 200, 40, generator=generator(1)), forest(3, 200)
    assert_one_result(on_every_cpu(lambda: list(tokred.forest_merge(x, parent))))
