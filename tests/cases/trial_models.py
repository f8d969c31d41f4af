"""A tiny decoder and a tiny encoder that methods are tried on, and what they read."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 128


@cache
def decoder() -> nn.Module:
    """Two layers and 256 positions; its weights are large, so that attention is on few tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@cache
def encoder() -> nn.Module:
    """Three layers of 37 tokens."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8,
        intermediate_size=32, initializer_range=0.2,
    )  # fmt: skip
    return transformers.ViTModel(config).eval()


def tokens(rows: int = 1, length: int = 41) -> Tensor:
    """i64 [rows, length]."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def images(count: int = 2) -> Tensor:
    """f32 [count, 3, 48, 48]."""
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(2))
