"""The attention of transformers' models on tokred's kernels, in which methods choose keys.

    tokred.integrations.transformers.attention.register()
    model.set_attn_implementation("tokred")

Dense attention then runs on `biased_attention`: grouped heads without copies of the keys, left
padding as a key mask without an N x N mask in prefill, static and dynamic caches, sliding windows
and attention sinks. Models that bring lists of keys (DeepSeek-V3.2, GLM-DSA) run on
`sparse_attention`, and a tokred.PackedCache on `packed_attention`. What the kernels do not have
raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from tokred.patching import AttentionCall

from .full_attention import looks_both_ways
from .kept_keys import KeptStates
from .latent_states import plain, states_of
from .packed_buffer import SCORE_KEYS
from .packed_states import ADVICE, PackedStates

__all__ = [
    "attention_forward",
    "attention_mask",
    "register",
]

NAME = "tokred"
_BOOL = torch.bool

# Parts of these models add masks to their logits themselves, or say that what is causal is not.
_UNSUITABLE = ("bigbird_pegasus", "nllb-moe", "pegasus_x")


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
        alone, without causality, is a view with stride 0 over the queries. None says that there is
        no padding, and that the queries are the last of the keys.
    """
    last = None if isinstance(q_offset, Tensor) else q_offset + q_length
    # Modules that do not say that they are causal need masks that do.
    config = options.get("config")
    if getattr(config, "model_type", None) in _UNSUITABLE:
        raise ValueError(
            f"{config.model_type} does not leave all of its attention to transformers' attention "
            "interface: use set_attn_implementation('eager')"
        )
    allow_is_causal_skip = allow_is_causal_skip and not looks_both_ways(config)
    causal = allow_is_causal_skip and mask_function is causal_mask_function and q_length > 1
    if causal and last is not None and kv_offset == 0 and last <= kv_length:
        return _causal_padding(attention_mask, last, kv_length, options.get("device", "cpu"))
    if mask_function is bidirectional_mask_function:
        if attention_mask is not None:
            padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            padding = padding[:, kv_offset : kv_offset + kv_length]
            return padding[:, None, None].expand(batch_size, 1, q_length, kv_length)
        if not getattr(config, "is_causal", True):
            # A decoder that looks both ways: its modules still say that they are causal.
            whole = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=options.get("device", "cpu"))
            return whole.expand(1, 1, q_length, kv_length)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and last == kv_offset + kv_length,
        **options,
    )


def _causal_padding(
    attention_mask: Tensor | None, keys: int, kv_length: int, device: Any
) -> Tensor | None:
    """The padding of the first `keys` keys, or None where there is none, and no key beyond."""
    padding = prepare_padding_mask(attention_mask, keys, 0)
    if padding is not None:
        padding = padding[:, :keys]
        if not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
    if padding is not None:
        return padding[:, None, None]
    return None if keys == kv_length else torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedStates | KeptStates,
    value: Tensor | PackedStates | None,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    tokred_method: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for the attention of a layer.

    Args:
        module: the layer's attention module.
        query: [B, Hq, L, D]. key: [B, Hkv, N, D], N of a static cache counting its empty part.
            value: [B, Hkv, N, Dv]. From a PackedCache: both are its PackedStates.
        attention_mask: from `attention_mask` above, or a mask [B | 1, Hq | 1, L | 1, N] of your
            own: bool, True is visible, or numbers that are added to the logits and say what is
            hidden as well, by -inf or the lowest number. Without one the queries of a causal module
            are the last of the keys, and see all before.
        scaling: of the logits; 1 / sqrt(D) where None.
        is_causal: module.is_causal where None; without a mask, and with one of padding alone.
        sliding_window: applied where the mask does not carry it.
        s_aux: [Hq], logits that join each head's softmax without a value (attention sinks).
        indices: int [B, L, K], the keys each query attends to, in addition to the mask.
        softcap: of the logits, before the mask.
        position_bias: [B | 1, Hq, L | 1, N], added to the logits (T5's relative positions).
        tokred_method: given by tokred.patch.

    Returns:
        (out [B, L, Hq, Dv], None).

    Raises:
        ValueError: dropout, and whatever else the kernels do not have; more causal queries than
            keys, without a mask.
    """
    _refuse(dropout, options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    latents = states_of(key)
    if latents is not None:
        if tokred_method is not None:
            raise ValueError(
                "methods that choose keys do not read latents with absorbed weights (multi-head "
                "latent attention): use a transformers.DynamicCache, or no method"
            )
        key, value = latents.expanded_by(module, plain(key), plain(value)), None
    if isinstance(key, PackedStates):
        key.refuse_cross_attention(module, bool(is_causal))
        if tokred_method is not None:
            tokred_method.refuse_packed()
        key, value = (key.new_key, key.new_value) if key.is_first else (key, None)
    if position_bias is not None or (attention_mask is not None and attention_mask.dtype != _BOOL):
        _refuse_numbers(key, tokred_method)
    if isinstance(key, KeptStates):
        key.refuse(module, tokred_method, s_aux, indices)
        out, _ = key.attend(query, attention_mask, scaling, softcap)
        return out.transpose(1, 2).contiguous(), None
    score_keys = getattr(key, SCORE_KEYS, None) if isinstance(key, Tensor) else None
    if value is not None:
        query, key, value = _same_dtype(query, key, value)
    call = _call(query, key, value, attention_mask, bool(is_causal), scaling, sliding_window)
    mask = _added(call, position_bias)
    call = replace(call, softcap=softcap, mask=mask, score_keys=score_keys)
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


def _same_dtype(*states: Tensor) -> tuple[Tensor, ...]:
    """Rotation under autocast leaves states in float32: all are cast, as autocast does for sdpa."""
    if len({each.dtype for each in states}) > 1:
        kind = states[0].device.type
        if torch.is_autocast_enabled(kind):
            return tuple(each.to(torch.get_autocast_dtype(kind)) for each in states)
    return states


def _call(
    q: Tensor,
    k: Tensor | PackedStates,
    v: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
) -> AttentionCall:
    """The call as methods are given it; a mask of padding alone leaves causality to the kernel."""
    queries = q.shape[2]
    if mask is not None and (not _is_mask(mask) or mask.dim() != 4):
        raise ValueError(
            "attention_mask must be [B, 1, L, N], bool, True where a query may look, or numbers "
            f"to add to the logits, got {mask.dtype} {list(mask.shape)}"
        )
    is_causal = is_causal and (mask is None or mask.dtype == _BOOL)
    causal = is_causal and queries > 1 and (mask is None or mask.shape[2] == 1)
    if isinstance(k, PackedStates):
        if window is not None and k.length > window:
            raise ValueError(f"a sliding_window needs keys in full precision: {ADVICE}")
        return AttentionCall(q, k, v, mask, causal, scale)
    if is_causal and mask is not None and mask.shape[2] == 1 and mask.shape[3] < k.shape[2]:
        k, v = k[:, :, : mask.shape[3]], v[:, :, : mask.shape[3]]
    if causal and queries > k.shape[2]:
        raise ValueError(
            f"{queries} queries cannot be the last of {k.shape[2]} keys: causal attention needs at "
            "least as many keys as queries, or a mask"
        )
    has_window = mask is not None and not causal
    if window is not None and (has_window or not is_causal or k.shape[2] <= window):
        window = None
    return AttentionCall(q, k, v, mask, causal, scale, window=window)


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == _BOOL or mask.is_floating_point()


def _added(call: AttentionCall, position_bias: Tensor | None) -> Tensor | None:
    """The mask with a position bias, whose keys may reach beyond those that there are."""
    mask = call.mask
    if position_bias is None:
        return mask
    bias = position_bias[..., : call.num_keys]
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == _BOOL else bias + mask


def _refuse_numbers(key: Any, method: Any) -> None:
    """Methods choose and evict keys by logits without what a mask adds."""
    if method is not None or isinstance(key, KeptStates):
        raise ValueError(
            "methods that choose or evict keys know no numbers that are added to the logits, as a "
            "float attention_mask or a position_bias: give a bool mask, or attend to all keys"
        )


def _listed(call: AttentionCall, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every query to its own list of keys, those that are hidden left out."""
    if call.window is not None:
        raise ValueError("indices and a sliding_window without a mask do not go together")
    return call.attend_to(indices[:, None].to(torch.int32), block_q=1)


_REFUSED = {
    "block_indices": "lists of blocks",
    "sinks": "sinks with keys of their own",
    "head_mask": "a head_mask",
    "cache": "paged caches of continuous batching",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens)",
}


def _refuse(dropout: float, options: dict[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"tokred attention has no {what}: use another implementation for this model, such "
                "as eager"
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


# Importing tokred.integrations.transformers is all that set_attn_implementation("tokred") needs.
register()
