"""Methods of which papers leave formulas open: what is known of them, and what we chose."""

from __future__ import annotations

import math

import pytest
import torch

from cases.dense import attend, close, heads, listed, repeat
from tokred.methods import act_qkv, kv_share, tca_attention


def test_tca_core_tokens() -> None:
    """Per block the tokens least similar to the others of their block, as many as the head has."""
    q, k, v = heads(queries=50, keys=50, groups=(4, 2))
    budgets = torch.tensor([2, 5], dtype=torch.int32)
    unit = torch.nn.functional.normalize(k.double(), dim=-1)
    expected = torch.zeros(2, 2, 50, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            for start in range(0, 50, 8):
                block = unit[b, h, start : start + 8]
                similar = (block @ block.T).fill_diagonal_(0).sum(-1)
                for t in similar.argsort()[: int(budgets[h])]:
                    expected[b, h, start + int(t)] = True
    kept = tca_attention.core_tokens(k, budgets, 8)
    assert torch.equal(listed(kept, 50), expected)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    out, _ = tca_attention.tca_attention(q, k, v, budgets, 8)
    close(out[:, :, 8:], attend(q, k, v, repeat(expected, q)[:, :, None] & causal)[:, :, 8:])


def test_tca_budgets() -> None:
    choices, prior = tca_attention.budget_prior(16, mu=2.0, sigma=1.0)
    assert choices.tolist() == [1, 2, 4, 8, 16]
    weight = torch.exp(-((torch.arange(5) - 2.0) ** 2) / 2)
    close(prior, weight / weight.sum())
    q, k, v = heads(queries=4, keys=32)
    k[:, 0] = k[:, 0, :1]
    v[:, 0] = v[:, 0, :1]
    budgets = tca_attention.calibrate_budgets(q, k, v, 8, tolerance=1e-3)
    assert budgets.tolist() == [1, 8]
    with pytest.raises(ValueError, match="power of two"):
        tca_attention.budget_prior(12, 0, 1)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        tca_attention.calibrate_budgets(q, k, v, tolerance=-0.1)
    with pytest.raises(ValueError, match=r"budgets must be \[2\], one a key head, got \[3\]"):
        tca_attention.core_tokens(k, torch.ones(3).int())


@pytest.mark.parametrize("tokens", [1, 9, 17])
def test_tca_with_a_short_last_block(tokens: int) -> None:
    """A block of one token keeps it."""
    q, k, v = heads(keys=tokens, groups=(4, 2))
    kept = listed(tca_attention.core_tokens(k, torch.tensor([1, 3]).int(), 8), tokens)
    assert kept[:, :, tokens // 8 * 8].all()
    counts = [(min(n, 8) * (tokens // 8) + min(n, tokens % 8)) for n in (1, 3)]
    assert kept.sum(-1).tolist() == [counts, counts]
    out, _ = tca_attention.tca_attention(q, k, v, torch.tensor([1, 3]).int(), 8)
    close(out, attend(q, k, v, repeat(kept, q)[:, :, None]))


def test_act_qkv_probe() -> None:
    """Running mean and variance in double, window by window; even weights in the warm-up."""
    windows = [heads(queries=n, seed=n)[0] for n in (5, 1, 9, 4)]
    stats = act_qkv.ActivationStats.of(windows[0], limit=2)
    mean, variance = (f(windows[0].double(), 2, keepdim=True) for f in (torch.mean, torch.var))
    for count, q in enumerate(windows):
        length, flat = q.shape[2], q.double()
        if count > 0:
            n = min(count, 2)
            stats = stats.updated(q)
            new, spread = flat.mean(2, keepdim=True), flat.var(2, keepdim=True, unbiased=False)
            shift = (new - mean) ** 2 / (1 + 1 / n)
            variance = (variance * (n - 1 / length) + spread + shift) / (n + 1 - 1 / length)
            mean = (mean * n + new) / (n + 1)
        close(stats.mean, mean.float())
        close(stats.variance, variance.float())
        weight = torch.full((2, length), 1 / length).double()
        if count > 2:
            floor = variance.mean((1, 3), keepdim=True) / 100
            weight = ((flat - mean) ** 2 / (variance + floor)).mean((1, 3))
            weight /= weight.sum(1, keepdim=True)
        close(act_qkv.activation_weights(q, stats), weight.float())
        probe = (weight[:, None, :, None] * flat).sum(2, keepdim=True)
        close(act_qkv.probe_query(q, stats), probe.float())
    close(act_qkv.probe_query(windows[0]), windows[0].mean(2, keepdim=True))
    same = windows[0][:, :, :1].expand(-1, -1, 3, -1)
    even = act_qkv.ActivationStats(same[:, :, :1], stats.variance, 9, 2)
    close(act_qkv.activation_weights(same, even), torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="L must be at least 2, got 1"):
        act_qkv.ActivationStats.of(windows[1])


@pytest.mark.parametrize(("tokens", "count"), [(130, 3), (130, 20), (16, 1), (15, 4), (64, 0)])
def test_act_qkv(tokens: int, count: int) -> None:
    """Blocks by the cosine with the keys that received most, all heads as one vector."""
    q, k, v = heads(queries=9, keys=tokens)
    received, question = torch.rand(2, 6, tokens), torch.randn(2, 6, 1, 16)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, : min(18, tokens - 2)] = False
    probe = q.mean(2)
    visible = torch.zeros(2, tokens, dtype=torch.bool)
    for b in range(2):
        cosine = {}
        for m in range(tokens // 16):
            real = [t for t in range(16 * m, 16 * m + 16) if mask[b, t]]
            if not real:
                continue
            keys = torch.stack([
                k[b, h // 3, [real[i] for i in received[b, h, real].argsort()[-3:]]].mean(0)
                for h in range(6)
            ])  # fmt: skip
            cosine[m] = sum(
                weight * torch.cosine_similarity(x.flatten(), keys.flatten(), 0)
                for weight, x in ((1, probe[b]), (0.5, question[b]))
            )
        for m in sorted(cosine, key=cosine.get)[::-1][:count]:
            visible[b, 16 * m : 16 * m + 16] = mask[b, 16 * m : 16 * m + 16]
    out, lse = act_qkv.act_qkv_attention(
        q, k, v, received, count, 16, 3, question=question, mask=mask
    )
    close(out, attend(q, k, v, visible[:, None, None]).nan_to_num(0))
    assert torch.equal(lse[:, 0, 0] == -torch.inf, ~visible.any(1))


def test_act_qkv_budgets() -> None:
    """Layers share what is left by density; halves to even, within the smallest and the most."""
    scores = torch.randn(3, 7)
    scores[1, 2:] = -torch.inf
    scores[2, 1:] = -torch.inf
    density = [torch.special.entr(row.double().softmax(-1)).sum() for row in scores]
    expected = torch.stack([density[0] / math.log(7), density[1] / math.log(2), density[2] * 0])
    close(act_qkv.information_density(scores), expected.float())
    assert act_qkv.layer_budget([1.0, 2.0, 1.0], 0, 64, 0, 99) == 16
    assert act_qkv.layer_budget([1.0, 2.0, 1.0], 1, 48, 0, 99) == 32
    assert act_qkv.layer_budget([1.0, 2.0, 1.0], 2, 16, 0, 99) == 16
    assert act_qkv.layer_budget([1.0, 1.0], 0, 5, 0, 99) == 2
    assert act_qkv.layer_budget([1.0, 1.0], 0, 500, 32, 64) == 64
    assert act_qkv.layer_budget([1.0, 1.0], 0, 5, 32, 64) == 32
    assert act_qkv.layer_budget([0.0, 0.0], 0, 50, 8, 64) == 8


def test_kv_share() -> None:
    """A cache of which some tokens are wrong: those are found, recomputed and written back."""
    q, k, v = heads(queries=40, keys=40)
    wrong = torch.tensor([[3, 17, 30], [0, 8, 21]])
    reused_k, reused_v = k.clone(), v.clone()
    for b in range(2):
        reused_k[b, :, wrong[b]] += 2.0
        reused_v[b, :, wrong[b]] *= 1.5
    deviations = kv_share.deviation([k, v], [reused_k, reused_v])
    flat = [x.transpose(1, 2).flatten(2) for x in (k, reused_k, v, reused_v)]
    expected = (flat[0] - flat[1]).norm(dim=-1) / flat[1].norm(dim=-1)
    expected += (flat[2] - flat[3]).norm(dim=-1) / flat[3].norm(dim=-1)
    close(deviations, expected)
    chosen = kv_share.choose_tokens(deviations, share=0.1)
    assert torch.equal(chosen.long(), torch.cat([wrong, torch.tensor([[39], [39]])], 1))

    rows = chosen.long()[:, None, :, None]
    for cache, right in ((reused_k, k), (reused_v, v)):
        kv_share.write_back(cache, right.gather(2, rows.expand(-1, 2, -1, 16)), chosen)
        assert torch.equal(cache, right)
    queries = q.gather(2, rows.expand(-1, 6, -1, 16))
    out, _ = kv_share.recompute_attention(queries, reused_k, reused_v, chosen)
    visible = torch.arange(40) <= chosen[:, None, :, None]
    close(out, attend(queries, k, v, visible))
    out, lse = kv_share.recompute_attention(queries, k, v, torch.full_like(chosen, -1))
    assert not out.any() and (lse == -torch.inf).all()
    assert kv_share.choose_tokens(deviations, 0, 0).shape == (2, 0)
    assert kv_share.choose_tokens(deviations, 1.0).tolist() == [list(range(40))] * 2
    for name, options in (("share", (1.5,)), ("num_locals", (0.5, -1))):
        with pytest.raises(ValueError, match=f"{name} must be"):
            kv_share.choose_tokens(deviations, *options)
