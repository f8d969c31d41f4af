"""nn.MultiheadAttention's parameters and calling convention, and transformers', around a core."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops import biased_attention
from . import masks
from .reduced import MergedCore, PackedKVCore
from .sparse import BlockSparseCore, TopKCore

__all__ = ["BlockSparseAttention", "MergedAttention", "PackedKVAttention", "TopKAttention"]

# Arguments that transformers' layers pass to their attention, and that these modules do not need.
_NOT_NEEDED = {"position_ids", "use_cache", "cache_position"}

Module = TypeVar("Module", bound="_MultiheadAttention")


class _MultiheadAttention(nn.Module):
    """The projections of nn.MultiheadAttention around a core, which attends in heads."""

    core_type: ClassVar[type[nn.Module]]
    reads_packed: ClassVar[bool] = False

    # TransformerEncoderLayer's fast path computes dense attention from our weights, without calling
    # us, where this says that the projections lie in one matrix.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        num_kv_heads: int | None = None,
        layer_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(embed_dim, num_heads, kv_heads) < 1 or embed_dim % num_heads or num_heads % kv_heads:
            raise ValueError(
                "embed_dim must be a multiple of num_heads, and this one of num_kv_heads, got "
                f"{embed_dim}, {num_heads} and {kv_heads}"
            )
        self.core = self.core_type(**options)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.layer_idx = dropout, batch_first, layer_idx
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = (embed_dim, *[kv_heads * self.head_dim] * 2)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        columns = (embed_dim, self.kdim, self.vdim)
        if set(columns) == {embed_dim}:
            self.in_proj_weight = nn.Parameter(torch.empty(sum(rows), embed_dim, **made))
            for name in names:
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            for name, shape in zip(names, zip(rows, columns, strict=True), strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)))
        self.register_parameter("in_proj_bias", None)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(sum(rows), **made))
        # nn.MultiheadAttention's own, under whose name quantisation knows it.
        self.out_proj = NonDynamicallyQuantizableLinear(embed_dim, embed_dim, bias=bias, **made)
        self._rows = rows
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and zeroes biases, as nn.MultiheadAttention does."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_mha(cls: type[Module], mha: nn.MultiheadAttention, **options: Any) -> Module:
        """A module in the place of an nn.MultiheadAttention, which shares its parameters.

        Args:
            options: of the core; see the class.

        Raises:
            TypeError: mha is no nn.MultiheadAttention.
            ValueError: it has keys of its own (add_bias_kv, add_zero_attn); other num_kv_heads.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be an nn.MultiheadAttention, got {type(mha).__name__}")
        if mha.bias_k is not None or mha.add_zero_attn:
            raise ValueError(
                f"{cls.__name__} has no keys of its own: add_bias_kv and add_zero_attn must be "
                "False"
            )
        if options.get("num_kv_heads") not in (None, mha.num_heads):
            raise ValueError(
                f"num_kv_heads must be mha's {mha.num_heads} heads, got {options['num_kv_heads']}"
            )
        bias = mha.in_proj_bias is not None
        module = cls(
            mha.embed_dim, mha.num_heads, mha.dropout, bias, mha.kdim, mha.vdim, mha.batch_first,
            device="meta", **options,
        )  # fmt: skip
        for name, parameter in mha.named_parameters(recurse=False):
            module.register_parameter(name, parameter)
        module.out_proj = mha.out_proj
        return module.train(mha.training)

    def forward(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        hidden_states: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention as nn.MultiheadAttention is called, or as transformers' layers call theirs.

        With key and value, as nn.MultiheadAttention:

        Args:
            query: [L, B, E], [B, L, E] with batch_first, or [L, E]; key and value likewise with N.
            key_padding_mask: [B, N] or [N], bool where True is padding, or float, 0 or -inf.
            attn_mask: the causal mask [L, N] of L = N, bool (True is hidden) or float (-inf is).
            is_causal: causal attention; an attn_mask beside it is not read.
            need_weights: must be False, as the weights never exist; average_attn_weights is
                ignored.

        With hidden_states, or a query alone, as transformers' decoder layers call:

        Args:
            hidden_states: [B, L, E].
            attention_mask: [B, N], nonzero where visible; or bool (True is visible) or float
                [B | 1, 1, L | 1, N]; padding, causality or both.
            position_embeddings: (cos, sin), each [B | 1, L, R], that rotate the first R channels of
                queries and keys, the second half of them being the partner of the first.
            cache: of transformers or tokred, with the module's layer_idx; also by the name that it
                has before transformers 5.24, past_key_values.
            is_causal: causal attention, also where the core's option is False.

        Returns:
            out, of the shape of query or hidden_states, and None in the place of the weights.

        Raises:
            ValueError: arguments that do not go together, or that the core cannot serve: dropout in
                training, other masks, a cache of the wrong kind.
        """
        if self.training and self.dropout > 0:
            raise ValueError(
                f"{type(self).__name__} has no dropout, but dropout is {self.dropout}: set it to "
                "0, or call eval()"
            )
        if need_weights or options.pop("output_attentions", None):
            raise ValueError(
                f"{type(self).__name__} never forms the attention weights: leave need_weights and "
                "output_attentions at False"
            )
        if (query is None) == (hidden_states is None):
            raise ValueError("give query, or hidden_states")
        if hidden_states is not None or key is None:
            if value is not None or key is not None:
                raise ValueError("hidden_states take no key and value: give query instead")
            if key_padding_mask is not None or attn_mask is not None:
                raise ValueError(
                    "hidden_states, or a query without key and value, take an attention_mask in "
                    "the place of key_padding_mask and attn_mask"
                )
            x = query if hidden_states is None else hidden_states
            assert x is not None
            return self._decoder_layer(x, is_causal, **options), None
        if value is None or query is None:
            raise ValueError("key and value must be given together")
        if options:
            raise ValueError(f"query, key and value take no {', '.join(options)}")
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.is_nested:
                raise ValueError(
                    f"{name} must not be nested: nn.TransformerEncoder needs "
                    "enable_nested_tensor=False"
                )
        self._check_tokens(query, key, value)
        batched, mask = query.dim() == 3, key_padding_mask
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            mask = mask if mask is None else mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        causal = is_causal
        if attn_mask is not None and not is_causal:
            if attn_mask.dim() != 2:
                raise ValueError(
                    f"attn_mask must be [L, N], the same for all heads and items, got "
                    f"{list(attn_mask.shape)}: padding belongs into key_padding_mask"
                )
            shape = (1, query.shape[1], key.shape[1])
            visible = ~masks.hidden("attn_mask", attn_mask)[None]
            seen, causal = masks.padding_and_causality("attn_mask", visible, shape, False)
            if seen is not None:
                raise ValueError("attn_mask must be the causal mask: hide keys by key_padding_mask")
        if causal and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"a causal mask needs as many queries as keys, got {query.shape[1]} and "
                f"{key.shape[1]}"
            )
        if mask is not None:
            mask = masks.not_padding("key_padding_mask", mask, (key.shape[0], key.shape[1]))
        q, k, v = self._projected(query, key, value)
        out = self._out(self.core(q, k, v, mask, causal))
        if not batched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuses shapes that are none of nn.MultiheadAttention's."""
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                shape = f"[B, N, {width}]" if self.batch_first else f"[N, B, {width}]"
                raise ValueError(
                    f"{name} must be {shape}, or [N, {width}] where all three are, got "
                    f"{list(x.shape)}"
                )

    def _decoder_layer(
        self,
        x: Tensor,
        is_causal: bool,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Tensor:
        """forward in transformers' convention: out [B, L, E] for x [B, L, E]."""
        unknown = {name for name, given in options.items() if given is not None} - _NOT_NEEDED
        if unknown:
            raise ValueError(f"{type(self).__name__} does not know {', '.join(sorted(unknown))}")
        if x.dim() != 3:
            raise ValueError(f"hidden_states must be [B, L, E], got {list(x.shape)}")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one")
        cache = past_key_values if cache is None else cache
        if cache is not None:
            self._check_cache(cache)
        q, k, v = self._projected(x, x, x)
        if position_embeddings is not None:
            q, k = (_rotated(states, *position_embeddings) for states in (q, k))
        # The tokens of a pass come after those in the cache, and see each other causally.
        causal = is_causal or cache is not None or getattr(self.core, "causal", False)
        causal, mask, keys = causal and q.shape[2] > 1, None, k.shape[2]
        if cache is not None:
            keys = cache.get_mask_sizes(keys, self.layer_idx)[0]
        if attention_mask is not None:  # looked at before the cache takes the tokens
            shape = (q.shape[0], q.shape[2], keys)
            mask, causal = masks.of_transformers(attention_mask, shape, causal)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self._out(self._attend(q, k, v, mask, causal))

    def _check_cache(self, cache: Any) -> None:
        """Refuses a cache that the core cannot use, before anything is written to it."""
        from ..cache import PackedCache

        if self.layer_idx is None:
            raise ValueError("a cache needs the layer_idx that the module is made with")
        if isinstance(cache, PackedCache) != self.reads_packed:
            kind = "no tokred.PackedCache" if self.reads_packed else "a tokred.PackedCache"
            raise ValueError(
                f"cache is {kind}: PackedKVAttention works on one, other modules on "
                "caches in full precision, such as tokred.DenseCache"
            )

    def _attend(self, q: Tensor, k: Any, v: Any, mask: Tensor | None, causal: bool) -> Tensor:
        return self.core(q, k, v, mask, causal)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q [B, Hq, L, D], k and v [B, Hkv, N, D]."""
        inputs, bias = (query, key, value), self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            parts = F.linear(query, self.in_proj_weight, bias).split(self._rows, -1)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.split(self._rows)
            biases = (None,) * 3 if bias is None else bias.split(self._rows)
            parts = tuple(map(F.linear, inputs, weights, biases))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in parts)
        return q, k, v

    def _out(self, heads: Tensor) -> Tensor:
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class TopKAttention(_MultiheadAttention):
    """Multi-head attention to the k best keys; the options are those of `TopKCore`.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as of
            nn.MultiheadAttention, whose state_dict it loads. Dropout is refused in training.
        num_kv_heads: fewer heads of keys and values, each for several of the queries.
        layer_idx: the module's layer in a cache.
        options: k, scoring, reduce, num_sinks, num_locals, block_size, statistic, block_q, causal,
            scale. With k >= N it computes what nn.MultiheadAttention does.
    """

    core_type = TopKCore


class BlockSparseAttention(_MultiheadAttention):
    """Multi-head attention inside the best blocks; the options are those of `BlockSparseCore`.

    Args:
        embed_dim ... layer_idx: see `TopKAttention`.
        options: k, density or top_p, min_k, block_q, block_k, statistic, reduce, num_sinks,
            num_locals, causal, scale. With density=1 it computes what nn.MultiheadAttention does.
    """

    core_type = BlockSparseCore


class MergedAttention(_MultiheadAttention):
    """Multi-head attention between merged tokens; the options are those of `MergedCore`.

    Args:
        embed_dim ... layer_idx: see `TopKAttention`. Causal masks and caches are refused.
        options: r or ratio, num_prefix, merge_queries, scale. With r = 0 it computes what
            nn.MultiheadAttention does.
    """

    core_type = MergedCore

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuses to merge queries as keys of other tokens."""
        super()._check_tokens(query, key, value)
        core: Any = self.core
        if core.merge_queries and (core.r or core.ratio) and query is not key:
            raise ValueError(
                "query and key must be one and the same tensor, as queries merge where their keys "
                "do: give merge_queries=False for cross-attention"
            )

    def _check_cache(self, cache: Any) -> None:
        raise ValueError("MergedAttention merges the tokens of a pass, and has no use for a cache")


class PackedKVAttention(_MultiheadAttention):
    """Multi-head attention to keys and values in few bits; the options are those of `PackedKVCore`.

    For inference. With a tokred.PackedCache as cache the options of the cache hold
    instead of bits, group_size, scheme, rotate and residual, and each token is packed once.

    Args:
        embed_dim ... layer_idx: see `TopKAttention`.
        options: bits, group_size, scheme, rotate, residual, causal, scale. With residual >= N it
            computes what nn.MultiheadAttention does.
    """

    core_type = PackedKVCore
    reads_packed = True

    def _attend(self, q: Tensor, k: Any, v: Any, mask: Tensor | None, causal: bool) -> Tensor:
        if isinstance(k, Tensor):
            return self.core(q, k, v, mask, causal)
        if mask is not None:
            mask = mask[:, None, None]
        core: Any = self.core
        if k.is_first:
            states = (q, k.new_key, k.new_value)
            return biased_attention(*states, None, causal, core.scale, mask)[0]
        return k.attend(q, core.scale, causal, mask)[0]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, L, D] with its first R channels rotated by cos and sin [B | 1, L, R]."""
    if cos.dim() != 3 or cos.shape[1] != x.shape[2] or cos.shape[2] > x.shape[3]:
        raise ValueError(
            f"position_embeddings must be cos and sin [B | 1, {x.shape[2]}, R], R at most "
            f"{x.shape[3]}, got {list(cos.shape)}"
        )
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotated, rest = x.split([cos.shape[3], x.shape[3] - cos.shape[3]], -1)
    first, second = rotated.chunk(2, -1)
    rotated = rotated * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([rotated, rest], -1)
