"""CLCA: carriers of every layer's tokens are kept, and come back where tokens have been dropped.

Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition (arXiv
2501.00243).

It goes with any reducer, layer by layer:

    for number, layer in enumerate(layers):
        x = layer(x)                                    # drops tokens in some layers
        if number in recovery:
            x, num_pool = recover(x, cached)
            cached = []
        if number < recovery[-1]:
            cached.append(carriers(x, num_registers, num_pool))

The registers, and the head that reads the class tokens of several layers, are trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._lists import check_minimum
from ._method import Family, Method, Needs


def carriers(
    x: Tensor, num_registers: int = 0, num_pool: int | None = None, with_class: bool = False
) -> Tensor:
    """What a layer leaves for later ones: the mean of its tokens, then its registers.

    Args:
        x: [B, N, C], what the layer gives: the class token, the others, the registers at the end.
        num_registers: of the last tokens.
        num_pool: the mean is that of the first num_pool tokens, N - num_registers where None;
            later on as many as there were when carriers last came back.
        with_class: the mean counts the class token too.

    Returns:
        [B, 1 + num_registers, C]; differentiable. The mean of no token is 0.

    Raises:
        ValueError: more tokens to pool, or registers, than there are.
    """
    tokens = x.shape[1]
    num_pool = tokens - num_registers if num_pool is None else num_pool
    check_minimum(0, num_registers=num_registers, num_pool=num_pool)
    if max(num_pool, num_registers) > tokens:
        raise ValueError(
            f"num_pool and num_registers must be at most {tokens}, the number of tokens, got "
            f"{num_pool} and {num_registers}"
        )
    pooled = x[:, 0 if with_class else 1 : num_pool]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = pooled.sum(1, keepdim=True, dtype=wide) / max(pooled.shape[1], 1)
    return torch.cat([mean.to(x.dtype), x[:, tokens - num_registers :]], 1)


def recover(x: Tensor, cached: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The tokens of a recovery layer with all carriers behind them.

    Args:
        x: [B, N, C]. cached: the carriers of the layers since the last recovery, earliest first.

    Returns:
        ([B, N + all carriers, C], N, the num_pool of the carriers from here on).
    """
    return torch.cat([x, *cached], 1), x.shape[1]


def recovery_layers(reduction: Sequence[int], num_layers: int, at_last: bool = False) -> list[int]:
    """The layers behind which carriers come back: the reducing ones, and the last but one if asked.

    Raises:
        ValueError: a layer that the model does not have.
    """
    wrong = [layer for layer in reduction if not 0 <= layer < num_layers]
    if wrong:
        raise ValueError(f"reduction must list layers from 0 to {num_layers - 1}, got {wrong[0]}")
    return sorted({*reduction, *([max(num_layers - 2, 0)] if at_last else [])})


METHOD = Method(
    title=(
        "Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition"
    ),
    arxiv="2501.00243",
    family=Family.REUSE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="exact",
    summary="means and registers of every layer come back where tokens have been dropped",
)
