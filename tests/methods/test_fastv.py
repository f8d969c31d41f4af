"""FastV against attention in plain torch, and in models against layers run by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.tiny_vlms import FAMILIES, IMAGES
from cases.vlm_oracle import Row, greedy, language_of, logits_of, rows_of
from tokred.methods.fastv import FastvOptions
from tokred.patching import PromptCall

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prunes_by_the_attention_of_the_last_token(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 12, 16, dtype=dtype), torch.randn(2, 2, 12, 16, dtype=dtype)
    valid = torch.tensor([[1] * 12, [0] * 4 + [1] * 8]).bool()
    visual = torch.tensor([[0] + [1] * 7 + [0] * 4, [0] * 5 + [1] * 4 + [0] * 3]).bool()
    slots = torch.tensor([[*range(1, 8)], [5, 6, 7, 8, -1, -1, -1]], dtype=torch.int32)
    call = PromptCall(torch.zeros(2, 12, 4), 2, 4, valid, visual, slots, visual.sum(1).int(),
                      previous=lambda: (q, k), scale=0.25)  # fmt: skip
    logits = q[:, :, -1:].float() @ k.float().repeat_interleave(2, 1).transpose(-1, -2) * 0.25
    weights = logits.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1).mean(1)[:, 0]
    for options, counts in ((FastvOptions(), (4, 2)), (FastvOptions(keep=3), (3, 3))):
        chosen = options.prune(call)
        for b, count in enumerate(counts):
            score = weights[b][slots[b][slots[b] >= 0].long()]
            expected = score.argsort(descending=True)[:count].sort().values
            assert chosen[b][chosen[b] >= 0].tolist() == expected.tolist()


@torch.no_grad()
def dropped(model: torch.nn.Module, row: Row, layer: int) -> dict[int, Tensor]:
    """What goes before that layer, from eager attention of the one before."""
    language = language_of(model.model)
    attention = language.layers[layer - 1].self_attn
    seen = {}
    handles = [
        projection.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
        for name, projection in (("q", attention.q_proj), ("k", attention.k_proj))
    ]
    tables = {}
    handles.append(
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: tables.update(kwargs), with_kwargs=True
        )
    )
    logits_of(model, row)
    for handle in handles:
        handle.remove()
    dim = attention.head_dim
    q, k = (seen[name].unflatten(-1, (-1, dim)).transpose(1, 2) for name in ("q", "k"))
    cos, sin = (table[:, None] for table in tables["position_embeddings"])

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    groups = q.shape[1] // k.shape[1]
    scores = rotated(q)[:, :, -1][:, :, None] @ rotated(k).repeat_interleave(groups, 1).mT
    score = (scores * attention.scaling).softmax(-1).mean(1)[0, 0]
    visual = (row.image >= 0).nonzero()[:, 0]
    count = max(round(len(visual) * 0.5), 1) if len(visual) else 0
    order = score[visual].argsort(descending=True, stable=True)
    return {layer: visual[order[count:]]}


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl", "paligemma"])
@torch.no_grad()
def test_in_models(name: str) -> None:
    family = BY_NAME[name]
    model, inputs = family.model(), family.prompt((1, 2, 0))
    rows = rows_of(model, name, inputs)
    with tokred.patch(model, "fastv"):
        output = model(**inputs)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False,
                                suppress_tokens=list(IMAGES))  # fmt: skip
    for number, row in enumerate(rows):
        drops = dropped(model, row, 2)
        expected = logits_of(model, row, drops)
        actual = output.logits[number, -len(expected) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        start = inputs["input_ids"].shape[1]
        assert tokens[number, start:].tolist() == greedy(model, row, 3, drops)


def test_refusals() -> None:
    model = BY_NAME["llava"].model()
    for options, words in (
        (dict(ratio=0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (dict(keep=0), "keep must be at least 1, got 0"),
        (dict(layer=0), "layer must be at least 1, got 0"),
        (dict(layer=4), "layer must be below the model's 4, got 4"),
    ):
        with pytest.raises(ValueError, match=words):
            tokred.patch(model, "fastv", **options)
