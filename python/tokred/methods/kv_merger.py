"""KVMerger: runs of neighbouring keys that are alike become one key, weighted around a pivot.

Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks (arXiv
2407.08454).

Where cos(k_t, k_t-1) exceeds the threshold, t joins the run of t - 1; heavy hitters and recent
tokens stay alone. In a run the token of largest attention is the pivot p, and key and value are
means with the weights exp(-|k_p - k_i|^2 / (2 sigma^2)), normalised.

An approximate version, as the paper leaves two formulas open. The printed sigma is defined by the
weights that need it; the default here is 5, which the paper's search finds best and around which it
says that sigma lies. The printed weights of values have a factor, the size of the run, that the
text does not explain; here they are those of keys. The number of tokens that a merged one stands
for is kept: attention may count it (see `MergedCache.attend`), the published one does not. The
paper takes numbers of heavy hitters and recent tokens that meet its budgets, which are up to the
caller. Inside a patch the first prompt is merged; what follows stays as it comes.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred
from tokred import PackedKV, PackFormat

from ._eviction import Merged, merged_prompt
from ._lists import check_minimum
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import EvictionCall, Replacement


def run_map(k: Tensor, alone: Tensor, threshold: float = 0.75) -> Tensor:
    """The run of every token, i32 [B, H, N], ascending from 0.

    Args:
        k: [B, H, N, D]. alone: bool [B, H, N], tokens that are in no run with others.

    One read of k.
    """
    rows = k.flatten(0, 1)
    _, cosine = tokred.transition_stats(rows[:, :-1], rows[:, 1:])
    joins = cosine.unflatten(0, k.shape[:2]) > threshold
    joins = joins & ~alone[..., 1:] & ~alone[..., :-1]
    starts = torch.nn.functional.pad(~joins, (1, 0), value=True)
    return (starts.cumsum(2) - 1).to(torch.int32)


def stays_alone(scores: Tensor, num_heavy: int, num_recent: int) -> Tensor:
    """bool [B, H, N]: the tokens of largest score f32 [B, H, N], and the last ones.

    Raises:
        ValueError: a negative number.
    """
    check_minimum(0, num_heavy=num_heavy, num_recent=num_recent)
    places = min(num_heavy + num_recent, scores.shape[2])
    _, kept = tokred.topk(scores, places, num_locals=num_recent)
    alone = torch.zeros_like(scores, dtype=torch.bool)
    return alone.scatter(2, kept.long(), True)


@dataclass
class MergedCache:
    """k [B, H, M, D], v [B, H, M, Dv] and counts f32 [B, H, M]: tokens that each stands for.

    Heads with fewer runs have empty places at the end, of count 0.
    """

    k: Tensor
    v: Tensor
    counts: Tensor

    def bias(self, counted: bool) -> Tensor:
        """f32 [B, H, M] for the logits: log(count), or 0 where not counted; -inf for no token."""
        return self.counts.log() if counted else self.counts.clamp(max=1).log()

    def attend(
        self, q: Tensor, counted: bool = False, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, L, D]: out and lse.

        counted: a token weighs as much as all that it replaces.
        """
        return tokred.biased_attention(q, self.k, self.v, self.bias(counted), scale=scale)

    def pack(self, key: PackFormat, value: PackFormat) -> tuple[PackedKV, PackedKV]:
        """The same in a few bits, for `packed_attention(.., key_bias=cache.bias(counted))`."""
        return tuple(
            tokred.kv_pack(x, *astuple(form)) for x, form in ((self.k, key), (self.v, value))
        )


def merge_runs(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    runs: Tensor,
    num_out: int | None = None,
    sigma: float | None = 5.0,
) -> MergedCache:
    """Merges every run into one token.

    Args:
        k: [B, H, N, D], v: [B, H, N, Dv].
        scores: f32 [B, H, N], the attention that tokens received (`attention_columns`, summed over
            the heads of a group).
        runs: of run_map.
        num_out: places for runs, those beyond are dropped; the longest head's number where None,
            which waits for the device.
        sigma: width of the weights, positive; each run's root mean square distance to its pivot
            where None.

    Raises:
        ValueError: a sigma that is not positive.

    Four passes over k, two over v.
    """
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    num_out = int(runs.amax()) + 1 if num_out is None else num_out
    shape = runs.shape[:2]
    keys, values, scores, runs = (x.flatten(0, 1) for x in (k, v, scores, runs))
    pivots, _ = tokred.merge(keys, runs, num_out, weight=scores, mode="prune")
    distance = (tokred.unmerge(pivots, runs) - keys).float().square().sum(2)
    if sigma is None:
        square, _ = tokred.merge(distance[..., None], runs, num_out)
        square = tokred.unmerge(square, runs)[..., 0] + 1e-8
    else:
        square = sigma**2
    weight = (-distance / (2 * square)).exp()
    merged = [
        tokred.merge(x, runs, num_out, weight=weight, mode="plain_mean") for x in (keys, values)
    ]
    (key, counts), (value, _) = merged
    return MergedCache(*(x.unflatten(0, shape) for x in (key, value, counts)))


def kv_merger(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    threshold: float = 0.75,
    num_heavy: int = 0,
    num_recent: int = 32,
    sigma: float | None = 5.0,
) -> MergedCache:
    """The merged cache of a prompt; see run_map, stays_alone and merge_runs."""
    runs = run_map(k, stays_alone(scores, num_heavy, num_recent), threshold)
    return merge_runs(k, v, scores, runs, sigma=sigma)


@dataclass(frozen=True)
class KvMergerOptions(Options):
    """Options of tokred.patch(model, "kv_merger", ...).

    threshold: cosine above which neighbouring keys are in one run.
    heavy, recent: tokens of largest attention, and last ones, which stay alone.
    sigma: width of the weights; each run's own where None.
    counted: a merged token weighs as much as all that it replaces.
    first, last: so many of the first and of the last layers are left alone.
    """

    threshold: float = 0.75
    heavy: int = 0
    recent: int = 32
    sigma: float | None = 5.0
    counted: bool = False
    first: int = 2
    last: int = 1

    adapters = ("causal_lm_cache",)
    prompts_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(0, heavy=self.heavy, recent=self.recent, first=self.first, last=self.last)
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")

    def evict(self, call: EvictionCall) -> Replacement | None:
        """The runs of the first prompt, merged."""
        alone = call.layer < self.first or call.layer >= call.num_layers - self.last
        if alone or not call.is_prompt or call.q.shape[2] < call.length:
            return None
        return merged_prompt(call, call.received(), self._merge)

    def _merge(self, k: Tensor, v: Tensor, scores: Tensor, position: Tensor) -> Merged:
        runs = run_map(k, stays_alone(scores, self.heavy, self.recent), self.threshold)
        merged = merge_runs(k, v, scores, runs, sigma=self.sigma)
        # A run is at the position of its pivot.
        pivot = partial(tokred.merge, weight=scores.flatten(0, 1), mode="prune")
        place, _ = pivot(
            position.flatten(0, 1)[..., None].float(), runs.flatten(0, 1), merged.k.shape[2]
        )
        place = place[..., 0].unflatten(0, position.shape[:2]).to(torch.int32)
        place = place.masked_fill(merged.counts == 0, -1)
        return merged.k, merged.v, place, merged.bias(self.counted)


METHOD = Method(
    title=(
        "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks"
    ),
    arxiv="2407.08454",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="runs of neighbouring keys that are alike become one, weighted around a pivot",
    options=KvMergerOptions,
)
