"""Lightning Attention-2: causal linear attention whose keys decay, block by block.

Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models
(arXiv 2401.04658).

The attention is tokred.linear_attention; this is the paper's rate of decay for every head.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


def slopes(num_heads: int, layer: int = 0, num_layers: int = 1) -> Tensor:
    """The rate of decay of every head: f32 [H], those of ALiBi, less in later layers.

    2^(-8 h / H) for h from 1 to H where H is a power of two; else those of the power of two below,
    then every second one of the power above. Times 1 - layer / (num_layers - 1) + 1e-5, so that the
    last layer hardly forgets.
    """
    check_minimum(1, num_heads=num_heads, num_layers=num_layers)
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be from 0 to {num_layers - 1}, got {layer}")
    below = 1 << (num_heads.bit_length() - 1)
    rates = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    above = [2 ** (-8 * (h + 1) / (2 * below)) for h in range(0, 2 * below, 2)]
    rates += above[: num_heads - below]
    factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
    return torch.tensor(rates, dtype=torch.float64).mul(factor).float()


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out_i = sum over j <= i of exp(-s (i - j)) (q_i . k_j) v_j, with neither scale nor divisor.

    Args:
        q, k: [B, H, N, D], v: [B, H, N, Dv]; in TransNormerLLM after SiLU.
        decay: f32 [H], slopes. state: f32 [B, H, D, Dv], of the tokens before.

    Returns:
        (out [B, H, N, Dv], state f32 [B, H, D, Dv]). Differentiable in q, k, v and state.
        O(N) time and memory.
    """
    return tokred.linear_attention(q, k, v, decay, state)


METHOD = Method(
    title=(
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large "
        "Language Models"
    ),
    arxiv="2401.04658",
    family=Family.REWEIGHT,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="causal linear attention with a decay for every head",
)
