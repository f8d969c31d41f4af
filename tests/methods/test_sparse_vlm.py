"""SparseVLM's raters, scores, counts and clusters against the published formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from cases.prompts import attention_of, cut, picks_of, prompt_call, ranked
from cases.tiny_vlms import FAMILIES
from tokred.methods._visual import VisualOptions
from tokred.methods.sparse_vlm import (
    SparseVlmOptions,
    adaptive_count,
    rated_scores,
    recycle,
    sparse_vlm,
    text_raters,
)
from tokred.patching import Patch, PromptCall, PromptTokens, Settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [13, 700])
def test_raters(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(2, tokens, 8, generator=generator).to(dtype)
    text = torch.randn(2, 9, 8, generator=generator).to(dtype)
    seen, said = torch.ones(2, tokens).bool(), torch.ones(2, 9).bool()
    seen[1, 6:], said[1, :4] = False, False
    got = text_raters(visual, text, seen, said)
    for row in range(2):
        share = (visual[row, seen[row]] @ text[row, said[row]].T).double().softmax(-1).mean(0)
        assert got[row, said[row]].tolist() == (share > share.mean()).tolist()
    assert not got[1, :4].any()
    assert torch.equal(text_raters(visual[1:], text[1:], seen[1:], said[1:]), got[1:])
    same = text_raters(visual, torch.ones(2, 9, 8, dtype=dtype), None, said)
    assert torch.equal(same, said)  # none is above the mean


def test_rated_scores() -> None:
    call = prompt_call()
    raters = call.after_images.clone()
    raters[0, -3:], raters[2, -6:] = False, False
    matrix, (q, k) = attention_of(call, "previous"), call.previous()
    got = rated_scores(q, k, raters, call.scale, call.valid)
    for row in range(3):
        expected = matrix[row][:, raters[row]].mean((0, 1)).float()
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-5)


def test_adaptive_count() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(5, 2, generator=generator) @ torch.rand(2, 12, generator=generator)
    full = torch.rand(5, 12, generator=generator)
    attention = torch.stack([low, full])
    assert adaptive_count(attention).tolist() == [2, 5]
    assert adaptive_count(attention, 0.5).tolist() == [7, 9]  # 12 - 5, 12 - 3
    valid = torch.tensor([[True] * 12, [True] * 3 + [False] * 9])
    assert adaptive_count(attention, valid=valid).tolist() == [2, 3]


def test_a_stage_keeps_the_best() -> None:
    assert sparse_vlm(torch.tensor([[0.1, 0.5, 0.5, torch.nan]]), 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_tokens_come_back_as_means_of_clusters(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 8, generator=generator).to(dtype)
    scores = torch.rand(2, 60, generator=generator)
    kept = sparse_vlm(scores, 10)
    back = recycle(x, scores, kept)
    members = int(50 * 0.3) + 1
    clusters = members // 10 + 1
    assert back.shape == (2, clusters, 8) and back.dtype == dtype
    for row in range(2):
        dropped = sorted({*range(60)} - {*kept[row].tolist()})
        again = [dropped[i] for i in ranked(scores[row, dropped].tolist(), members)]
        _, assignment = tokred.dpc_knn(x[row : row + 1, again], clusters, k=clusters)
        for cluster in range(clusters):
            mean = x[row, again][assignment[0] == cluster].double().mean(0)
            torch.testing.assert_close(back[row, cluster], mean.to(dtype), rtol=1e-2, atol=1e-2)
    assert recycle(x, scores, torch.arange(60).int().repeat(2, 1)).shape == (2, 0, 8)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\] and group at least 1"):
        recycle(x, scores, kept, share=1.5)


def test_three_stages_in_a_prompt() -> None:
    method = SparseVlmOptions(keep=10, recycle=False)  # 66, 30 and 17 times 10 / 64
    assert method.prune_layers(32) == [0, 3, 7, 16]
    call = prompt_call(layer=0, num_layers=32)
    assert method.prune(call) is None
    text = torch.where(call.after_images, 1, 0)
    raters = torch.zeros_like(call.valid)
    for row in range(2):
        share = call.hidden[row, call.visual[row]] @ call.hidden[row, -7:].T
        share = share.softmax(-1).mean(0)
        raters[row, -7:] = share > share.mean()
    raters[2] = text[2].bool()  # without an image all words are alike
    for layer, counts in ((3, (10, 10, 0)), (7, (4, 4, 0)), (16, (2, 2, 0))):
        call.layer = layer
        matrix, wanted = attention_of(call, "previous"), []
        for row, left in enumerate(counts):
            slots = [s for s in call.slots[row].tolist() if s >= 0]
            seen = matrix[row][:, raters[row]][:, :, slots].mean((0, 1))
            wanted.append(ranked(seen.float().tolist(), left))
        chosen = method.prune(call)
        assert picks_of(chosen) == wanted
        call = cut(call, chosen)


def test_dropped_tokens_take_the_places_of_centres() -> None:
    """In every row, the tokens that `recycle` makes of its own visual tokens."""
    call = prompt_call(layer=0, num_layers=32)
    SparseVlmOptions().prune(call)
    call.layer = 3
    plain = SparseVlmOptions(keep=10, recycle=False).prune(call)
    found = SparseVlmOptions(keep=10).prune(call)
    assert torch.equal(found.slots, plain)
    (raters,) = call.carried.values()
    scores = call.of_visual(rated_scores(*call.previous(), raters, call.scale, call.valid))
    for row, tokens in enumerate((24, 17, 0)):
        kept = [i for i in plain[row].tolist() if i >= 0]
        made = [i for i in found.made[row].tolist() if i >= 0]
        places = call.slots[row, :tokens].long()
        dropped = tokens - len(kept)
        members = int(dropped * 0.3) + 1 if dropped else 0
        assert len(made) == (members // 10 + 1 if dropped else 0)
        assert not {*made} & {*kept} and len({*made}) == len(made)
        assert max(made, default=-1) < tokens
        if not dropped:
            continue
        x, picks = call.hidden[row, places][None], torch.tensor([kept], dtype=torch.int32)
        expected = recycle(x, scores[row : row + 1, :tokens], picks)[0]
        assert torch.equal(found.tokens[row, : len(made)], expected)
    assert not found.tokens[2].any()
    call.hidden.requires_grad_()
    SparseVlmOptions(keep=10).prune(call).tokens.sum().backward()
    kept = call.slots[0, plain[0, :10].long()].long()
    assert call.hidden.grad[0].any() and not call.hidden.grad[0, kept].any()


def test_recycled_tokens_in_a_model() -> None:
    """The layer behind a stage gets them in their places."""
    family = next(family for family in FAMILIES if family.name == "llava")
    model, inputs = family.model(), family.prompt((1, 2))
    layer = model.model.language_model.layers[1]
    given: list[torch.Tensor] = []
    hook = layer.mlp.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    lengths = {}
    for recycled in (False, True):
        options = {"keep": 32, "stages": (1, 2, 3), "recycle": recycled}
        with torch.no_grad(), tokred.patch(model, "sparse_vlm", **options):
            model(**inputs)
        lengths[recycled] = given[-1].shape[1]
    hook.remove()
    assert lengths[True] > lengths[False]

    class Writing(VisualOptions):
        def prune_layers(self, num_layers: int) -> list[int]:
            return [1]

        def prune(self, call: PromptCall) -> PromptTokens:
            made = torch.tensor([[3, -1], [1, 2]], dtype=torch.int32)
            stay = torch.tensor([[0], [5]], dtype=torch.int32)
            tokens = torch.full((2, 2, call.hidden.shape[2]), 7.0)
            tokens[1, 1] = 9.0
            return call.made(stay, made, tokens)

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])

    hook = layer.input_layernorm.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), Patch(model, Writing(), Settings()):
        model(**inputs)
    hook.remove()
    x = given[-1]
    assert (x == 7).all(-1).sum(1).tolist() == [1, 1] and (x == 9).all(-1).sum(1).tolist() == [0, 1]
    first, second = (int((row == 7).all(-1).int().argmax()) for row in x)
    assert (x[1, second + 1] == 9).all() and not (x[1, second + 2] == 9).any()
    assert not (x[0, first - 1] == 7).all()


def test_one_prompt_gives_the_same_as_many() -> None:
    method = SparseVlmOptions(keep=10)
    for visual in ((24,), (24, 17)):
        call = prompt_call(layer=0, num_layers=32, visual=visual)
        method.prune(call)
        (raters,) = call.carried.values()
        share = (call.hidden[0, call.visual[0]] @ call.hidden[0, -7:].T).softmax(-1).mean(0)
        assert raters[0, -7:].tolist() == (share > share.mean()).tolist()
        assert not raters[0, :-7].any()


def test_published_counts() -> None:
    def counts(**options: float) -> list[int]:
        method = SparseVlmOptions(**options)
        return [
            int(method.left(torch.tensor(576.0, dtype=torch.float64), stage, 3) + 1e-9)
            for stage in range(3)
        ]

    assert counts(keep=192) == [300, 200, 110] and counts(keep=128) == [303, 110, 36]
    assert counts() == [66, 30, 17] and counts(ratio=1.0) == [576, 576, 576]
    assert counts(keep=32) == [33, 15, 8]
    with pytest.raises(ValueError, match="stages must be three layers, got"):
        SparseVlmOptions(stages=(1, 2))
