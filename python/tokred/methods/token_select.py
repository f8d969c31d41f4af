"""TokenSelect: at every step, each layer attends to the cached tokens its heads vote for.

TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic
Token-Level KV Cache Selection (arXiv 2411.02886).

Every head's softmax over its logits, without the 1 / sqrt(D), is a vote; the k tokens with most
votes of all heads are attended to by all heads, beside the first n_init and the last n_local
tokens. With rotation "compact" and prefill "select" that is the published method, in which keys are
cached without rotation and rotated by their rank among the chosen, so that positions never exceed
those the model was trained on. By default the prompt is attended to in full, and keys keep the
rotation the model gave them, which works on every model.

Different from the released code: votes are in float32 rather than bfloat16; query head h scores key
head h // group everywhere (the release's scorer takes h % Hkv); the selection cache between steps,
which the release turns off, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask, choose, ends

from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import AttentionCall


def vote(
    q: Tensor, k: Tensor, mask: Tensor | None = None, pool: int = 1, scale: float = 1.0
) -> Tensor:
    """The softmax votes of all heads for every key, by the mean of a few queries.

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16. k: [B, Hkv, N, D].
        mask: bool [B | 1, N]; a key that is not visible gets no vote.
        pool: each key takes the largest vote of the `pool` keys around it; odd.
        scale: of the logits.

    Returns:
        float32 [B, 1, N].

    2 B Hq N D flops, one read of k.
    """
    return _pooled(tokred.qk_score(q, k, "softmax_vote", scale=scale, mask=mask), pool)


def _pooled(votes: Tensor, pool: int) -> Tensor:
    return torch.nn.functional.max_pool1d(votes, pool, 1, pool // 2) if pool > 1 else votes


class TokenSelectAttention:
    """What `tokred.patch` calls for every layer."""

    reads_packed = True

    def __init__(self, options: TokenSelectOptions) -> None:
        self.options = options

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        options = self.options
        if call.is_prompt and options.prefill == "dense":
            return call.dense()
        queries = call.q.shape[2]
        parts = [
            self._attend_chunk(call.narrow(start, min(start + options.chunk, queries)))
            for start in range(0, queries, options.chunk)
        ]
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _attend_chunk(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        options = self.options
        if options.n_init + options.k + options.n_local >= call.num_keys:
            return call.dense()
        indices, counts = self._choose(call)
        lists = indices[:, :, None]
        queries = call.q.shape[2]
        if call.rotary is None:
            return call.attend_to(lists, block_q=queries)
        # The queries are the last of the list: their positions are the last ranks.
        place = torch.arange(queries, device=counts.device) - queries
        limit = lists.shape[3]
        q = call.rotary.rotate(call.q, (counts + place).clamp(min=0), limit)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, call.k, call.v)):
            # The op rotates without a gradient: keys are rotated to their places in the list first.
            place = block_mask(indices[:, 0], call.num_keys).cumsum(-1) - 1
            k = call.rotary.rotate(call.k, place.clamp(min=0), limit)
            return replace(call, q=q, k=k).attend_to(lists, block_q=queries)
        cos, sin = call.rotary.halves(limit, q.device)
        return tokred.sparse_attention(
            q,
            call.k,
            call.v,
            lists,
            call.scale,
            causal=call.causal,
            mask=call.mask,
            block_q=queries,
            rope_cos=cos,
            rope_sin=sin,
            softcap=call.softcap,
        )

    def _choose(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """indices i32 [B, 1, n_init + k + n_local], ascending, and counts i32 [B, 1]."""
        options = self.options
        q, keys = call.q.detach(), call.num_keys
        if call.mask is not None and q.shape[2] > 1:
            # The mean is of the queries that are no padding.
            real = call.num_visible() > 0
            share = real * (real.shape[1] / real.sum(1, keepdim=True).clamp(min=1))
            q = q * share[:, None, :, None].to(q.dtype)
        if call.rotary is not None and options.rotate_query:
            place = torch.arange(q.shape[2], device=q.device)[None]
            limit = options.n_local + q.shape[2]
            q = call.rotary.rotate(q, place + options.n_local, limit)
        if call.mask is None:
            middle = call.once("token_select", lambda: self._middle(keys, q.device))
            votes = self._vote(call, q, middle)
            return choose(votes, options.k, options.n_init, options.n_local)
        middle, forced, hidden = call.once("token_select", lambda: self._roles(call.visible()))
        votes = self._vote(call, q, middle).masked_fill(hidden, -torch.inf)
        places = options.n_init + options.k + options.n_local
        return tokred.topk_with_counts(votes, places, order="position", must_keep=forced)[1:]

    def _middle(self, keys: int, device: torch.device) -> Tensor:
        """bool [1, keys]: the tokens between the sinks and the locals, which are voted on."""
        middle = torch.zeros(1, keys, dtype=torch.bool, device=device)
        middle[:, self.options.n_init : keys - self.options.n_local] = True
        return middle

    def _roles(self, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From bool [B | 1, N]: the tokens voted on; and, [B | 1, 1, N], kept and hidden ones."""
        forced = ends(visible, self.options.n_init, self.options.n_local)
        return visible & ~forced, forced[:, None], ~visible[:, None]

    def _vote(self, call: AttentionCall, q: Tensor, mask: Tensor) -> Tensor:
        """See vote; on packed keys too."""
        votes = replace(call, q=q, scale=1.0).score("softmax_vote", mask)
        return _pooled(votes, self.options.pool)


@dataclass(frozen=True)
class TokenSelectOptions(Options):
    """Options of tokred.patch(model, "token_select", ...).

    k: tokens chosen by votes. n_init, n_local: first and last tokens, attended to in any case.
    prefill: "dense", the prompt in full; or "select", in chunks that choose like single steps.
    chunk: queries that choose together with prefill "select"; at most n_local.
    rotation: "cached", keys as the model rotates them; or "compact", see above.
    rotate_query: with "compact", queries vote as if they stood n_local tokens after every key.
    pool: each key takes the largest vote of the `pool` keys around it; odd.
    """

    k: int = 2048
    n_init: int = 128
    n_local: int = 512
    prefill: Literal["dense", "select"] = "dense"
    chunk: int = 512
    rotation: Literal["cached", "compact"] = "cached"
    rotate_query: bool = True
    pool: int = 1

    adapters = ("causal_lm",)
    heads_may_be_split = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 0 or self.n_init < 0:
            raise ValueError(f"k and n_init must be at least 0, got {self.k} and {self.n_init}")
        if self.n_local < 1:
            raise ValueError(f"n_local must be at least 1, the token itself, got {self.n_local}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and at least 1, got {self.pool}")
        if self.chunk < 1 or (self.prefill == "select" and self.chunk > self.n_local):
            raise ValueError(
                f"chunk must be between 1 and n_local = {self.n_local}, so that a chunk's own "
                f"tokens are local, got {self.chunk}"
            )

    def attention(self, layers: Sequence[int]) -> TokenSelectAttention:
        """The object that attends for all layers of a model."""
        return TokenSelectAttention(self)


METHOD = Method(
    title=(
        "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via "
        "Dynamic Token-Level KV Cache Selection"
    ),
    arxiv="2411.02886",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="at every step attend to the cached tokens that all heads of a layer vote for",
    options=TokenSelectOptions,
)
