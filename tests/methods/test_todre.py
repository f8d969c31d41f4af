"""ToDRE's two rules against greedy picks with the matrix of distances, and its second stage."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import check_rows, padding, visual_call
from tokred.methods.todre import TodreOptions, select_tokens, visual_share
from tokred.patching import PromptCall


def transcription(
    x: torch.Tensor, valid: list[int], k: int, rule: str, order: str = "position"
) -> list[int]:
    rows = x[valid].double()
    unit = functional.normalize(rows, dim=-1)
    distance, chosen = 1 - unit @ unit.T, []
    for _ in range(min(k, len(valid))):
        among = distance[:, chosen]
        value = (among.sum(1) if rule == "sum" else among.amin(1)) if chosen else rows.norm(dim=1)
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
    picks = [valid[i] for i in chosen]
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["sum", "min"])
@pytest.mark.parametrize(("k", "order"), [(0, "score"), (9, "position"), (50, "score")])
def test_picks(dtype: torch.dtype, rule: str, k: int, order: str) -> None:
    x = tokens_of(3, 40).to(dtype)
    check_rows(select_tokens, transcription, [x], padding(3, 40), k=k, rule=rule, order=order)


def test_a_given_start() -> None:
    start = torch.tensor([7, 3], dtype=torch.int32)
    found = select_tokens(tokens_of(2, 12), 4, order="score", start=start)
    assert found[:, 0].tolist() == [7, 3]


def test_in_an_image() -> None:
    call = visual_call()
    kept = TodreOptions(keep=6, rule="min").reduce_visual(call)
    assert torch.equal(kept, select_tokens(call.tokens, 6, rule="min"))


def test_second_stage() -> None:
    """A row that hardly attends to its image loses it."""
    q = torch.zeros(2, 1, 8, 4)
    k = torch.zeros(2, 1, 8, 4)
    q[..., 0], k[0, :, 1:5, 0], k[1, :, 1:5, 0] = 1, 3, -3
    visual = torch.zeros(2, 8, dtype=torch.bool)
    visual[:, 1:5] = True
    slots = torch.arange(1, 5, dtype=torch.int32).repeat(2, 1)
    call = PromptCall(
        torch.randn(2, 8, 4), 2, 4, torch.ones(2, 8, dtype=torch.bool), visual, slots,
        torch.tensor([4, 4]), previous=lambda: (q, k), scale=1.0,
    )  # fmt: skip
    matrix = (q @ k.mT)[:, 0].masked_fill(~torch.ones(8, 8).tril().bool(), -torch.inf).softmax(-1)
    received = matrix[:, 5:].mean(1)
    expected = received[:, 1:5].sum(1) / (received.sum(1) - received[:, 1:5].sum(1))
    share = visual_share(call.received_attention(call.after_images), visual, ~visual)
    torch.testing.assert_close(share, expected)
    found = TodreOptions(threshold=0.5).prune(call)
    assert found.tolist() == [[0, 1, 2, 3], [-1] * 4]
    assert TodreOptions().prune_layers(32) == []
    assert TodreOptions(threshold=0.5).prune_layers(32) == [16, 20, 24, 28]
    assert TodreOptions(threshold=0.5).prune_layers(2) == [1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match='rule must be "sum" or "min"'):
        select_tokens(torch.ones(1, 4, 3), 2, rule="max")
    with pytest.raises(ValueError, match="checks must be at least 1, got 0"):
        TodreOptions(checks=0)
