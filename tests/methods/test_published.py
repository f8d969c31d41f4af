"""Choices of keys against the published algorithms, written out row by row, over random cases."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from cases.dense import attend, close, heads, listed, logits, repeat
from tokred.methods import dhsa, kinetics
from tokred.methods.fasa import chunk_dims, fasa_attention
from tokred.methods.prompt_distill import prompt_distill
from tokred.methods.quest import page_bounds, quest_attention
from tokred.methods.tca_attention import tca_attention
from tokred.methods.top_k_attention import top_k_attention

CASES = range(36)
pytestmark = pytest.mark.usefixtures("one_thread")


def best(scores: Tensor, count: int) -> set[int]:
    """The places of the largest scores."""
    return set(scores.topk(min(count, len(scores))).indices.tolist())


def padding(draw: random.Random, tokens: int) -> Tensor | None:
    """bool [2, N]: padding left, right or on both sides; now and then a row of nothing else."""
    if draw.random() < 0.3:
        return None
    mask = torch.zeros(2, tokens, dtype=torch.bool)
    for row in mask:
        low, high = sorted(draw.randint(0, tokens) for _ in range(2))
        row[draw.choice([0, low]) : draw.choice([tokens, high])] = True
    return mask


@pytest.mark.parametrize("case", CASES)
def test_quest(case: int) -> None:
    """The newest page with a real key, then those of largest bound, at least one page in all."""
    draw = random.Random(case)
    tokens, page = draw.randint(1, 150), draw.choice([1, 4, 16])
    budget = draw.choice([1, page, 2 * page, draw.randint(1, tokens + 40)])
    mask, reduce = padding(draw, tokens), draw.choice(["none", "none", "group_mean", "group_max"])
    q, k, v = heads(keys=tokens, groups=(4, 2), seed=case)
    visible = torch.zeros(2, 4, tokens, dtype=torch.bool)
    for b in range(2):
        real = torch.ones(tokens, dtype=torch.bool) if mask is None else mask[b]
        pages = [real[start : start + page].nonzero()[:, 0] + start
                 for start in range(0, tokens, page)]  # fmt: skip
        pages = [keys for keys in pages if len(keys)]
        for h in range(4):
            query, keys = q[b, h // 2 * 2 : h // 2 * 2 + 2, 0].double(), k[b, h // 2].double()
            bounds = torch.zeros(2, len(pages)).double()
            for number, p in enumerate(pages):
                ends = query * keys[p].amin(0), query * keys[p].amax(0)
                bounds[:, number] = torch.maximum(*ends).sum(-1)
            score = {"none": bounds[h % 2], "group_mean": bounds.mean(0)}
            score = score.get(reduce, bounds.amax(0))
            others = best(score[:-1], max(budget // page, 1) - 1)
            for number in {*others, len(pages) - 1} if pages else ():
                visible[b, h, pages[number]] = True
    out, lse = quest_attention(q, k, v, budget, page, reduce=reduce, mask=mask)
    close(out, attend(q, k, v, visible[:, :, None]).nan_to_num(0))
    assert torch.equal(lse == -torch.inf, ~visible.any(-1, keepdim=True))
    bounds = page_bounds(k, page, mask)
    assert torch.equal(quest_attention(q, k, v, budget, page, bounds, reduce, mask)[0], out)


def dhsa_block(q, k, block, i, edges, budget, sinks, local, window) -> set[int]:
    """The keys that one item's block i lists: q [L, D] and k [N, D] are means over the heads."""
    tokens, end = len(k), (i + 1) * block
    start = 0 if window is None else max(end - window, 0)
    allowed = list(range(start, min(end, tokens)))
    budget = min(budget, tokens if window is None else min(window, tokens))
    mean = q[i * block : end].sum(0) / block
    score = {}
    for t in allowed:
        c = max(e for e in range(len(edges) - 1) if edges[e] <= t < edges[e + 1])
        chunk = k[edges[c] : edges[c + 1]]
        score[t] = float(mean @ chunk.mean(0)) * math.sqrt(len(chunk))
    recent = allowed[-min(local, budget, len(allowed)) or len(allowed) :]
    rest = sorted((t for t in allowed if t not in recent), key=lambda t: (-score[t], t))
    chosen = sorted([*recent, *rest[: budget - len(recent)]])
    first = 0 if window is None else max(i * block - window, 0)
    sinks = min(sinks, budget)
    return {*range(first, min(first + sinks, end, tokens)), *chosen[sinks:]}


@pytest.mark.parametrize("case", CASES)
def test_dhsa(case: int) -> None:
    draw = random.Random(case)
    tokens, block = draw.randint(1, 90), draw.choice([1, 8, 16])
    instruction = draw.choice([0, 5, draw.randint(0, tokens + 3)])
    edges = sorted({0, tokens, *(draw.randint(0, tokens) for _ in range(6))})
    choice = {
        "budget": draw.choice([1, 7, 20, tokens + 5]),
        "num_sinks": draw.choice([0, 0, 3, 12]),
        "num_locals": draw.choice([0, 5, 30]),
        "window": draw.choice([None, None, 1, 10, 40]),
    }
    q, k, v = heads(queries=tokens, keys=tokens, groups=(4, 2), seed=case)
    sparse = max(tokens - instruction, 0)
    means = [x.double().mean(1) for x in (q[:, :, :sparse], k)]
    visible = torch.zeros(2, tokens, tokens, dtype=torch.bool)
    visible[:, sparse:] = True
    lists = torch.zeros(2, -(-sparse // block), tokens, dtype=torch.bool)
    for b in range(2):
        for i in range(lists.shape[1]):
            keys = dhsa_block(means[0][b], means[1][b], block, i, edges, *choice.values())
            lists[b, i, sorted(keys)] = True
            visible[b, i * block : min((i + 1) * block, sparse)] = lists[b, i]
    boundaries = torch.tensor([edges], dtype=torch.int32)
    indices = dhsa.dhsa_indices(q[:, :, :sparse], k, block, boundaries=boundaries, **choice)
    assert torch.equal(listed(indices, tokens), lists)
    place = torch.arange(tokens)
    visible &= place <= place[:, None]
    if choice["window"] is not None:
        visible &= place >= place[:, None] - choice["window"]
    out = dhsa.dhsa_attention(q, k, v, block, instruction, boundaries=boundaries, **choice)
    close(out, attend(q, k, v, visible[:, None]).nan_to_num(0))


def test_dhsa_scores() -> None:
    """A last block of queries is filled up with zeros, which count in its mean."""
    q, k, _ = heads(queries=21, keys=30, groups=(4, 2))
    boundaries = torch.tensor([[0, 4, 30]], dtype=torch.int32)
    query, key = q.mean(1), k.mean(1)
    blocks = torch.stack([query[:, a : a + 8].sum(1) / 8 for a in (0, 8, 16)], 1)
    for normed in (True, False):
        lengths = torch.tensor([4.0, 26.0]).sqrt() if normed else torch.ones(2)
        sizes = torch.tensor([8.0, 8.0, 5.0]).sqrt() if normed else torch.ones(3)
        chunks = torch.stack([key[:, :4].mean(1), key[:, 4:].mean(1)], 1)
        expected = blocks @ chunks.mT * lengths * sizes[:, None]
        close(dhsa.chunk_scores(q, k, 8, boundaries, normed), expected)


def test_dhsa_defaults() -> None:
    """128 first and 128 last tokens, and the last 64 queries dense."""
    q, k, v = heads(queries=700, keys=700, groups=(2, 1), dim=8, batch=1)
    given = dhsa.dhsa_indices(q, k, budget=300)
    assert torch.equal(given, dhsa.dhsa_indices(q, k, budget=300, num_sinks=128, num_locals=128))
    lists = listed(given, 700)[0]
    for i in range(1, 5):
        assert lists[i, :128].all() and lists[i, 128 * i : 128 * i + 128].all()
    out = dhsa.dhsa_attention(q, k, v, budget=300)
    causal = torch.ones(700, 700, dtype=torch.bool).tril()
    close(out[:, :, -64:], attend(q, k, v, causal)[:, :, -64:])


@pytest.mark.parametrize("case", CASES)
def test_prompt_distill(case: int) -> None:
    """The best tokens before the last prompt token, and every real token from there on."""
    draw = random.Random(case)
    tokens = draw.randint(1, 60)
    budget, pooling = draw.choice([0, 1, 7, tokens + 4]), draw.random() < 0.7
    mask = padding(draw, tokens)
    ends = draw.choice([None, draw.randint(0, tokens), "rows"])
    if ends == "rows":
        ends = torch.tensor([draw.randint(0, tokens) for _ in range(2)])
    q, k, _ = heads(keys=tokens, groups=(4, 2), seed=case)
    hidden, positions = torch.randn(2, tokens, 8), torch.arange(tokens)[None] + 3
    score = logits(q, k)[:, :, 0].mean(1)
    options = {"num_tokens": budget, "prompt_end": ends, "pooling": pooling, "mask": mask}
    result = prompt_distill(q, k, hidden, positions, **options)
    real = torch.ones(2, tokens, dtype=torch.bool) if mask is None else mask
    for b in range(2):
        last = max(real[b].nonzero()[:, 0].tolist(), default=-1)
        end = last if ends is None else int(torch.as_tensor(ends).expand(2)[b])
        row = score[b].masked_fill(~real[b], 0)
        row[max(end, 0) :] = 0
        if pooling:
            row = avg_pool1d(row[None, None], 5, 1, 2)[0, 0]
        candidates = [t for t in range(max(end, 0)) if real[b, t]]
        chosen = best(row[candidates], budget)
        kept = sorted(candidates[i] for i in chosen)
        kept += [t for t in range(max(end, 0), tokens) if real[b, t]]
        count = len(kept)
        assert result.lengths[b] == count
        assert result.indices[b].tolist() == kept + [-1] * (result.indices.shape[1] - count)
        assert torch.equal(result.hidden[b, :count], hidden[b, kept])
        assert torch.equal(result.position_ids[b, :count], positions[0, kept])
        assert not result.hidden[b, count:].any()


def token_topk(mean: Tensor, length: int, sink: int, local: int, topk: int, *_: int) -> set[int]:
    if length <= sink + local + topk:
        return set(range(length))
    middle = best(mean[sink : length - local], topk)
    return {*range(sink), *(sink + t for t in middle), *range(length - local, length)}


def block_topk(mean: Tensor, length: int, sink: int, local: int, topk: int, block: int, _: int):
    if length <= -(-(sink + local + topk * block) // block) * block:
        return set(range(length))
    dynamic = (length - local - sink) // block * block
    blocks = mean[sink : sink + dynamic].double().unflatten(-1, (-1, block)).mean(-1)
    middle = {sink + n * block + i for n in best(blocks, topk) for i in range(block)}
    return {*range(sink), *middle, *range(sink + dynamic, length)}


def strided_topk(mean: Tensor, length: int, sink: int, local: int, topk: int, block: int, step):
    dynamic = length - sink - local
    if dynamic < block:
        return set(range(length))
    windows = mean[sink : length - local].double().unfold(-1, block, step).mean(-1)
    starts = best(windows, 2 * topk)
    covered = sorted({n * step + i for n in starts for i in range(block)})[: topk * block]
    return {*range(sink), *(sink + t for t in covered), *range(length - local, length)}


@pytest.mark.parametrize("variant", [token_topk, block_topk, strided_topk])
@pytest.mark.parametrize("case", range(16))
def test_kinetics(variant: Callable, case: int) -> None:
    """Rows of all lengths down to one key and to none; the smallest budgets."""
    draw = random.Random(case)
    tokens, block = draw.choice([1, 9, 60, 200]), draw.choice([1, 8, 16])
    step = draw.choice([1, max(block // 2, 1), block + 1])
    sink, local, topk = draw.choice([0, 4]), draw.choice([0, 10]), draw.choice([0, 1, 3, 20])
    q, k, v = heads(keys=tokens, groups=(6, 2), batch=6, seed=case)
    lengths = torch.tensor([tokens, *(draw.randint(0, tokens) for _ in range(5))]).int()
    options = {} if variant is token_topk else {"block_size": block}
    if variant is strided_topk:
        options["stride"] = step
    choose = getattr(kinetics, variant.__name__)
    indices = choose(q, k, topk, sink=sink, local=local, lengths=lengths, **options)
    mean = logits(q, k)[:, :, 0].unflatten(1, (2, 3)).mean(2)
    expected = torch.zeros(6, 2, tokens, dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        for h in range(2):
            keys = variant(mean[b, h, :length], length, sink, local, topk, block, step)
            expected[b, h, sorted(keys)] = True
    assert torch.equal(listed(indices, tokens), expected)
    out, _ = kinetics.kinetics_attention(q, k, v, indices)
    close(out, attend(q, k, v, repeat(expected, q)[:, :, None]).nan_to_num(0))
    if variant is not token_topk and lengths.min() == tokens:
        assert torch.equal(choose(q, k, topk, sink=sink, local=local, **options), indices)


@pytest.mark.parametrize("case", range(12))
def test_top_k(case: int) -> None:
    """Per query, also where causal queries see no key at all, or fewer than k."""
    draw = random.Random(case)
    queries, keys, count = draw.randint(1, 40), draw.randint(1, 40), draw.randint(1, 12)
    causal, chunk = draw.random() < 0.7, draw.choice([1, 7, 64])
    q, k, v = heads(queries=queries, keys=keys, groups=(4, 2), seed=case)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen = seen.tril(keys - queries) if causal else seen
    scores = logits(q, k).masked_fill(~seen, -torch.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(min(count, keys)).indices, True)
    out, lse = top_k_attention(q, k, v, count, causal, chunk=chunk)
    close(out, attend(q, k, v, chosen & seen).nan_to_num(0))
    assert torch.equal(lse == -torch.inf, ~seen.any(-1).expand(2, 4, -1))


def test_gradients_pass_by_the_choice() -> None:
    """Chosen as without a gradient, and that of attention to the chosen keys."""
    tensors = heads(queries=40, keys=40, groups=(4, 2))
    one = tensors[0][:, :, :1], *tensors[1:]
    methods = {
        quest_attention: (one, {"num_keys": 8, "page_size": 4}),
        dhsa.dhsa_attention: (tensors, {"block_q": 8, "instruction_tokens": 3, "budget": 9}),
        tca_attention: (tensors, {"budgets": torch.tensor([1, 2]).int(), "block": 8}),
    }  # fmt: skip
    for method, (inputs, options) in methods.items():
        expected = method(*inputs, **options)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = method(*leaves, **options)
        out, expected = (x[0] if isinstance(x, tuple) else x for x in (out, expected))
        assert torch.equal(out, expected)
        out.sum().backward()
        assert all(x.grad.isfinite().all() and x.grad.any() for x in leaves)
    q, k, _ = (x.clone().requires_grad_() for x in one)
    for choose in (kinetics.token_topk, kinetics.block_topk, kinetics.strided_topk):
        assert torch.equal(choose(q, k, 2, local=4), choose(*one[:2], 2, local=4))
    hidden = torch.randn(2, 40, 8)
    rows = prompt_distill(*one[:2], hidden, torch.arange(40)[None], 3)
    leaf = hidden.clone().requires_grad_()
    other = prompt_distill(q, k, leaf, torch.arange(40)[None], 3)
    assert torch.equal(rows.hidden, other.hidden)
    other.hidden.sum().backward()
    kept = torch.zeros(2, 40).scatter(1, rows.indices.long(), 1.0)
    assert torch.equal(leaf.grad, kept[..., None].expand(-1, -1, 8))


def refusals() -> dict[str, Callable[[], object]]:
    q, k, v = heads(queries=9, keys=9, groups=(4, 2), dim=16)
    one = q[:, :, :1]
    hidden, positions = torch.zeros(2, 9, 4), torch.arange(9)[None]
    dims = chunk_dims(torch.zeros(4, 1, dtype=torch.long), 16)
    crooked = torch.tensor([[0, 5, 4, 9]], dtype=torch.int32)
    return {
        "num_keys must be at least 1, got 0": lambda: quest_attention(one, k, v, 0),
        "page_size must be at least 1, got 0": lambda: quest_attention(one, k, v, page_size=0),
        "num_keys must be at least 1, got -5": lambda: fasa_attention(one, k, v, dims, -5),
        "num_keys must be at least 1, got -1": lambda: top_k_attention(q, k, v, -1),
        "chunk must be at least 1, got 0": lambda: top_k_attention(q, k, v, 2, chunk=0),
        "budget must be at least 1, got 0": lambda: dhsa.dhsa_indices(q, k, budget=0),
        "num_locals must be at least 0, got -1": lambda: dhsa.dhsa_indices(q, k, num_locals=-1),
        "window must be at least 1, got 0": lambda: dhsa.dhsa_indices(q, k, window=0),
        "boundaries must ascend": lambda: dhsa.dhsa_indices(q, k, boundaries=crooked),
        "boundaries must be": lambda: dhsa.dhsa_indices(q, k, boundaries=crooked[0]),
        "q must have at most the 5 tokens": lambda: dhsa.dhsa_indices(q, k[:, :, :5]),
        "q must have the 5 tokens of k, got 9": lambda: dhsa.dhsa_attention(q, k[:, :, :5], v),
        "instruction_tokens must be at least 0": lambda: dhsa.dhsa_attention(q, k, v, 8, -1),
        "density must be in": lambda: dhsa.dhsa_block_mask(q, k, density=0.0),
        "num_tokens must be at least 0": lambda: prompt_distill(one, k, hidden, positions, -1),
        "prompt_end must be in": lambda: prompt_distill(one, k, hidden, positions, 1, 10),
        r"prompt_end must be \[2\], got \[3\]": lambda: prompt_distill(
            one, k, hidden, positions, 1, torch.tensor([1, 2, 3])
        ),
        "topk must be at least 0, got -1": lambda: kinetics.token_topk(one, k, -1),
        "sink must be at least 0, got -1": lambda: kinetics.block_topk(one, k, 1, sink=-1),
        "stride must be at least 1, got 0": lambda: kinetics.strided_topk(one, k, 1, stride=0),
    }


@pytest.mark.parametrize("message", refusals())
def test_refusals(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusals()[message]()
