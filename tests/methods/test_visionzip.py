"""VisionZip, token by token in plain torch, and in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.tiny_vlms import FAMILIES
from tokred.methods.visionzip import VisionzipOptions, visionzip_map
from tokred.patching import EncoderStates, VisualCall

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {family.name: family for family in FAMILIES}


def expected_map(importance: Tensor, keys: Tensor, dominant: int, contextual: int) -> list[int]:
    """The map of one image, token by token."""
    tokens = len(importance)
    order = sorted(range(tokens), key=lambda i: (-float(importance[i]), i))
    links = {i: i for i in order[:dominant]}
    rest = [i for i in range(tokens) if i not in links]
    if contextual == 0:
        return [links.get(i, -1) for i in range(tokens)]
    step = len(rest) // contextual
    targets = rest[::step][:contextual]
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    for i in rest:
        similarity = [float(unit[i] @ unit[t]) for t in targets]
        links[i] = i if i in targets else targets[similarity.index(max(similarity))]
    return [links[i] for i in range(tokens)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dominant", "contextual"),
                         [(36, 7, 3), (36, 10, 0), (20, 12, 8), (11, 1, 1), (9, 2, 4)])  # fmt: skip
def test_map(batch: int, dtype: torch.dtype, tokens: int, dominant: int, contextual: int) -> None:
    torch.manual_seed(tokens)
    importance = torch.rand(batch, tokens)
    keys = torch.randn(batch, tokens, 16, dtype=dtype)
    links = visionzip_map(importance, keys, dominant, contextual)
    for b in range(batch):
        assert links[b].tolist() == expected_map(importance[b], keys[b], dominant, contextual)


def test_ties_and_scores_without_a_number() -> None:
    keys = torch.ones(2, 6, 4)
    importance = torch.zeros(2, 6)
    importance[1, :2] = torch.nan
    links = visionzip_map(importance, keys, 2, 2)
    assert links.tolist() == [[0, 1, 2, 2, 4, 2], [0, 0, 2, 3, 4, 0]]


def call_of(x: Tensor, q: Tensor, k: Tensor, prefix: int) -> VisualCall:
    slots = torch.arange(x.shape[1], dtype=torch.int32)[None]
    return VisualCall(x, encoder=EncoderStates(2, prefix, slots, {0: lambda: (q, k)}, {0: 0.5}))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_a_call(prefix: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30, 8, dtype=dtype)
    q, k = torch.randn(2, 2, 1, 4, 30 + prefix, 16, dtype=dtype)
    result = VisionzipOptions(keep=10, contextual_share=0.3).reduce_visual(call_of(x, q, k, prefix))
    attention = (q[:, 0].float() @ k[:, 0].float().transpose(-1, -2) * 0.5).softmax(-1)
    importance = (attention[:, :, 0] if prefix else attention.mean(2)).mean(1)[:, prefix:]
    keys = k[:, 0].float().mean(1)[:, prefix:]
    for b in range(2):
        links = torch.tensor(expected_map(importance[b], keys[b], 7, 3))
        stays = [i for i in range(30) if links[i] == i]
        assert result.indices[b].tolist() == stays
        expected = torch.stack([x[b, links == i].float().mean(0) for i in stays])
        torch.testing.assert_close(result.tokens[b].float(), expected, rtol=1e-2, atol=1e-2)
        assert [stays[slot] for slot in result.token_map[b]] == links.tolist()


def test_all_tokens_stay_as_they_are() -> None:
    assert VisionzipOptions(keep=64).reduce_visual(VisualCall(torch.zeros(1, 20, 4))) is None


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
@torch.no_grad()
def test_in_models(name: str) -> None:
    family = BY_NAME[name]
    model, inputs = family.model(), family.prompt((1, 2, 0))
    with tokred.patch(model, "visionzip", keep=5, newlines="drop") as handle:
        tokens = model.generate(**inputs, max_new_tokens=3)
    assert [kept for _, kept in handle.states[0].counts] == [5, 5, 5]
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"contextual_share must be in \[0, 1\), got 1"):
        VisionzipOptions(contextual_share=1.0)
    with pytest.raises(ValueError, match="reads layer -9 of the vision encoder, which has 3"):
        tokred.patch(BY_NAME["llava"].model(), "visionzip", layer=-9)
