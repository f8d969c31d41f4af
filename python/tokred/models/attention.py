"""The attention of transformers' models on tokred's kernels, and the place where methods plug in.

    tokred.models.attention.register()
    model.set_attn_implementation("tokred")

Dense attention then runs on `biased_attention`: grouped heads without copies of the keys, left
padding as a key mask without an N x N mask in prefill, static and dynamic caches, sliding windows
and attention sinks. Models that bring lists of keys (DeepSeek-V3.2, GLM-DSA) run on
`sparse_attention`, and a tokred.PackedCache on `packed_attention`. What the kernels do not have
raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

import tokred

from .packed import ADVICE, PackedStates

NAME = "tokred"


def register() -> str:
    """Registers the attention and its masks with transformers, together; any number of times.

    Returns:
        "tokred", the name for set_attn_implementation.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """What transformers calls for the mask of a forward pass.

    Args: those of transformers.masking_utils.sdpa_mask.

    Returns:
        bool [B | 1, 1, q | 1, kv], True is visible, or None. Where the attention itself can see to
        causality, that is where the queries are the last of the keys, only the padding is returned,
        as [B | 1, 1, 1, keys]; keys beyond (of a static cache) do not exist. A mask of padding
        alone, without causality, is a view with stride 0 over the queries.
    """
    if allow_is_causal_skip and mask_function is causal_mask_function and q_length > 1:
        last = None if isinstance(q_offset, Tensor) else q_offset + q_length
        if last is not None and kv_offset == 0 and last <= kv_length:
            return _causal_padding(attention_mask, q_length, last, options.get("device", "cpu"))
    if mask_function is bidirectional_mask_function and attention_mask is not None:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = padding[:, kv_offset : kv_offset + kv_length]
        return padding[:, None, None].expand(batch_size, 1, q_length, kv_length)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )


def _causal_padding(
    attention_mask: Tensor | None, queries: int, keys: int, device: Any
) -> Tensor | None:
    """The padding of the first `keys` keys, or None where it is not needed."""
    padding = prepare_padding_mask(attention_mask, keys, 0)
    if padding is not None:
        padding = padding[:, :keys]
        if not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
    if padding is not None:
        return padding[:, None, None]
    # None means that there are no earlier keys.
    return None if keys == queries else torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one forward pass, as a method is given it.

    q: [B, Hq, L, D]. k: [B, Hkv, N, D] and v: [B, Hkv, N, Dv], the whole cache and the new tokens.
        Of a PackedCache that is not empty, k is its PackedStates, and v None: `dense`, `score` and
        `attend_to` read it, what needs tensors raises an error that says so.
    mask: bool [B | 1, 1, L | 1, N], True is visible, or None.
    causal: query i sees the keys j <= i + N - L, in addition to the mask.
    scale: of the logits.
    layer: the module's layer_idx.
    rotary: where q and k come without rotation, what rotates them; None where they are rotated.
    window: query i sees only the last `window` keys up to its own, or None.
    """

    q: Tensor
    k: Tensor | PackedStates
    v: Tensor | None
    mask: Tensor | None
    causal: bool
    scale: float | None
    layer: int
    rotary: Any = None
    window: int | None = None

    @property
    def num_keys(self) -> int:
        """N."""
        return self.k.length if self.is_packed else self.k.shape[2]

    @property
    def is_packed(self) -> bool:
        return isinstance(self.k, PackedStates)

    def score(self, reduce: str = "none", mask: Tensor | None = None) -> Tensor:
        """The logits of the keys, as `qk_score` reduces them: f32 [B, Hq | Hkv | 1, N].

        Args:
            reduce: see tokred.qk_score.
            mask: bool [B | 1, N], keys that get a score; `visible()` where None.
        """
        mask = self.visible() if mask is None else mask
        if self.is_packed:
            return self.k.score(self.q, reduce, self.scale, mask)
        return tokred.qk_score(self.q, self.k, reduce, scale=self.scale, mask=mask)

    def attend_to(self, indices: Tensor, block_q: int) -> tuple[Tensor, Tensor]:
        """Attention to the keys of lists: (out [B, Hq, L, Dv], lse f32 [B, Hq, L]).

        Args:
            indices: i32 [B, Hq | Hkv | 1, ceil(L / block_q), K]; those that the mask and causality
                hide are left out.
            block_q: queries that share a list; 1 or L of packed keys.
        """
        if self.is_packed:
            return self.k.attend_to(self.q, indices, self.scale, self.causal, self.mask)
        options = {"causal": self.causal, "mask": self.mask, "block_q": block_q}
        return tokred.sparse_attention(self.q, self.k, self.v, indices, self.scale, **options)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Attention over all keys: (out [B, Hq, L, Dv], lse f32 [B, Hq, L])."""
        q, k = self.q, self.k
        if self.is_packed and self.rotary is None:
            return k.attend(q, self.scale, self.causal, self.mask)
        if self.rotary is not None:
            keys = k.shape[2]
            k = self.rotary.rotate(k, (self.visible().cumsum(-1) - 1).clamp(min=0), keys)
            q = self.rotary.rotate(q, (self.num_visible() - 1).clamp(min=0), keys)
        if self.window is None:
            return tokred.biased_attention(
                q, k, self.v, causal=self.causal, scale=self.scale, mask=self.mask
            )
        query, key = self._window_positions()
        return tokred.biased_attention(
            q,
            k,
            self.v,
            scale=self.scale,
            mask=self.mask,
            query_position=query,
            key_position=key,
        )

    def narrow(self, start: int, stop: int) -> AttentionCall:
        """The same for the queries start .. stop - 1, with the keys they can see."""
        if (start, stop) == (0, self.q.shape[2]):
            return self
        q = self.q[:, :, start:stop]
        if not self.causal:
            mask = self.mask
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, start:stop]
            return replace(self, q=q, mask=mask)
        keys = self.k.shape[2] - self.q.shape[2] + stop
        mask = None if self.mask is None else self.mask[..., :keys]
        return replace(self, q=q, k=self.k[:, :, :keys], v=self.v[:, :, :keys], mask=mask)

    def visible(self) -> Tensor:
        """bool [B | 1, N]: the keys that the last query, or any query, can see."""
        if self.mask is None:
            return torch.ones(1, self.num_keys, dtype=torch.bool, device=self.q.device)
        if self.mask.shape[1] != 1:
            raise ValueError("keys can only be chosen under a mask that all heads share")
        return self.mask[:, 0].any(1)

    def num_visible(self) -> Tensor:
        """int [B | 1, L]: how many keys each query sees, leaving the window aside."""
        queries, keys = self.q.shape[2], self.num_keys
        if self.mask is not None and self.mask.shape[2] > 1 and not self.causal:
            return self.mask[:, 0].sum(-1)
        rank = self.visible().cumsum(-1)
        return rank[:, keys - queries :] if self.causal else rank[:, -1:].expand(-1, queries)

    def _window_positions(self) -> tuple[Tensor, Tensor]:
        """Position columns for which key <= query says: not later, and within the window."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        key = torch.arange(keys, dtype=torch.int32, device=self.q.device)
        query = key[keys - queries :]
        columns = torch.stack([query, self.window - 1 - query], -1), torch.stack([key, -key], -1)
        return columns[0][None], columns[1][None]


class AttentionMethod(Protocol):
    """What a method gives to `tokred.models.causal_lm`: one object for all layers of a model."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out [B, Hq, L, Dv], lse f32 [B, Hq, L]) of one layer; call.dense() where it is dense."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedStates,
    value: Tensor | None,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    tokred_method: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for the attention of a layer.

    Args:
        module: the layer's attention module.
        query: [B, Hq, L, D]. key: [B, Hkv, N, D], N of a static cache counting its empty part.
            value: [B, Hkv, N, Dv]. From a PackedCache: its PackedStates, and None.
        attention_mask: from `attention_mask` above, or a bool mask [B, 1, L, N] of your own.
        scaling: of the logits; 1 / sqrt(D) where None.
        is_causal: module.is_causal where None; without a mask, and with one of padding alone.
        sliding_window: applied where the mask does not carry it.
        s_aux: [Hq], logits that join each head's softmax without a value (attention sinks).
        indices: int [B, L, K], the keys each query attends to, in addition to the mask.
        tokred_method: given by tokred.patch.

    Returns:
        (out [B, L, Hq, Dv], None).

    Raises:
        ValueError: dropout, and whatever else the kernels do not have.
    """
    _refuse(dropout, options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(key, PackedStates) and key.is_first:
        key, value = key.new_key, key.new_value
    call = _call(query, key, value, attention_mask, bool(is_causal), scaling, sliding_window)
    call = replace(call, layer=getattr(module, "layer_idx", 0))
    if indices is not None:
        out, lse = _listed(call, indices)
    elif tokred_method is not None:
        out, lse = tokred_method.attend(call)
    else:
        out, lse = call.dense()
    if s_aux is not None:
        # The sink adds exp(s_aux) to the sum of the exponentials, whose logarithm is lse.
        share = torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])
        out = out * share[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _call(
    q: Tensor,
    k: Tensor | PackedStates,
    v: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
) -> AttentionCall:
    """The call in our terms: a mask of padding alone is causal, no mask means no earlier keys."""
    queries = q.shape[2]
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4):
        raise ValueError(
            "attention_mask must be bool [B, 1, L, N], True where a query may look, got "
            f"{mask.dtype} {list(mask.shape)}: tokred attention adds no float mask to the logits"
        )
    causal = is_causal and queries > 1 and (mask is None or mask.shape[2] == 1)
    if isinstance(k, PackedStates):
        if window is not None and k.length > window:
            raise ValueError(f"a sliding_window needs keys in full precision: {ADVICE}")
        return AttentionCall(q, k, v, mask, causal, scale, 0)
    if causal:
        keys = queries if mask is None else mask.shape[3]
        k, v = k[:, :, :keys], v[:, :, :keys]
    carried = mask is not None and not causal
    if window is not None and (carried or not is_causal or k.shape[2] <= window):
        window = None
    return AttentionCall(q, k, v, mask, causal, scale, 0, window=window)


def _listed(call: AttentionCall, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every query to its own list of keys, those that are hidden left out."""
    if call.window is not None:
        raise ValueError("indices and a sliding_window without a mask do not go together")
    return call.attend_to(indices[:, None].to(torch.int32), block_q=1)


_REFUSED = {
    "softcap": "soft-capped logits",
    "position_bias": "a bias for every pair of query and key",
    "head_mask": "a head_mask",
    "cache": "paged caches of continuous batching",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens)",
}


def _refuse(dropout: float, options: dict[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"tokred attention has no {what}: use the eager or sdpa implementation for this "
                "model"
            )
    if options.get("output_attentions"):
        raise ValueError(
            "tokred attention never forms the attention weights: drop output_attentions, or use "
            "the eager implementation"
        )
    if dropout > 0:
        raise ValueError(
            f"tokred attention has no dropout, but the config's is {dropout}: set it to 0, or call "
            "model.eval()"
        )
