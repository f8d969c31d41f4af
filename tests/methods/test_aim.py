"""AIM's merging, ranking and schedule against the published formulas."""

from __future__ import annotations

import pytest
import torch

from cases.dense_tome import mean_of, tome_groups, tome_links
from cases.groups import tokens_of
from cases.prompts import attention_of, cut, picks_of, prompt_call, ranked
from tokred.methods.aim import (
    AimOptions,
    first_members,
    importance,
    keep,
    keep_rate,
    merge_frames,
    merge_to,
)
from tokred.patching import VisualCall


@pytest.mark.parametrize("tokens", (16, 19))
def test_a_quarter_of_every_frame_is_left(tokens: int) -> None:
    x = tokens_of(2, 3 * tokens).view(2, 3, tokens, 16)
    done = merge_frames(x)
    left = tokens - tokens // 2
    second = min(tokens // 4, left // 2)
    assert done.tokens.shape == (2, 3 * (left - second), 16)
    assert done.token_map.shape == (2, 3 * tokens)
    for item in range(2):
        for frame in range(3):
            rows = x[item, frame]
            groups = [[i] for i in range(tokens)]
            for r in (tokens // 2, second):
                taken = {source for source, _ in tome_links(rows, r)}
                lists = {min(set(g) - taken): g for g in tome_groups(rows, r)}
                # Sources that stay come by descending similarity, then destinations by position.
                every = tome_links(rows, len(rows))
                order = [s for s, _ in every[r:]] + list(range(1, len(rows), 2))
                lists = [lists[start] for start in order]
                rows = torch.stack([mean_of(rows, g) for g in lists])
                groups = [sorted(t for member in g for t in groups[member]) for g in lists]
            first = frame * len(groups)
            torch.testing.assert_close(done.tokens[item, first : first + len(groups)], rows)
            for slot, group in enumerate(groups):
                where = done.token_map[item, [frame * tokens + t for t in group]]
                assert (where == first + slot).all()


@pytest.mark.parametrize("causal", (True, False))
def test_importance(causal: bool) -> None:
    q = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    k = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(1))
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    if causal:
        logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    attention = (logits / 0.1).softmax(-1)
    rank = torch.full((2, 4, 1, 12), 1 / 12, dtype=torch.float64)
    for _ in range(5):
        rank = rank @ attention
    expected = rank[:, :, 0].square().mean(1).sqrt().float()
    torch.testing.assert_close(importance(q, k, causal=causal), expected, rtol=1e-4, atol=1e-6)


def test_keep_rate() -> None:
    assert [keep_rate(layer) for layer in (0, 13, 14, 20, 21, 27)] == [1, 1, 0.875, 0.125, 0, 0]


def test_keep() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.4, 0.8, 0.2]]).repeat(2, 1)
    text = torch.tensor([[True, False, False, False, False, True]])
    present = torch.tensor([[True] * 6, [True, False, True, True, True, True]])
    assert keep(scores, 0.5, text)[0].tolist() == [True, True, False, False, True, True]
    stays = keep(scores, 0.5, text, present)
    assert stays[1].tolist() == [True, False, True, False, True, True]
    assert torch.equal(keep(scores, 0.0, text), text.expand(2, -1))
    assert keep(scores, 1.0, text, present)[1].tolist() == present[1].tolist()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"shares must be in \[0, 1\), got 1.5"):
        merge_frames(torch.zeros(1, 1, 4, 2), (1.5,))
    with pytest.raises(ValueError, match=r"got \[4, 2\]"):
        merge_frames(torch.zeros(4, 2))


@pytest.mark.parametrize("k", (20, 11, 10, 3, 1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_merge_to(k: int, dtype: torch.dtype) -> None:
    """Every slot is a mean of means of the tokens that went to it."""
    x = tokens_of(2, 20).to(dtype)
    tokens, token_map = merge_to(x, k)
    assert tokens.shape == (2, k, 16) and tokens.dtype == dtype
    for item in range(2):
        assert {*token_map[item].tolist()} == {*range(k)}
        for slot in range(k):
            group = x[item, token_map[item] == slot].double()
            low, high = group.amin(0), group.amax(0)
            assert (tokens[item, slot] >= low - 0.02).all() and (
                tokens[item, slot] <= high + 0.02
            ).all()
    if k == 11:  # one step, of means of two and more
        rows = torch.stack(
            [mean_of(x[0], (token_map[0] == s).nonzero()[:, 0].tolist()) for s in range(k)]
        )
        torch.testing.assert_close(tokens[0], rows.to(dtype), rtol=1e-2, atol=1e-2)
    first = first_members(token_map, k)
    for item, slots in enumerate(first.tolist()):
        assert slots == [token_map[item].tolist().index(slot) for slot in range(k)]
    assert first_members(torch.tensor([[-1, 1, 1]]).int(), 3).tolist() == [[-1, 1, -1]]
    for wrong in (0, 21):
        with pytest.raises(ValueError, match=f"k must be from 1 to 20, got {wrong}"):
            merge_to(x, wrong)


def test_stages_in_a_prompt() -> None:
    method = AimOptions()
    assert method.prune_layers(32) == list(range(14, 22))
    call = prompt_call(num_layers=32)
    for layer in (14, 15, 20, 21):
        call.layer = layer
        (q, k), matrix = call.previous(), attention_of(call, "previous")
        logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * call.scale / 0.1
        attention = logits.masked_fill(matrix == 0, -torch.inf).softmax(-1).nan_to_num()
        rank, wanted = torch.full((3, 4, 1, matrix.shape[-1]), 1.0, dtype=torch.float64), []
        for _ in range(5):
            rank = rank @ attention
        scores = rank[:, :, 0].square().mean(1).sqrt()
        for row, count in enumerate((24, 17, 0)):
            slots = [s for s in call.slots[row].tolist() if s >= 0]
            wanted.append(ranked(scores[row, slots].tolist(), int(count * keep_rate(layer))))
        chosen = method.prune(call)
        assert picks_of(chosen) == wanted
        call = cut(call, chosen)
    assert (chosen == -1).all()
    assert AimOptions(last=1.0).left(torch.tensor([24.0]), 7, 8).tolist() == [24]
    with pytest.raises(ValueError, match=r"last must be in \[0, 1\], got 2"):
        AimOptions(last=2)


def test_the_tokens_of_an_image_are_merged() -> None:
    call = VisualCall(tokens_of(2, 20))
    done = AimOptions(ratio=0.25).reduce_visual(call)
    tokens, token_map = merge_to(call.tokens, 5)
    assert torch.equal(done.tokens, tokens) and torch.equal(done.token_map, token_map)
    assert torch.equal(done.indices, first_members(token_map, 5))
