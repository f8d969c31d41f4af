"""Zero-TPrune: rank tokens by PageRank on the attention graph, then drop similar and unranked ones.

Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained
Transformers (arXiv 2305.17328).

An approximate version, as the authors' code is not public. One ranking serves both stages of a
layer; of the two groups of the similarity stage the lower ranked is pruned; the variance that
filters heads is that of N times the rank, whose mean is 1, and where it leaves no head all count;
which layers prune how much, which the paper searches for, are the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import tokred

from ._budgets import check_budget
from ._dropping import best_tokens, chosen_layers, finite, kept_after
from ._lists import check_count
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def rounds(layer: int, num_layers: int) -> int:
    """Iterations of PageRank: 30 in the first three layers, 1 in the last three, 5 between."""
    if layer < 3:
        return 30
    return 1 if layer >= num_layers - 3 else 5


def importance(ranks: Tensor, v_min: float = 0.01, v_max: float = 0.7) -> Tensor:
    """One rank from those of all heads: the root mean square over the heads that are left.

    Args:
        ranks: f32 [B, H, N], tokred.pagerank, whose rows sum to 1.
        v_min, v_max: a head counts where the variance of N times its ranks is between them; all
            heads of an item count where that is true of none.

    Returns:
        f32 [B, N].
    """
    scaled = ranks * ranks.shape[2]
    variance = (scaled - scaled.mean(2, keepdim=True)).square().mean(2)
    counts = (variance >= v_min) & (variance <= v_max)
    counts = counts | ~counts.any(1, keepdim=True)
    squares = torch.where(counts[:, :, None], ranks.square(), 0).sum(1)
    return (squares / counts.sum(1, keepdim=True)).sqrt()


def zero_tprune_plan(
    ranks: Tensor,
    keys: Tensor,
    keep: int,
    similar: int = 0,
    num_prefix: int = 0,
    split: Literal["sequential", "alternate"] = "sequential",
) -> Tensor:
    """The tokens that stay in one layer.

    Args:
        ranks: f32 [B, N], importance.
        keys: [B, N, C], on whose cosine similarity is measured.
        keep: tokens after the prefix that stay.
        similar: so many are dropped first, those most similar to a token of the other group; the
            tokens of lowest rank follow until `keep` are left. At most half of the tokens.
        num_prefix: the first tokens, which stay.
        split: the groups are the upper and the lower half of the ranking ("sequential"), or every
            second token of it ("alternate"); the lower one, or that of the second tokens, is
            pruned.

    Returns:
        i32 [B, num_prefix + keep], in order of position.

    Raises:
        ValueError: keep and similar do not fit the tokens.

    O(B N^2 C) time, O(B N) memory.
    """
    check_count("keep", keep, minimum=None)
    tokens = ranks.shape[1] - num_prefix
    if keep < 0 or not 0 <= similar <= min(tokens // 2, tokens - keep):
        raise ValueError(
            f"keep must be from 0 to {tokens}, and similar from 0 to half of these tokens and to "
            f"those that leave, got {keep} and {similar}"
        )
    ranks = finite(ranks)
    if similar:
        _, order = tokred.topk(ranks[:, num_prefix:].contiguous(), tokens)
        order = order.long() + num_prefix
        upper = tokens - tokens // 2
        stays, pruned = (
            (order[:, :upper], order[:, upper:])
            if split == "sequential"
            else (order[:, 0::2], order[:, 1::2])
        )

        def rows(index: Tensor) -> Tensor:
            return keys.gather(1, index[..., None].expand(-1, -1, keys.shape[2]))

        score, _ = tokred.match(rows(pruned), rows(stays))
        _, worst = tokred.topk(finite(score), similar)
        ranks = ranks.scatter(1, pruned.gather(1, worst.long()), -torch.inf)
    return best_tokens(ranks, keep, num_prefix)


@dataclass(frozen=True)
class ZeroTpruneOptions(Options):
    """Options of tokred.patch(model, "zero_tprune", ...).

    ratio is the share of its tokens (the prefix aside, rounded down, at least one) that a pruning
    layer keeps; at lists these layers, by default a fourth, a half and three fourths in.
    similar_share of the tokens that leave are those most similar to others, the rest those of the
    lowest rank. iterations of PageRank are those of `rounds` where None. v_min and v_max: see
    importance. split: see zero_tprune_plan.
    """

    ratio: float = 0.8
    at: Sequence[int] | None = None
    similar_share: float = 0.5
    iterations: int | None = None
    v_min: float = 0.01
    v_max: float = 0.7
    split: Literal["sequential", "alternate"] = "sequential"

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(None, self.ratio)
        if not 0 <= self.similar_share <= 1:
            raise ValueError(f"similar_share must be in [0, 1], got {self.similar_share}")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def layers(self, num_layers: int) -> list[int]:
        """The layers `at`, unless they keep all tokens."""
        return chosen_layers(self.at, num_layers) if self.ratio < 1 else []

    def plan(self, call: ReductionCall) -> Reduction:
        """zero_tprune_plan by the PageRank of the layer's attention and its mean keys."""
        tokens = call.tokens.shape[1] - call.num_prefix
        keep = kept_after(tokens, self.ratio)
        if keep >= tokens:
            return None
        q, k = call.q, call.k
        if q.dtype == torch.float64:  # which no op that scores takes
            q, k = q.float(), k.float()
        iterations = self.iterations or rounds(call.layer, call.num_layers)
        ranks = importance(
            tokred.pagerank(q, k, iterations, scale=call.scale), self.v_min, self.v_max
        )
        similar = min(int((tokens - keep) * self.similar_share), tokens // 2)
        return zero_tprune_plan(ranks, call.mean_keys, keep, similar, call.num_prefix, self.split)


METHOD = Method(
    title=(
        "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in "
        "Pre-Trained Transformers"
    ),
    arxiv="2305.17328",
    family=Family.PRUNE,
    needs=(Needs.VISION_ENCODER,),
    status="approximate",
    summary="drop the tokens most similar to others, then those of lowest PageRank on attention",
    options=ZeroTpruneOptions,
)
