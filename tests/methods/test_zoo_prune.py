"""ZOO-Prune's sensitivity and picks against loops, and with a model's projector."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import check_rows, padding, picked, uniform, visual_call
from tokred.methods.zoo_prune import ZooPruneOptions, directions, select_tokens, sensitivity


def transcription(
    x: torch.Tensor, sensitive: torch.Tensor, valid: list[int], k: int, order: str = "position"
) -> list[int]:
    unit, s = functional.normalize(x[valid].double(), dim=-1), sensitive[valid].double()
    flat = s.max() == s.min()
    weight = torch.ones_like(s) if flat else (s - s.min()) / (s.max() - s.min() + 1e-8)
    distance, chosen = 1 - unit @ unit.T, []
    for _ in range(min(k, len(valid))):
        value = distance[:, chosen].amin(1) * weight if chosen else weight.clone()
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
    picks = [valid[i] for i in chosen]
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "order"), [(0, "score"), (9, "position"), (12, "score")])
def test_picks(dtype: torch.dtype, k: int, order: str) -> None:
    x, sensitive = tokens_of(3, 40).to(dtype), uniform(3, 40)
    sensitive[2] = 5  # all alike
    options = dict(k=k, order=order)
    check_rows(select_tokens, transcription, [x, sensitive], padding(3, 40), **options)


def test_nan() -> None:
    sensitive = uniform(1, 9)
    sensitive[0, 4] = torch.nan
    assert 4 not in picked(select_tokens(tokens_of(1, 9), sensitive, 9)[0])


def test_sensitivity() -> None:
    x, weight = tokens_of(2, 7, 12), torch.randn(12, 5)
    along = directions(6, 12)
    torch.testing.assert_close(along.norm(dim=1), torch.ones(6))
    found = sensitivity(x, lambda x: torch.tanh(x @ weight), along, 0.05)
    for row in range(2):
        for token in range(7):
            total = 0.0
            for u in along:
                up, down = (torch.tanh((x[row, token] + s * 0.05 * u) @ weight) for s in (1, -1))
                total += (up - down).norm().item() / 0.1
            assert found[row, token].item() == pytest.approx(total / 6, rel=1e-4)


def test_with_the_projector_of_a_model() -> None:
    call = visual_call()
    options = ZooPruneOptions(keep=6, directions=4, seed=1)
    kept = options.reduce_visual(call)
    sensitive = sensitivity(call.encoder_features, call.project, directions(4, 12, 1))
    assert torch.equal(kept, select_tokens(call.tokens, sensitive, 6))
    assert ZooPruneOptions(ratio=0.1112).count(576) == 64


def test_refusals() -> None:
    x = torch.ones(1, 4, 3)
    for along in (torch.ones(2, 4), torch.ones(3), torch.ones(0, 3)):
        with pytest.raises(ValueError, match=r"along must be \[m, 3\]"):
            sensitivity(x, torch.tanh, along)
    with pytest.raises(ValueError, match="step must be above 0"):
        sensitivity(x, torch.tanh, torch.ones(1, 3), 0.0)
    with pytest.raises(ValueError, match="step must be above 0"):
        ZooPruneOptions(step=-1.0)
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        ZooPruneOptions(directions=0)
