"""Tokens from the features of their nearest centroids: wrapper, fake kernel and flop count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..placements import sharded
from ..registration import call, differentiable, once_differentiable

_ops = torch.ops.tokred


def knn_reconstruct(
    deep: Tensor,
    x: Tensor,
    centroids: Tensor,
    k: int = 3,
    temperature: float = 0.05,
    norm: str = "l2",
) -> Tensor:
    """Gives every token a weighted sum of what its nearest centroids have become.

    Token reconstruction of Expediting ViT (arXiv:2210.01035): x and centroids are those of the time
    of clustering, deep the centroids after the layers in between. A token weighs its k nearest
    centroids (the lowest of equals) by exp(-temperature |x - c|^2). The release scales the weights
    by the root of the sum of their squares ("l2"), so they sum to more than 1; "l1" is their mean.
    The release also keeps centroids as far as the k-th; here they are always k. Weights are scaled
    from the nearest one, so they never all vanish. Tokens by centroids never exist in memory.

    Args:
        deep: [B, M, D] float32, float16 or bfloat16, channels contiguous.
        x: [B, N, C] float32, float16 or bfloat16, channels contiguous.
        centroids: float32 [B, M, C], as `local_soft_kmeans` returns them.
        k: between 1 and 64; more than M are M.
        temperature: at least 0.
        norm: "l2" or "l1".

    Returns:
        [B, N, D] of the dtype of deep. A centroid at a distance that is not finite is no neighbour;
        a token without neighbours is 0. Differentiable in deep, once: weights are constants, and
        the gradient of a centroid sums those of its tokens in order, without N x M in memory.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: x or centroids requires grad while gradients are recorded.

    Complexity: 3 B N M C + 2 B N k D flops, and as many for the gradient, which finds the
    neighbours again; it keeps 16 B N k bytes of them.
    """
    return call(_ops.knn_reconstruct.default, deep, x, centroids, k, temperature, norm)


@torch.library.register_fake("tokred::knn_reconstruct")
def _knn_reconstruct_fake(
    deep: Tensor,
    x: Tensor,
    centroids: Tensor,
    k: int = 3,
    temperature: float = 0.05,
    norm: str = "l2",
) -> Tensor:
    torch._check(deep.dim() == 3, lambda: f"deep must be [B, M, D], got {deep.dim()}-D")
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {x.dim()}-D")
    return deep.new_empty((x.shape[0], x.shape[1], deep.shape[2]))


@torch.library.register_fake("tokred::knn_reconstruct_backward")
def _knn_reconstruct_backward_fake(
    grad_y: Tensor, x: Tensor, centroids: Tensor, k: int, temperature: float, norm: str
) -> Tensor:
    return grad_y.new_empty((grad_y.shape[0], centroids.shape[1], grad_y.shape[2]))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, x, centroids, *ctx.options = inputs
    ctx.save_for_backward(x, centroids)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.clone(memory_format=torch.contiguous_format)
    grad_deep = call(
        _ops.knn_reconstruct_backward.default, grad_y, *ctx.saved_tensors, *ctx.options
    )
    return grad_deep, None, None, None, None, None


differentiable("knn_reconstruct", ("deep",), _backward, _setup)
once_differentiable("knn_reconstruct_backward", "knn_reconstruct")
sharded("knn_reconstruct", "deep bmd, x bnc, centroids bmc -> bnd")
sharded("knn_reconstruct_backward", "grad_y bnd, x bnc, centroids bmc -> bmd")


@register_flop_formula(_ops.knn_reconstruct)
def _knn_reconstruct_flops(
    deep: Any, x: Any, centroids: Any, k: Any = 3, *args: Any, **kwargs: Any
) -> int:
    batch, tokens, channels = x
    return batch * tokens * (3 * deep[1] * channels + 2 * min(k, deep[1]) * deep[2])


@register_flop_formula(_ops.knn_reconstruct_backward)
def _knn_reconstruct_backward_flops(
    grad_y: Any, x: Any, centroids: Any, k: Any, *args: Any, **kwargs: Any
) -> int:
    return _knn_reconstruct_flops((x[0], centroids[1], grad_y[2]), x, centroids, k)
