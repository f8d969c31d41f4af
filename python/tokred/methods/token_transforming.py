"""Token Transforming: every token that is left is a soft mixture of all, Y = W X.

Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer
Acceleration (arXiv 2506.05709).

An approximate version, as no formula was at hand beyond the matrix form: the tokens that are most
attended to are chosen, and W is the softmax over all tokens of their cosine with each chosen one,
divided by a temperature, in proportion to sizes. A W of single ones drops tokens, one of blocks
merges them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.schedule import Schedule, parse_r, reducing_layers, resolve

from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduced, Reduction, ReductionCall


def transform(
    x: Tensor, chosen: Tensor, temperature: float = 0.01, size: Tensor | None = None
) -> Tensor:
    """Mixtures of all tokens, one around each chosen one.

    Args:
        x: [B, N, C]. chosen: i64 [B, M], positions.
        temperature: above 0; the smaller, the more of the chosen token itself. Tokens of trained
            encoders are so much alike that at 0.1 each would become the mean of all.
        size: f32 [B, N], how many tokens each stands for.

    Returns:
        [B, M, C] in the dtype of x, differentiable in x. O(B M N C) time; W is not stored where
        torch's attention has a kernel for the shapes.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    values = x.to(_wide(x))  # in half precision cosines are too coarse for the temperature
    unit = functional.normalize(values, dim=-1)
    query = unit.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
    bias = None if size is None else size.log()[:, None].to(values.dtype)
    return functional.scaled_dot_product_attention(
        query, unit, values, attn_mask=bias, scale=1 / temperature
    ).to(x.dtype)


@dataclass(frozen=True)
class TokenTransformingOptions(Options):
    """Options of tokred.patch(model, "token_transforming", ...).

    r is a schedule (tokred.schedule.parse_r) of how many fewer tokens a layer leaves, at most half.
    temperature: see transform.
    """

    r: Schedule = 8
    temperature: float = 0.01

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def layers(self, num_layers: int) -> list[int]:
        """The layers whose amount is not 0."""
        return reducing_layers(num_layers, self.r)

    def plan(self, call: ReductionCall) -> Reduction:
        """Transforms the tokens after the prefix; sizes count each with the one it is most like."""
        amount = parse_r(call.num_layers, self.r)[call.layer]
        r = resolve(amount, call.tokens.shape[1], call.num_prefix)
        return self._transformed(call, r) if r else None

    def _transformed(self, call: ReductionCall, r: int) -> Reduced:
        prefix, x = call.tokens[:, : call.num_prefix], call.tokens[:, call.num_prefix :]
        seen = call.class_attention() if call.num_prefix else call.received_attention()
        _, chosen = tokred.topk(
            seen.mean(1)[:, call.num_prefix :].contiguous(), x.shape[1] - r, order="position"
        )
        rows = chosen.clamp(min=0).long()
        size = None if call.size is None else call.size[:, call.num_prefix :]
        mixed = transform(x, rows, self.temperature, size)
        features = call.features[:, call.num_prefix :]
        centres = features.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
        _, slots = tokred.match(features.contiguous(), centres)
        own = torch.arange(rows.shape[1], dtype=torch.int32, device=x.device).expand_as(chosen)
        slots = slots.scatter(1, rows, own) + call.num_prefix
        first = torch.arange(call.num_prefix, dtype=torch.int32, device=x.device)
        token_map = torch.cat([first.expand(x.shape[0], -1), slots], 1)
        _, sizes = tokred.merge(
            call.features[..., :1].contiguous(), token_map, call.num_prefix + rows.shape[1],
            None if call.size is None else call.size.float(),
        )  # fmt: skip
        return call.reduced(torch.cat([prefix, mixed], 1), sizes.to(_wide(x)), token_map)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


METHOD = Method(
    title=(
        "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision "
        "Transformer Acceleration"
    ),
    arxiv="2506.05709",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="approximate",
    summary="mix all tokens softly into those that are most attended to",
    options=TokenTransformingOptions,
)
