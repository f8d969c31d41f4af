"""Methods on single heads, first tokens, gates and prompts, against their formulas in torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import tokred
from cases.dense import attend, close, heads, logits, repeat
from tokred.methods import razor_attention as razor
from tokred.methods.gated_attention import gated_attention, split_gate
from tokred.methods.prompt_distill import prompt_distill
from tokred.methods.zero_tuning import rescale_first_token


def test_razor_compensation() -> None:
    """Kept tokens and a mean token of weight N_d, as the published sum of exponentials."""
    q, k, v = heads(keys=60)
    compressed = razor.compress(k, v, num_sinks=4, window=20)
    assert compressed.k.shape[2] == 25
    kept = torch.tensor([*range(4), *range(40, 60)])
    mean_k, mean_v = (x[:, :, 4:40].mean(2, keepdim=True) for x in (k, v))
    weight = logits(q, k[:, :, kept]).exp()
    extra = 36 * logits(q, mean_k).exp()
    values = [repeat(x, q).double() for x in (v[:, :, kept], mean_v)]
    expected = (weight @ values[0] + extra @ values[1]) / (weight.sum(-1, keepdim=True) + extra)
    close(compressed.attend(q)[0], expected.float())


def test_razor_window_moves() -> None:
    """Tokens that leave the window join the running mean, in order."""
    _, k, v = heads(keys=50)
    step_by_step = razor.compress(k[:, :, :30], v[:, :, :30], 4, window=20)
    for t in range(30, 50):
        step_by_step.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    at_once = razor.compress(k, v, 4, window=20)
    for name in ("k", "v", "dropped"):
        close(getattr(step_by_step, name), getattr(at_once, name))


@pytest.mark.parametrize("tokens", [1, 3, 10, 24])
def test_razor_with_nothing_to_drop_is_dense(tokens: int) -> None:
    q, k, v = heads(keys=tokens)
    close(razor.compress(k, v, 4, window=20).attend(q)[0], attend(q, k, v))


def test_razor_heads() -> None:
    q, k, v = heads(keys=40, groups=(6, 3))
    retrieval = torch.tensor([False, True, False])
    others = razor.compress(k[:, ~retrieval], v[:, ~retrieval], 2, window=10)
    out = razor.razor_attention(q, k[:, retrieval], v[:, retrieval], retrieval, others)
    close(out[:, 2:4], attend(q, k, v)[:, 2:4])
    close(out[:, :2], others.attend(q[:, [0, 1, 4, 5]])[0][:, :2])


def test_razor_head_scores() -> None:
    """Echo: mass on copies of the token itself; induction: on the tokens behind those copies."""
    period, length = 5, 18
    q, k, _ = heads(queries=length, keys=length, groups=(4, 2))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    rows = logits(q, k).masked_fill(~causal, -torch.inf).softmax(-1)
    echo, induction = torch.zeros(4), torch.zeros(4)
    for i in range(period, length):
        for copy in range(i - period, -1, -period):
            echo += rows[:, :, i, copy].sum(0).float()
            induction += rows[:, :, i, copy + 1].sum(0).float()
    count = 2 * (length - period)
    actual = razor.head_scores(q, k, period)
    close(actual[0], echo / count)
    close(actual[1], induction / count)
    chosen = razor.retrieval_heads(torch.tensor([[0.1, 0.9], [0.2, 0.3]]),
                                   torch.tensor([[0.1, 0.2], [0.8, 0.3]]), 2)  # fmt: skip
    assert chosen.tolist() == [[False, True], [True, False]]


def test_prompt_distill_defaults() -> None:
    """Pooling is on, and the last prompt token comes on top of the 1024 tokens."""
    q, k, _ = heads(keys=1100)
    hidden, positions = torch.randn(2, 1100, 4), torch.arange(1100)[None]
    result = prompt_distill(q, k, hidden, positions)
    assert result.lengths.tolist() == [1025, 1025]
    assert (result.indices[:, -1] == 1099).all()
    score = logits(q, k)[:, :, 0].mean(1)
    score[:, 1099] = 0
    score = functional.avg_pool1d(score[:, None], 5, 1, 2)[:, 0, :1099]
    chosen = score.topk(1024).indices.sort(-1).values
    assert torch.equal(result.indices[:, :-1].long(), chosen)
    few = prompt_distill(q, k, hidden, positions, 0, prompt_end=1090, pooling=False)
    assert few.indices.tolist() == [list(range(1090, 1100))] * 2


def test_zero_tuning() -> None:
    q, k, v = heads(queries=5, keys=30)
    gamma = torch.tensor([0.2, 0.7, 1.0, 1.5, 2.0, 3.0])
    probability = logits(q, k).softmax(-1)
    probability[..., 0] *= gamma[:, None]
    probability /= probability.sum(-1, keepdim=True)
    expected = (probability @ repeat(v, q).double()).float()
    out, lse = tokred.biased_attention(q, k, v)
    first = k[:, :, 0], v[:, :, 0]
    close(rescale_first_token(out, lse, q, *first, gamma), expected)
    same = rescale_first_token(out, lse, q, *first, torch.ones(6))
    assert torch.equal(same, out)
    empty = rescale_first_token(0 * out, torch.full_like(lse, -torch.inf), q, *first, gamma)
    assert not empty.any()


@pytest.mark.parametrize("elementwise", [False, True])
def test_gated_attention(elementwise: bool) -> None:
    """One projection of queries and gates, split per key head, then attention times sigmoid."""
    _, k, v = heads(keys=12, groups=(6, 2), dim=4)
    gates = 12 if elementwise else 3
    projected = torch.randn(2, 12, 2 * (12 + gates), requires_grad=True)
    q, gate = split_gate(projected, 2, 3, 4)
    query = torch.stack([projected[..., (12 + gates) * (h // 3) + h % 3 * 4 :][..., :4]
                         for h in range(6)], 1)  # fmt: skip
    assert torch.equal(q, query)
    width = 4 if elementwise else 1
    starts = [(12 + gates) * (h // 3) + 12 + h % 3 * width for h in range(6)]
    expected_gate = torch.stack([projected[..., s : s + width] for s in starts], 2)
    assert torch.equal(gate, expected_gate)
    out = gated_attention(q, k, v, gate)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    close(out, attend(q, k, v, causal).transpose(1, 2) * expected_gate.sigmoid())
    out.sum().backward()
    assert projected.grad.isfinite().all() and projected.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="gates a key head"):
        split_gate(projected, 2, 3, 3)
