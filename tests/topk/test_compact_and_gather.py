"""compact, gather_tokens and inverse_transform_sample against their plain torch references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator
from cases.oracle import reference


def random_mask(shape: tuple[int, ...], share: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) < share


# compact ------------------------------------------------------------------------------------------

SHAPES = [(0,), (1,), (70,), (3, 16), (2, 3, 129), (2, 2, 2, 31), (0, 9), (1, 20000)]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compact_of_a_mask(kernels: Backend, shape: tuple, share: float) -> None:
    mask = random_mask(shape, share)
    lengths = torch.randint(-2, shape[-1] + 3, shape[:-1], generator=generator(), dtype=torch.int32)
    for capacity in (None, 0, 5, shape[-1] + 20):
        for row_lengths in (None, lengths):
            args = (mask, None, capacity, row_lengths)
            assert_bitwise_equal(
                kernels.run("compact", *args), reference.compact(*args), f"capacity {capacity}"
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compact_by_threshold(kernels: Backend, shape: tuple, dtype: torch.dtype) -> None:
    scores = torch.randn(shape, generator=generator()).to(dtype)
    scores[..., ::7] = torch.nan
    scores[..., 1::7] = -0.0
    scores[..., 2::7] = torch.inf
    for threshold in (0.1, 0.0, -torch.inf, torch.inf):
        for capacity in (None, 9):
            args = (scores, threshold, capacity)
            assert_bitwise_equal(
                kernels.run("compact", *args), reference.compact(*args), f"{threshold}, {capacity}"
            )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compact_of_lists(kernels: Backend, shape: tuple) -> None:
    listed = torch.randint(-9, 30, shape, generator=generator(), dtype=torch.int32)
    listed[..., ::5] = torch.iinfo(torch.int32).min
    listed[..., 1::5] = torch.iinfo(torch.int32).max
    lengths = torch.randint(-2, shape[-1] + 3, shape[:-1], generator=generator(), dtype=torch.int32)
    for capacity in (None, 0, 5, shape[-1] + 20):
        for row_lengths in (None, lengths):
            args = (listed, None, capacity, row_lengths)
            assert_bitwise_equal(
                kernels.run("compact", *args), reference.compact(*args), f"capacity {capacity}"
            )


def test_compact_of_any_strides(kernels: Backend) -> None:
    mask = random_mask((4, 5, 60), 0.4)
    lengths = torch.tensor([[7], [60], [0], [33]], dtype=torch.int32)
    for args in (
        (mask.transpose(0, 1)[..., 2:57], None, None, lengths.t()),
        (mask[:, :1].expand(4, 6, 60), None, 11, lengths),
        (mask[::3, 1:, :50], None, 70, None),
        (mask.int()[::3, 1:, 3:50] - 1, None, 20, None),
    ):
        assert_bitwise_equal(kernels.run("compact", *args), reference.compact(*args))


def test_compact_definition(backend: Backend) -> None:
    indices, counts = backend.run("compact", torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]) > 0)
    assert indices.tolist() == [[1, 2, 4, -1, -1], [0, -1, -1, -1, -1]]
    assert counts.tolist() == [3, 1]
    assert indices.dtype == counts.dtype == torch.int32
    listed = torch.tensor([[7, -1, 0, -5, 7]], dtype=torch.int32)
    indices, counts = backend.run("compact", listed)
    assert indices.tolist() == [[7, 0, 7, -1, -1]] and counts.tolist() == [3]


# gather_tokens ------------------------------------------------------------------------------------

DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS, torch.float64)


def values_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=generator(seed)) * 50).to(dtype)


def indices_of(shape: tuple[int, ...], tokens: int) -> Tensor:
    """A few outside [0, tokens), some far."""
    indices = torch.randint(-2, tokens + 2, shape, generator=generator(3), dtype=torch.int32)
    indices[..., ::11] = torch.iinfo(torch.int32).min
    indices[..., 5::11] = torch.iinfo(torch.int32).max
    return indices


def gather(backend: Backend, tensors: list[Tensor], indices: Tensor, dims: list[int]) -> Any:
    return backend.run("gather_tokens", tensors, indices, dims)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_of_every_dtype(kernels: Backend, dtype: torch.dtype) -> None:
    tensors = [values_of((2, 19, *rest), dtype) for rest in ((), (1,), (7,), (64,), (3, 5))]
    indices = indices_of((2, 23), 19)
    actual = gather(kernels, tensors, indices, [1] * 5)
    assert_bitwise_equal(actual, reference.gather_tokens(tensors, indices, [1] * 5))


@pytest.mark.parametrize("with_heads", [False, True])
def test_gather_of_heads_and_hidden_states_together(kernels: Backend, with_heads: bool) -> None:
    keys, values = values_of((2, 3, 19, 32), torch.float16), values_of((2, 3, 19, 8), torch.float32)
    indices = indices_of((2, 3, 12) if with_heads else (2, 12), 19)
    tensors, dims = [keys, values], [2, 2]
    if not with_heads:
        tensors, dims = [*tensors, values_of((2, 19, 5), torch.float32)], [2, 2, 1]
    actual = gather(kernels, tensors, indices, dims)
    assert_bitwise_equal(actual, reference.gather_tokens(tensors, indices, dims))


@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_gather_of_nothing(kernels: Backend, sizes: tuple[int, int, int]) -> None:
    batch, tokens, count = sizes
    tensors = [
        values_of((batch, tokens, 6), torch.float32),
        values_of((batch, 2, tokens, 0), FLOATS[1]),
    ]
    indices = indices_of((batch, count), tokens)
    actual = gather(kernels, tensors, indices, [1, 2])
    assert_bitwise_equal(actual, reference.gather_tokens(tensors, indices, [1, 2]))


def test_gather_of_any_strides(kernels: Backend) -> None:
    base = values_of((3, 4, 21, 16), torch.float32)
    tensors = [
        base.transpose(1, 2)[:, :, 1].unsqueeze(1).expand(3, 4, 21, 16),
        base[:, :, ::2].transpose(0, 1)[:3, :1].expand(3, 4, 11, 16),
        base[:1].expand(3, 4, 21, 16),
    ]
    indices = indices_of((3, 4, 30), 21)[:, :, ::1]
    actual = gather(kernels, tensors, indices, [2] * 3)
    assert_bitwise_equal(actual, reference.gather_tokens(tensors, indices, [2] * 3))
    broadcast = indices[:1, :1].expand(3, 4, 30)
    actual = gather(kernels, tensors, broadcast, [2] * 3)
    assert_bitwise_equal(actual, reference.gather_tokens(tensors, broadcast, [2] * 3))


def test_gather_chooses_the_token_dimension() -> None:
    for shape, dim in (((2, 9), 1), ((2, 9, 4), 1), ((2, 3, 9, 4), 2), ((2, 3, 9, 4, 2), 2)):
        tensor, indices = values_of(shape, torch.float32), indices_of((2, 5), 9)
        expected = reference.gather_tokens([tensor], indices, [dim])
        assert_bitwise_equal(tokred.gather_tokens([tensor], indices), expected)
        assert_bitwise_equal(reference.gather_tokens([tensor], indices), expected)


def test_gather_of_large_tensors(on_every_cpu) -> None:
    """Large enough to be written past the cache; odd rows fall back."""
    tensors = [values_of((1, 3000, 1200), torch.float32), values_of((1, 3000, 77), torch.bfloat16)]
    indices = indices_of((1, 6000), 3000)
    expected = reference.gather_tokens(tensors, indices)
    for name, actual in on_every_cpu(lambda: tokred.gather_tokens(tensors, indices)).items():
        assert_bitwise_equal(actual, expected, name)


# inverse_transform_sample -------------------------------------------------------------------------

SAMPLED = ("softmax", "ties", "constant", "zeros", "one", "special", "wide", "huge")


def make_weights(shape: tuple[int, ...], distribution: str) -> Tensor:
    rng = generator(1)
    x = torch.randn(shape, generator=rng)
    if distribution == "ties":
        return torch.randint(0, 4, shape, generator=rng).float()
    if distribution == "constant":
        return torch.full(shape, 0.25)
    if distribution == "zeros":
        return torch.zeros(shape)
    if distribution == "one":
        x = torch.zeros(shape)
        x[..., shape[-1] // 2 :][..., :1] = 3.0
        return x
    if distribution == "special":
        kind = torch.randint(0, 8, shape, generator=rng)
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-42, -3.0])
        return torch.where(kind < 7, special[kind.clamp(max=6)], x)
    if distribution == "wide":
        return (10 * x).exp()
    if distribution == "huge":
        return x.abs() * 1e38
    return x.softmax(-1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("distribution", SAMPLED)
def test_sample(kernels: Backend, distribution: str, dtype: torch.dtype) -> None:
    for shape in ((197,), (3, 64), (2, 1, 2, 33), (2, 1), (0, 4), (2, 0)):
        scores = make_weights(shape, distribution).to(dtype)
        for mask in (None, random_mask(shape, 0.6), random_mask(shape, 0.02)):
            for num_samples in (0, 1, 2, 40, 300):
                args = (scores, num_samples, mask)
                assert_bitwise_equal(
                    kernels.run("inverse_transform_sample", *args),
                    reference.inverse_transform_sample(*args),
                    f"{shape}, {num_samples} samples",
                )


def test_sample_of_a_long_row(kernels: Backend) -> None:
    scores = make_weights((1, 3000), "softmax")
    args = (scores, 500)
    assert_bitwise_equal(
        kernels.run("inverse_transform_sample", *args), reference.inverse_transform_sample(*args)
    )


def test_sample_of_any_strides(kernels: Backend) -> None:
    scores = make_weights((4, 5, 60), "softmax")
    mask = random_mask((1, 5, 60), 0.5)
    for args in (
        (scores.transpose(0, 1)[..., 2:57], 20, mask.transpose(0, 1)[..., 2:57]),
        (scores[:, :1].expand(4, 5, 60), 70, mask),
    ):
        assert_bitwise_equal(
            kernels.run("inverse_transform_sample", *args),
            reference.inverse_transform_sample(*args),
        )


def test_sample_definition(backend: Backend) -> None:
    """Ascending 1, 2, 3, 4: sums 1, 3, 6, 10, normalised 0, 2/9, 5/9, 1.

    Three samples lie at 2/9, 11/18 and 1: the second is nearest to 5/9.
    """
    indices, counts = backend.run(
        "inverse_transform_sample", torch.tensor([[0.4, 0.1, 0.3, 0.2]]), 3
    )
    assert indices.tolist() == [[3, 2, 0]]
    assert counts.tolist() == [3]
    assert indices.dtype == counts.dtype == torch.int32


def test_sample_on_every_cpu(on_every_cpu) -> None:
    scores = make_weights((37, 197), "softmax")
    expected = reference.inverse_transform_sample(scores, 100)
    results = on_every_cpu(lambda: tokred.inverse_transform_sample(scores, 100))
    for name, actual in results.items():
        assert_bitwise_equal(actual, expected, name)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_gathers_complex_numbers_and_empty_channels(dtype: torch.dtype) -> None:
    parts = torch.randn(2, 5, 3, 2, generator=generator()).double()
    tokens = torch.view_as_complex(parts).to(dtype)
    indices = torch.tensor([[4, 0], [-1, 2]], dtype=torch.int32)
    chosen, empty = tokred.gather_tokens([tokens, tokens[..., :0]], indices)
    assert torch.equal(chosen[0], tokens[0, [4, 0]]) and torch.equal(chosen[1, 1], tokens[1, 2])
    assert not chosen[1, 0].any() and empty.shape == (2, 2, 0)
