"""A method of your own: choose, layer by layer, the keys that a language model attends to.

    python examples/own_method.py

A method is a dataclass of options. `attention` returns an object whose `attend` runs in place of
every full-attention layer: it gets the layer's queries, keys and values, and returns its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tokred
from tokred.patching import AttentionCall, Patch, Settings


@dataclass(frozen=True)
class GroupTopK:
    """Keep the k keys of largest logit in a group of query heads, and the last `local` ones."""

    k: int = 64
    local: int = 16

    adapters = ("causal_lm",)  # it is for decoders of transformers
    rotation = "cached"  # with keys as the model caches them

    def attention(self, layers: Sequence[int]) -> GroupTopKSelector:
        return GroupTopKSelector(self)


class GroupTopKSelector:
    """A tokred.patching.KeySelector: one object for all layers, without state."""

    def __init__(self, options: GroupTopK) -> None:
        self.options = options

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if call.is_prompt or call.num_keys <= self.options.k:
            return call.dense()
        scores = call.score("group_max")  # f32 [B, Hkv, N]
        chosen = tokred.topk(
            scores, self.options.k, order="position", num_locals=self.options.local
        )[1]
        return call.attend_to(chosen[:, :, None], block_q=1)


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(config.vocab_size, (1, 1024))


@torch.inference_mode()
def next_logits() -> Tensor:
    """Of the token after the prompt; its last token is decoded on its own."""
    cache = DynamicCache(config=config)
    model(prompt[:, :-1], cache=cache)  # `past_key_values` before transformers 5.24
    return model(prompt[:, -1:], cache=cache).logits[0, -1]


whole = next_logits()
for k in (1024, 256, 64):
    with Patch(model, GroupTopK(k), Settings()):
        similar = torch.cosine_similarity(next_logits(), whole, dim=0)
    print(f"k = {k} of {prompt.shape[1]} keys: logits' cosine {similar:.4f}")
