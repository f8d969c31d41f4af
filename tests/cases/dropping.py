"""Dropping tokens in a tiny ViT in plain torch, with whole attention matrices: the oracle of the
methods that choose the tokens which stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import heads, tiny_timm


@dataclass(frozen=True)
class Layer:
    """One layer after its attention: q, k, v [B, H, N, D], attention [B, H, N, N], x [B, N, C]."""

    number: int
    q: Tensor
    k: Tensor
    v: Tensor
    attention: Tensor
    x: Tensor


def lively_timm(**options: Any) -> nn.Module:
    """A tiny ViT of three layers whose weights are large enough for every step to matter."""
    torch.manual_seed(0)
    model = tiny_timm(**options).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def dropped(model: nn.Module, pixels: Tensor, choose: Callable[[Layer], Tensor | None]) -> Tensor:
    """What forward_features gives where `choose` says which tokens [B, K] stay in each layer."""
    seen: dict[str, Tensor] = {}
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model.forward_features(pixels)
    hook.remove()
    x = seen["x"]
    for number, block in enumerate(model.blocks):
        projected = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        q, k, v = (heads(part, block.attn.num_heads) for part in projected)
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        kept = choose(Layer(number, q, k, v, attention, x))
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)


@torch.no_grad()
def check_dropping(
    method: str,
    options: dict[str, Any],
    choose: Callable[[Layer], Tensor | None],
    **model_options: Any,
) -> None:
    """The patched model gives what the oracle gives, for two images and for one of them."""
    model, pixels = lively_timm(**model_options), torch.randn(2, 3, 48, 48)
    expected = dropped(model, pixels, choose)
    with tokred.patch(model, method, **options) as handle:
        given = model.forward_features(pixels)
        assert handle.counts[-1] == expected.shape[1] < handle.counts[0]
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model.forward_features(pixels[1:]), given[1:])
