"""knn_reconstruct against the published formula in float64, and bit by bit against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import tokred
from cases.backends import Backend, move
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    tokens: int = 50
    clusters: int = 21
    channels: int = 24
    deep: int = 40
    k: int = 3
    dtype: torch.dtype = torch.float32
    temperature: float = 0.05
    norm: str = "l2"

    def inputs(self) -> dict[str, Any]:
        rng = generator(self.tokens + self.channels)
        deep = torch.randn(self.batch, self.clusters, self.deep, generator=rng)
        return {
            "deep": deep.to(self.dtype),
            "x": torch.randn(self.batch, self.tokens, self.channels, generator=rng).to(self.dtype),
            "centroids": torch.randn(self.batch, self.clusters, self.channels, generator=rng),
            "k": self.k,
            "temperature": self.temperature,
            "norm": self.norm,
        }


CASES = [
    *(replace(case, dtype=dtype) for dtype in FLOATS for case in (
        Case(), Case(1, 1, 1, 1, 1, 1), Case(1, 130, 100, 65, 17, 36), Case(k=64),
        Case(1, 60, 5, 9, 33, 7), Case(norm="l1", temperature=0.3),
    )),
    Case(temperature=0.0), Case(temperature=50.0), Case(tokens=0), Case(batch=0), Case(clusters=0),
    Case(channels=0), Case(deep=0), Case(1, 30, 70, 8, 8, 64, norm="l1"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    some = case.inputs()
    y = backend.run("knn_reconstruct", **some)
    assert y.dtype == case.dtype
    wide = dict(zip(some, widened(tuple(some.values())), strict=True))
    exact = reference.knn_reconstruct(**wide)
    plain = reference.knn_reconstruct(**some)
    assert_as_accurate(y, exact, plain, 1e-5 * (1 + case.temperature))


@pytest.mark.parametrize("k", [1, 3, 36])
def test_the_published_formula(backend: Backend, k: int) -> None:
    """Expediting ViT: exp(-t d^2) of those not below the k-th, normalised by F.normalize."""
    some = Case(k=k, clusters=50).inputs()
    deep, x, centroids = (some[name].double() for name in ("deep", "x", "centroids"))
    weight = (-0.05 * torch.cdist(x, centroids).square()).exp()
    kept = weight * (weight >= weight.topk(k, dim=-1).values[..., -1:])
    y = backend.run("knn_reconstruct", **some)
    torch.testing.assert_close(y.double(), normalize(kept, dim=2) @ deep, rtol=1e-4, atol=1e-5)
    mean = backend.run("knn_reconstruct", **some | {"norm": "l1"})
    torch.testing.assert_close(
        mean.double(), normalize(kept, p=1, dim=2) @ deep, rtol=1e-4, atol=1e-5
    )


def test_far_tokens_keep_weights(backend: Backend) -> None:
    """All of exp(-t d^2) vanish in float32; the nearest one's weight does not."""
    deep = torch.tensor([[[1.0], [2.0]]])
    centroids = torch.tensor([[[0.0], [100.0]]])
    y = backend.run("knn_reconstruct", deep, torch.tensor([[[-900.0], [950.0]]]), centroids, 2, 1.0)
    assert y.flatten().tolist() == [1.0, 2.0]


def test_equal_distances_take_the_lowest(backend: Backend) -> None:
    deep = torch.arange(40.0)[None, :, None]
    x, centroids = torch.zeros(1, 3, 4), torch.ones(1, 40, 4)
    centroids[0, 7] = 0.5
    y = backend.run("knn_reconstruct", deep, x, centroids, 3, 0.0, "l1")
    assert torch.allclose(y, torch.tensor((7.0 + 0 + 1) / 3))


def test_what_is_not_finite_is_no_neighbour(backend: Backend) -> None:
    deep = torch.tensor([[[1.0], [torch.nan], [torch.inf], [4.0]]])
    centroids = torch.tensor([[[5.0], [torch.nan], [torch.inf], [0.0]]])
    x = torch.tensor([[[1.0], [torch.nan], [torch.inf], [4.0]]])
    y = backend.run("knn_reconstruct", deep, x, centroids, 4, 0.0, "l1")
    assert y.flatten().tolist() == [2.5, 0, 0, 2.5]


def test_the_dtypes_of_deep_and_x_may_differ(kernels: Backend) -> None:
    some = Case().inputs()
    whole = kernels.run("knn_reconstruct", **some)
    for dtype in FLOATS:
        mixed = kernels.run("knn_reconstruct", **some | {"deep": some["deep"].to(dtype)})
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed.float(), whole, rtol=2e-2, atol=2e-2)


def test_views_equal_their_copies(kernels: Backend) -> None:
    rng = generator(1)
    deep = torch.randn(20, 2, 40, generator=rng).transpose(0, 1)[..., 3:33]
    x = torch.randn(2, 60, 16, generator=rng)[:, ::2]
    centroids = torch.randn(20, 2, 16, generator=rng).transpose(0, 1)
    views = kernels.run("knn_reconstruct", deep, x, centroids)
    copies = [t.contiguous() for t in (deep, x, centroids)]
    assert_bitwise_equal(views, kernels.run("knn_reconstruct", *copies))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype) -> None:
    some = Case(3, dtype=dtype).inputs()
    whole = kernels.run("knn_reconstruct", **some)
    for item in range(3):
        part = {n: t[item : item + 1] if isinstance(t, Tensor) else t for n, t in some.items()}
        assert_bitwise_equal(kernels.run("knn_reconstruct", **part), whole[item : item + 1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_isa_and_threads_do_not_matter(on_every_cpu, dtype: torch.dtype) -> None:
    some = Case(2, 130, 70, 33, 50, 9, dtype).inputs()
    assert_one_result(on_every_cpu(lambda: tokred.knn_reconstruct(**some)))


def gradient(backend: Backend, some: dict[str, Any], grad_y: Tensor) -> Tensor:
    """The gradient of deep."""
    if backend.name == "simt":
        weighs = (some[name] for name in ("x", "centroids", "k", "temperature", "norm"))
        return torch.ops.tokred_simt.knn_reconstruct_backward(grad_y, *weighs)
    moved = {name: move(value, backend.device) for name, value in some.items()}
    moved["deep"] = moved["deep"].detach().requires_grad_()
    y = backend.function("knn_reconstruct")(**moved)
    if not y.requires_grad:  # the oracle, without centroids
        return torch.zeros_like(some["deep"])
    return torch.autograd.grad(y, moved["deep"], move(grad_y, backend.device))[0].cpu()


def output_gradient(some: dict[str, Any]) -> Tensor:
    shape = (*some["x"].shape[:2], some["deep"].shape[2])
    return torch.randn(shape, generator=generator(3)).to(some["deep"].dtype)


GRADIENT_CASES = [
    *(replace(case, dtype=dtype) for dtype in FLOATS for case in (
        Case(), Case(1, 130, 100, 65, 17, 36), Case(1, 400, 3, 9, 70, 2, norm="l1"), Case(k=64),
    )),
    Case(1, 1, 1, 1, 1, 1), Case(temperature=50.0), Case(tokens=0), Case(batch=0),
    Case(clusters=0), Case(channels=0), Case(deep=0), Case(deep=1100), Case(tokens=900, clusters=2),
]  # fmt: skip


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=label)
def test_gradient_against_float64(kernels: Backend, case: Case) -> None:
    some = case.inputs()
    grad_y = output_gradient(some)
    found = gradient(kernels, some, grad_y)
    assert found.dtype == case.dtype and found.shape == some["deep"].shape
    oracle = Backend("reference")
    wide = dict(zip(some, widened(tuple(some.values())), strict=True))
    exact = gradient(oracle, wide, grad_y.double())
    plain = gradient(oracle, some, grad_y)
    assert_as_accurate(found, exact, plain, 2e-5 * (1 + case.temperature))


def test_a_centroid_without_tokens_has_no_gradient(kernels: Backend) -> None:
    deep, x = torch.ones(1, 3, 2), torch.zeros(1, 4, 1)
    centroids = torch.tensor([[[1.0], [torch.nan], [9.0]]])
    x[0, 3] = torch.inf  # no neighbours: what comes back to it goes nowhere
    grad_y = torch.tensor([[[1.0, 2], [3, 4], [5, 6], [torch.nan, torch.nan]]])
    some = {"deep": deep, "x": x, "centroids": centroids, "k": 1, "temperature": 1.0, "norm": "l1"}
    assert gradient(kernels, some, grad_y).tolist() == [[[9, 12], [0, 0], [0, 0]]]


def test_batch_and_strides_do_not_matter_to_the_gradient(kernels: Backend) -> None:
    some = Case(3, 130, 21, dtype=torch.bfloat16).inputs()
    grad_y = output_gradient(some)
    whole = gradient(kernels, some, grad_y)
    for item in range(3):
        part = {n: t[item : item + 1] if isinstance(t, Tensor) else t for n, t in some.items()}
        alone = gradient(kernels, part, grad_y[item : item + 1])
        assert_bitwise_equal(alone, whole[item : item + 1])
    padded = torch.zeros(130, 3, 50, dtype=torch.bfloat16).transpose(0, 1)
    padded[..., 3:43] = grad_y
    assert_bitwise_equal(gradient(kernels, some, padded[..., 3:43]), whole)
    if kernels.name != "simt":
        shared = grad_y[:1, :1, :1].expand_as(grad_y)
        again = gradient(kernels, some, shared.contiguous())
        assert_bitwise_equal(gradient(kernels, some, shared), again)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_isa_and_threads_do_not_matter_to_the_gradient(on_every_cpu, dtype: torch.dtype) -> None:
    some = Case(2, 130, 70, 33, 90, 9, dtype).inputs()
    grad_y = output_gradient(some)
    assert_one_result(on_every_cpu(lambda: gradient(Backend("cpu"), some, grad_y)))


@pytest.mark.parametrize("name", ["x", "centroids"])
def test_weights_are_constants(name: str) -> None:
    some = Case().inputs()
    some[name].requires_grad_()
    with pytest.raises(ValueError, match=f"gradients in deep alone, but {name} requires grad"):
        tokred.knn_reconstruct(**some)
    with torch.no_grad():
        tokred.knn_reconstruct(**some)
