"""LVLM_CSP's stages: few tokens, all again, few that matter."""

from __future__ import annotations

import pytest
import torch

from tokred.methods.lvlm_csp import by_class_attention, by_instances, prune, scatter, uniform


def test_uniform() -> None:
    assert uniform(2, 10, 3).tolist() == [[0, 3, 6]] * 2
    assert uniform(1, 5, 5).tolist() == [[0, 1, 2, 3, 4]]
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"count must be from 1 to 10, got {count}"):
            uniform(1, 10, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9, float("nan")], [0.0, 0.0, 0.0, 0.0, 1.0]]).to(dtype)
    assert by_class_attention(scores, 3).tolist() == [[1, 2, 3], [0, 1, 4]]
    valid = torch.tensor([[True, False, True, True, True]] * 2)
    assert by_class_attention(scores, 3, valid).tolist() == [[0, 2, 3], [0, 2, 4]]
    assert prune(scores, ratio=0.4).tolist() == [[1, 3], [0, 4]]
    assert prune(scores, 3, order="score").tolist() == [[1, 3, 2], [4, 0, 1]]
    assert prune(scores, 9).shape == (2, 5)


@pytest.mark.parametrize("count", [1, 6, 20])
def test_instances(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    instance = torch.randint(-1, 4, (3, 40), generator=generator, dtype=torch.int32)
    instance[2] = -1
    given = by_instances(instance, count)
    for item in range(3):
        row = instance[item].tolist()
        total, expected = sum(number >= 0 for number in row), []
        for number in {*row} - {-1}:
            members = [i for i, other in enumerate(row) if other == number]
            c = len(members)
            n = min(max(1, count * c // total), c)
            expected += [members[i * (c - 1) // (n - 1) if n > 1 else 0] for i in range(n)]
        assert given[item].tolist() == sorted(expected) + [-1] * (40 - len(expected))
    assert torch.equal(by_instances(instance[1:2], count)[0], given[1])


def test_scatter() -> None:
    x, few = torch.randn(2, 6, 3), torch.randn(2, 2, 3)
    indices = torch.tensor([[1, 4], [0, -1]], dtype=torch.int32)
    out = scatter(x, few, indices)
    expected = x.clone()
    expected[0, [1, 4]], expected[1, 0] = few[0], few[1, 0]
    assert torch.equal(out, expected)


def test_refusals() -> None:
    for call in (by_class_attention, by_instances):
        with pytest.raises(ValueError, match="count must be at least 1, got 0"):
            call(torch.zeros(1, 4, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\]"):
        prune(torch.rand(1, 4), ratio=1.5)
