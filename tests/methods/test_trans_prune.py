"""TransPrune's two scores and its stages against the published formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases.prompts import attention_of, cut, picks_of, prompt_call, ranked
from tokred.methods.trans_prune import TransPruneOptions, trans_prune, transition_variation
from tokred.patching import LayerStates

pytestmark = pytest.mark.usefixtures("one_thread")


def variation(before: Tensor, after: Tensor) -> Tensor:
    """The variation of one row's real tokens [N, C], in float64."""
    before, after = before.double(), after.double()
    turn = (1 - torch.cosine_similarity(before, after, -1)).exp()
    return after.norm(dim=-1) / before.norm(dim=-1) * turn / turn.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_variation(dtype: torch.dtype) -> None:
    before, after = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    got = transition_variation(before, after, mask)
    assert got.dtype == torch.float32 and not got[1, :4].any()
    torch.testing.assert_close(got[0], variation(before[0], after[0]).float())
    torch.testing.assert_close(got[1, 4:], variation(before[1, 4:], after[1, 4:]).float())
    alone = transition_variation(before[1:], after[1:], mask[1:])
    assert torch.equal(alone, got[1:])
    torch.testing.assert_close(transition_variation(before, after)[0], got[0])


def test_shares_are_added() -> None:
    change = torch.tensor([[1.0, 3.0, 0.0, 9.0]]).repeat(2, 1)
    seen = torch.tensor([[0.4, 0.0, 0.4, 0.2]]).repeat(2, 1)
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    # .25 + .5, .75 + 0, 0 + .5; and 1/13 + .4, 3/13, .4, 9/13 + .2
    assert trans_prune(change, seen, 2, valid).tolist() == [[0, 1], [0, 3]]
    assert trans_prune(change, seen, 4, order="score")[1].tolist() == [3, 0, 2, 1]


def test_three_stages_in_a_prompt() -> None:
    method = TransPruneOptions(ratio=0.125)
    assert method.prune_layers(32) == [7, 9, 12] and method.watch(32) == [6, 7, 8, 9, 10, 11]
    call = prompt_call(layer=7, num_layers=32)
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(call.valid.shape, dtype=torch.float64)
    for stage, layer in enumerate((7, 9, 12)):
        states = torch.randn(4, *call.hidden.shape, generator=generator)
        method.observe(LayerStates(layer - 1, 32, *states, call.valid, call.visual, call.carried))
        for row, there in enumerate(call.valid):
            for before, after in ((0, 1), (2, 3)):
                total[row, there] += variation(
                    states[before, row, there], states[after, row, there]
                )
        call.layer = layer
        attention, wanted = attention_of(call, "following").mean(1), []
        for row, count in enumerate((24, 17, 0)):
            slots = [s for s in call.slots[row].tolist() if s >= 0]
            seen, change = attention[row, -7:][:, slots].mean(0), total[row, slots]
            scores = change / (change.sum() + 1e-8) + seen / (seen.sum() + 1e-8)
            left = int(count * (0.875, 0.625, 0.125)[stage])
            wanted.append(ranked(scores.float().tolist(), left))
        chosen = method.prune(call)
        assert picks_of(chosen) == wanted
        call = cut(call, chosen)


def test_budgets() -> None:
    call = prompt_call(layer=12, num_layers=32, visual=(24,))
    assert TransPruneOptions(keep=3).budget(call).tolist() == [3]
    assert TransPruneOptions(ratio=1.0).prune(call).tolist() == [list(range(24))]
    assert TransPruneOptions(stages=(12,)).budget(call).tolist() == [24]
