"""Methods of which papers leave formulas open: what is known of them, and what we chose."""

from __future__ import annotations

import pytest
import torch
from dense import attend, close, heads, listed, logits, repeat

from tokred.methods import METHODS, act_qkv, kv_share, tca_attention


def test_marked_approximate() -> None:
    names = {name for name, method in METHODS.items() if method.status == "approximate"}
    assert names >= {"tca_attention", "act_qkv", "kv_share", "arkv", "ems", "importance_bits"}
    for name in names:
        assert "approximate" in METHODS[name].load().__doc__


@pytest.mark.parametrize("name", METHODS)
def test_module_names_its_paper(name: str) -> None:
    """The registry's title, whole, and its number on arXiv are in the docstring of the module."""
    doc = " ".join(METHODS[name].load().__doc__.split())
    assert METHODS[name].title in doc
    assert METHODS[name].arxiv in doc


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


def test_act_qkv() -> None:
    q, k, v = heads(queries=9, keys=130)
    distance = (q - q.mean(2, keepdim=True)).norm(dim=-1, keepdim=True)
    probe = (distance.softmax(2) * q).sum(2, keepdim=True)
    close(act_qkv.probe_query(q), probe)
    mask = torch.ones(2, 130, dtype=torch.bool)
    mask[0, :16] = False
    score = logits(probe, k)[:, :, 0].unflatten(1, (2, 3)).mean(2)
    blocks = torch.full((2, 2, 9), -torch.inf, dtype=torch.float64)
    for b in range(2):
        for m in range(9):
            seen = mask[b, 16 * m : 16 * (m + 1)]
            if seen.any():
                blocks[b, :, m] = score[b, :, 16 * m : 16 * (m + 1)][:, seen].mean(-1)
    probability = blocks.softmax(-1)
    entropy = torch.special.entr(probability).sum(-1)
    wanted = entropy.exp().ceil().long().clamp(max=4)
    expected = torch.zeros(2, 2, 130, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            for m in blocks[b, h].topk(int(wanted[b, h])).indices.tolist():
                expected[b, h, 16 * m : 16 * (m + 1)] = True
    indices = act_qkv.retrieve(q, k, 64, 16, mask)
    assert torch.equal(listed(indices, 130), expected)
    out, _ = act_qkv.act_qkv_attention(q, k, v, 64, 16, mask)
    close(out, attend(q, k, v, (repeat(expected, q) & mask[:, None])[:, :, None]))


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
