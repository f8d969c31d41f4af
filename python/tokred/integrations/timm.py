"""timm: VisionTransformer, Eva, and everything else that is built of their blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import tokred
from tokred.patching import Overrides, Settings, TokenReducer, TokenState

from .positions import following
from .walk import ancestors, layer_lists


@dataclass(frozen=True)
class Stack:
    """A run of Blocks, the transformer that pools their tokens (or None), and their ancestors."""

    blocks: list[nn.Module]
    num_prefix: int
    vit: nn.Module | None
    around: list[nn.Module]

    def install(self, method: TokenReducer, settings: Settings, overrides: Overrides) -> TokenState:
        """Puts the method into the layers; returns their state."""
        rotates = not hasattr(self.blocks[0], "ls1")
        state = TokenState(method, len(self.blocks), self.num_prefix, settings, rotates)
        for layer, block in enumerate(self.blocks):
            if rotates:
                overrides.replace(block, "forward", _eva_block_forward, state, layer, block)
                attend = partial(_eva_attention_forward, state, layer, block.attn)
                overrides.replace(block.attn, "forward", attend)
                continue
            overrides.replace(block, "forward", _block_forward, state, layer, block)
            overrides.replace(block.attn, "forward", _attention_forward, state, block.attn)
            if state.reduces(layer):
                values = partial(_values, block.attn.num_heads)
                overrides.hook(block.attn.q_norm, partial(_keep, state, "q", _as_they_are))
                overrides.hook(block.attn.k_norm, partial(_keep, state, "k", _as_they_are))
                overrides.hook(block.attn.qkv, partial(_keep, state, "v", values))
        if state.layers and not state.restores:
            for module in self.around:
                if hasattr(module, "forward_intermediates"):
                    overrides.replace(module, "forward_intermediates", _refuse_intermediates)
        if state.restores:  # what pools has all tokens
            return state
        pool = getattr(self.vit, "attn_pool", None)
        if pool is not None and settings.prop_attn:
            overrides.replace(pool, "forward", _attention_pool_forward, state)
        if settings.weighted_pool:
            overrides.replace(self.vit, "pool", _weighted_pool, state)
        return state


def stacks(model: nn.Module, method: TokenReducer, settings: Settings) -> Iterator[Stack]:
    """The stacks of Blocks in the model.

    Raises:
        ValueError: a Block whose attention is not timm's own; a model that reshapes its tokens to a
            grid, whose pooling cannot take fewer tokens, or whose prefix tokens are not known.
    """
    if "timm" not in sys.modules:
        return
    from timm.layers import Attention
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block

    kinds = {Block: Attention, EvaBlock: EvaAttention}

    def is_block(module: nn.Module) -> bool:
        return any(
            isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
        )

    for name, blocks in layer_lists(model, is_block):
        for block in blocks:
            known = next(kinds[kind] for kind in kinds if isinstance(block, kind))
            if type(block.attn).forward is not known.forward:
                raise ValueError(
                    f"the blocks of {name or type(model).__name__} attend with "
                    f"{type(block.attn).__name__}, which has no published way to merge tokens; "
                    f"only timm's {known.__name__} is supported in a {type(block).__name__}"
                )
        around = list(ancestors(model, name))
        if method.layers(len(blocks)) and not settings.restore_tokens:
            _refuse_grids(around)
        vit = next((m for m in around if hasattr(m, "num_prefix_tokens")), None)
        if getattr(vit, "rope_mixed", False):
            raise ValueError(f"the rotations of {type(vit).__name__} differ from block to block")
        _check_vit(vit, settings)
        yield Stack(blocks, _num_prefix(vit, settings), vit, around)


def _refuse_grids(around: list[nn.Module]) -> None:
    """Refuses the models of timm that make feature maps of their tokens.

    Models known to take any number of tokens pass, and so do modules that are not timm's, whose
    authors have to know.
    """
    from timm.models.vision_transformer import VisionTransformer

    supported = [VisionTransformer, sys.modules["timm.models.eva"].Eva]
    if "timm.models.naflexvit" in sys.modules:
        supported.append(sys.modules["timm.models.naflexvit"].NaFlexVit)
    for module in around:
        kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("timm.models")]
        if kinds and not isinstance(module, tuple(supported)):
            raise ValueError(
                f"{kinds[0].__name__} reshapes its tokens to a grid and needs all of them: pass "
                "restore_tokens=True, or patch a VisionTransformer created without features_only, "
                "and take its forward_features"
            )


def _num_prefix(vit: nn.Module | None, settings: Settings) -> int:
    if settings.num_prefix is not None:
        return settings.num_prefix
    if vit is None:
        raise ValueError(
            "the module does not say how many class and register tokens come first: pass "
            "num_prefix to tokred.patch"
        )
    return vit.num_prefix_tokens


def _check_vit(vit: nn.Module | None, settings: Settings) -> None:
    pool = getattr(vit, "attn_pool", None)
    if (
        pool is not None
        and not settings.restore_tokens
        and (type(pool).__name__ != "AttentionPoolLatent" or pool.pos_embed is not None)
    ):
        raise ValueError(
            f"the pooling head {type(pool).__name__} of {type(vit).__name__} needs every token; "
            "AttentionPoolLatent without position embeddings is supported"
        )
    if settings.weighted_pool and getattr(vit, "global_pool", None) != "avg":
        raise ValueError('weighted_pool needs a timm model with global_pool="avg"')


def _keep(
    state: TokenState,
    name: str,
    in_heads: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    args: Any,
    output: torch.Tensor,
) -> None:
    state.keep_projection(name, output, in_heads)


def _as_they_are(heads: torch.Tensor) -> torch.Tensor:
    return heads


def _values(num_heads: int, qkv: torch.Tensor) -> torch.Tensor:
    return qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2].transpose(1, 2)


def _block_forward(
    state: TokenState,
    layer: int,
    block: nn.Module,
    original: Callable,
    x: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    x = state.enter(x, layer)
    if not state.reduces(layer):
        x = original(x, **_given(attn_mask, is_causal))
    else:
        _refuse_masks(attn_mask, is_causal)
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = state.reduce(x, layer, block.attn.scale)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return state.leave(x, layer)


def _attention_forward(
    state: TokenState,
    attn: nn.Module,
    original: Callable,
    x: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    bias = state.key_bias()
    if bias is None:
        return original(x, **_given(attn_mask, is_causal))
    _refuse_masks(attn_mask, is_causal)
    _refuse_dropout(attn)
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    # Under autocast the norms return float32.
    q, k = q.to(v.dtype), k.to(v.dtype)
    out, lse = tokred.biased_attention(q, k, v, key_bias=bias, scale=attn.scale)
    state.keep_lse(lse)
    out = attn.norm(out.transpose(1, 2).reshape(batch, tokens, attn.attn_dim))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _eva_block_forward(
    state: TokenState,
    layer: int,
    block: nn.Module,
    original: Callable,
    x: torch.Tensor,
    rope: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    x = state.enter(x, layer)
    first = state.first()
    if rope is not None and first is not None:
        rope = following(rope, first, state.counts_of_pass[0], state.num_prefix)
    if not state.reduces(layer):
        x = original(x, rope=rope, **_given(attn_mask, is_causal))
    else:
        _refuse_masks(attn_mask, is_causal)
        attended = block.attn(block.norm1(x), rope=rope)
        x = x + block.drop_path1(_scaled(attended, block.gamma_1))
        x = state.reduce(x, layer, block.attn.scale)
        x = x + block.drop_path2(_scaled(block.mlp(block.norm2(x)), block.gamma_2))
    return state.leave(x, layer)


def _scaled(x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
    return x if gamma is None else gamma * x


def _eva_attention_forward(
    state: TokenState,
    layer: int,
    attn: nn.Module,
    original: Callable,
    x: torch.Tensor,
    rope: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    bias = state.key_bias()
    if bias is None and not state.reduces(layer):
        return original(x, rope=rope, **_given(attn_mask, is_causal))
    _refuse_masks(attn_mask, is_causal)
    _refuse_dropout(attn)
    heads = [part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in _parts(attn, x)]
    q, k, v = attn.q_norm(heads[0]), attn.k_norm(heads[1]), heads[2]
    if rope is not None:
        q, k = (_rotated(part, rope, attn).type_as(v) for part in (q, k))
    for name, part in (("q", q), ("k", k), ("v", v)):
        state.keep_projection(name, part, _as_they_are)
    if bias is None:
        out = functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)
    else:
        out, lse = tokred.biased_attention(q, k, v, key_bias=bias, scale=attn.scale)
        state.keep_lse(lse)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _parts(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [B, N, H D] of timm's EvaAttention."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    qkv = attn.qkv(x)
    if attn.q_bias is not None:
        qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return qkv.chunk(3, -1)


def _rotated(heads: torch.Tensor, rope: torch.Tensor, attn: nn.Module) -> torch.Tensor:
    """Heads [B, H, N, D] with the patches rotated, the prefix as it is."""
    from timm.layers import apply_rot_embed_cat

    prefix: Any = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(
        heads[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False)
    )
    return torch.cat([heads[:, :, :prefix], rotated], 2)


def _given(attn_mask: torch.Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments of a block or an attention; earlier releases of timm have no is_causal."""
    return {"attn_mask": attn_mask, **({"is_causal": True} if is_causal else {})}


def _refuse_masks(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("layers that see merged tokens take no attn_mask and no is_causal")


def _refuse_dropout(attn: nn.Module) -> None:
    if attn.training and attn.attn_drop.p > 0:
        raise ValueError(
            f"proportional attention has no dropout, but attn_drop is {attn.attn_drop.p}: set it "
            "to 0, call model.eval(), or patch with prop_attn=False"
        )


def _refuse_intermediates(original: Callable, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "forward_intermediates and get_intermediate_layers need every token in every block, and "
        "this model is patched to merge them: patch with restore_tokens=True, call them outside "
        "the patch, or take forward_features and handle.unmerge inside"
    )


def _attention_pool_forward(
    state: TokenState, original: Callable, x: torch.Tensor, attn_mask: torch.Tensor | None = None
) -> torch.Tensor:
    size = state.final_size(x)
    if size is not None:
        # The pool may have been given the patches without the prefix.
        bias = size.log()[:, None, None, -x.shape[1] :].to(x.dtype)
        attn_mask = bias if attn_mask is None else attn_mask + bias
    return original(x, attn_mask=attn_mask)


def _weighted_pool(
    state: TokenState, original: Callable, x: torch.Tensor, pool_type: str | None = None
) -> torch.Tensor:
    size = state.final_size(x)
    if size is None or pool_type not in (None, "avg"):
        return original(x, pool_type)
    patches = x[:, state.num_prefix :]
    weight = size[:, state.num_prefix :, None]
    return ((patches * weight).sum(1) / weight.sum(1)).to(x.dtype)
