"""A vision transformer with ToMe: fewer tokens from layer to layer, and all of them back.

    python examples/vit_tome.py

The weights are random, so only the number of tokens and the time say something here; with your own
checkpoint nothing else changes.
"""

from __future__ import annotations

import time

import torch
from transformers import ViTConfig, ViTModel

import tokred

torch.manual_seed(0)
model = ViTModel(ViTConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3)).eval()
images = torch.randn(2, 3, 224, 224)


def milliseconds() -> float:
    """The best of three forward passes."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(images)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


with torch.inference_mode():
    before = model(images).last_hidden_state
    print(f"unpatched: {before.shape[1]} tokens, {milliseconds():.0f} ms")

    # Every layer merges the 12 most similar pairs of tokens, between attention and MLP.
    with tokred.patch(model, "tome", r=12, trace_source=True) as handle:
        merged = model(images).last_hidden_state
        print(f"ToMe:      {merged.shape[1]} tokens, {milliseconds():.0f} ms")

        # One feature for every patch again: that of the token it was merged into.
        features = handle.unmerge(merged)
        print(f"unmerged:  {features.shape[1]} tokens")

    after = model(images).last_hidden_state
    print("restored: ", torch.equal(before, after))
