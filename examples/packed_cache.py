"""A language model that decodes from keys and values of 4 bits.

    python examples/packed_cache.py

The weights are random; with a checkpoint nothing else changes.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tokred
from tokred.integrations.transformers import attention

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()
# Attention that reads packed tokens as they are.
model.set_attn_implementation(attention.register())
prompt = torch.randint(config.vocab_size, (1, 1024))

# Before transformers 5.24 `cache` is called `past_key_values`.
caches = {
    "whole": DynamicCache(config=config),
    "4 bits": tokred.PackedCache(config, bits=4),
    "2 bits": tokred.PackedCache(config, bits=2),
}
with torch.inference_mode():
    logits = {}
    for name, cache in caches.items():
        model(prompt[:, :-1], cache=cache)
        logits[name] = model(prompt[:, -1:], cache=cache).logits[0, -1]

for name in ("4 bits", "2 bits"):
    similar = torch.cosine_similarity(logits["whole"], logits[name], dim=0)
    size = caches[name].bytes_per_token()
    print(f"{name}: {size:.0f} bytes a token, logits' cosine {similar:.4f}")

head_dim = config.hidden_size // config.num_attention_heads
numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
print(f"whole:  {4 * numbers} bytes a token")

cache = tokred.PackedCache(config, bits=4)
text = model.generate(prompt, cache=cache, max_new_tokens=16, do_sample=False)
print(f"generated {text.shape[1] - prompt.shape[1]} tokens from the packed cache")
