"""ToMe: bipartite soft matching between the attention and the MLP of every block.

Token Merging: Your ViT But Faster (ICLR 2023, arXiv 2210.09461).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

import tokred
from tokred.schedule import Amount, Schedule, parse_r, reducing_layers, resolve

from ._maps import identity
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import ReductionCall


def tome_plan(
    metric: torch.Tensor, num_prefix: int, r: Amount = 8, order: str = "tome"
) -> tuple[torch.Tensor, int] | None:
    """The map that merges the r most similar tokens of one layer, or None where r comes to 0.

    Args:
        metric: [B, N, C], what similarity is measured on: the keys averaged over the heads.
        num_prefix: the first tokens that must not take part: class, distillation, registers.
        r: tokens to merge, or a float, the share of N; never more than half of what may merge.
        order: "tome" (survivors, then destinations) or "position".

    Returns:
        (token_map i32 [B, N], num_out), num_out = N - r.

    O(B N^2 C) time, O(B N) memory.
    """
    tokens = metric.shape[1]
    r = resolve(r, tokens, num_prefix)
    if r == 0:
        return None
    return tokred.bipartite_soft_matching(metric, r, num_prefix, order=order), tokens - r


def tome_step(
    x: torch.Tensor,
    metric: torch.Tensor,
    r: Amount,
    size: torch.Tensor | None = None,
    num_prefix: int = 0,
    order: str = "tome",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer's merge.

    Args:
        x: [B, N, C] tokens.
        metric: [B, N, D], as in tome_plan.
        r, num_prefix, order: as in tome_plan.
        size: f32 [B, N], how many original tokens each stands for; None where all are 1.

    Returns:
        (x [B, N - r, C] the size-weighted means, size f32 [B, N - r], token_map i32 [B, N]).
    """
    plan = tome_plan(metric.detach(), num_prefix, r, order)
    if plan is None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        ones = torch.ones(x.shape[:2], dtype=wide, device=x.device)
        return x, ones if size is None else size, identity(x)
    token_map, num_out = plan
    x, size = tokred.merge(x, token_map, num_out, size)
    return x, size, token_map


@dataclass(frozen=True)
class TomeOptions(Options):
    """Options of tokred.patch(model, "tome", ...).

    r is a schedule (tokred.schedule.parse_r): an int, a share, (r, inflect) or a list per layer.
    order: of what is left, as in tome_plan.
    """

    r: Schedule = 8
    order: Literal["tome", "position"] = "tome"

    adapters = ("timm", "transformers")

    def layers(self, num_layers: int) -> list[int]:
        """The layers whose amount is not 0."""
        return reducing_layers(num_layers, self.r)

    def plan(self, call: ReductionCall) -> tuple[torch.Tensor, int] | None:
        """tome_plan of the mean keys, by the layer's amount."""
        amount = parse_r(call.num_layers, self.r)[call.layer]
        return tome_plan(call.mean_keys, call.num_prefix, amount, self.order)


METHOD = Method(
    title="Token Merging: Your ViT But Faster",
    arxiv="2210.09461",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="between attention and MLP, merge the r most similar pairs of an even/odd split",
    options=TomeOptions,
)
