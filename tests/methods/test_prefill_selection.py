"""Methods that choose blocks or tokens for many queries, against their formulas in torch."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional

from cases.dense import attend, close, heads, logits
from tokred.methods import dhsa, landmark, paro_attention
from tokred.methods.rectified_spattn import rectified_attention


def test_dhsa_fixed_chunks_are_boundaries() -> None:
    q, k, _ = heads(queries=70, keys=70)
    boundaries = torch.tensor([[0, 32, 64, 70]], dtype=torch.int32)
    given = dhsa.dhsa_indices(q, k, 16, 20, boundaries)
    assert torch.equal(dhsa.dhsa_indices(q, k, 16, 20, chunk_size=32), given)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("force_ends", [False, True])
def test_dhsa_blocks(force_ends: bool, density: float) -> None:
    """The first and the newest block whatever the density, and the best ones between them."""
    q, k, _ = heads(queries=96, keys=96, groups=(2, 2))
    mask = dhsa.dhsa_block_mask(q, k, 32, 8, density=density, force_ends=force_ends)
    means = [x.double().unflatten(2, (-1, n)).mean(3) for x, n in ((q, 32), (k, 8))]
    score = means[0] @ means[1].transpose(-1, -2)
    expected = torch.zeros_like(mask)
    for row in range(3):
        seen, kept = 4 * (row + 1), max(int(density * 12), 1)
        part = score[:, :, row, :seen]
        if force_ends:
            part[..., 0] = part[..., -1] = torch.inf
            kept = max(kept, 2)
        expected[:, :, row, :seen].scatter_(-1, part.topk(min(kept, seen)).indices, True)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("case", range(16))
def test_rectified_spattn(case: int) -> None:
    """Down to one token and one block, and with nothing or everything critical."""
    draw = random.Random(case)
    tokens, block = draw.choice([1, 7, 16, 90]), draw.choice([3, 8, 16])
    top_p, drop_rate = draw.choice([0.0, 0.3, 1.0]), draw.choice([0.0, 0.7, 0.8, 1.0])
    q, k, v = heads(queries=tokens, keys=tokens, groups=(3, 3), seed=case)
    blocks = -(-tokens // block)
    tail = blocks * block - tokens
    always = torch.eye(blocks, dtype=torch.bool) if draw.random() < 0.5 else None

    padded = [
        functional.pad(x.double(), (0, 0, 0, tail)).unflatten(2, (-1, block)) for x in (q, k, v)
    ]
    mean_q, mean_k, mean_v = (x.mean(3) for x in padded)
    spread = [(x - x.mean(3, keepdim=True)).abs().mean(3) for x in padded[:2]]
    raw = mean_q @ mean_k.transpose(-1, -2)
    probability = (raw / 4).softmax(-1)
    ordered, order = probability.sort(-1, descending=True)
    need = ((ordered.cumsum(-1) <= top_p).sum(-1) + 1).clamp(min=int((1 - drop_rate) * blocks))
    first = torch.arange(blocks) < need[..., None]
    critical = torch.zeros_like(first).scatter(-1, order, first)
    if always is not None:
        critical = critical | always
    error = spread[0] @ mean_k.transpose(-1, -2)
    error = error.abs() + (mean_q @ spread[1].transpose(-1, -2)).abs()
    exact = critical | ~(raw.abs() > error)
    share = (probability * exact).sum(-1, keepdim=True)
    pooled = (probability * ~exact) @ mean_v
    visible = critical.repeat_interleave(block, 2).repeat_interleave(block, 3)
    dense = attend(q, k, v, visible[:, :, :tokens, :tokens]).double()
    rows = [x.repeat_interleave(block, 2)[:, :, :tokens] for x in (share, pooled)]
    expected = (rows[0] * dense + rows[1]).float()
    close(rectified_attention(q, k, v, block, top_p, drop_rate, always), expected)


def test_paro_orders() -> None:
    """A head whose attention is local in one order is best served by that order."""
    permutation, inverse = paro_attention.axis_order("WFH", 2, 3, 4, num_text=2)
    x = torch.arange(2 + 24)
    assert torch.equal(x[permutation][inverse], x)
    grid = x[2:].reshape(2, 3, 4)
    assert torch.equal(x[permutation][2:], grid.permute(2, 0, 1).flatten())
    frame = torch.arange(4).repeat_interleave(4)
    features = functional.one_hot(torch.stack([frame, frame.reshape(4, 4).T.flatten()]), 4)
    q = 40.0 * features.float()[None]
    orders = paro_attention.choose_orders(q, q, 4, 2, 2, block=4)
    assert orders[0][0] == "F" and orders[1][0] != "F"
    with pytest.raises(ValueError, match="order must be one of"):
        paro_attention.axis_order("FHX", 1, 1, 1)


def test_paro_attention() -> None:
    block = 16
    q, k, v = heads(queries=72, keys=72, groups=(2, 2))
    orders = [paro_attention.axis_order(order, 3, 4, 6)[0] for order in ("FHW", "WHF")]
    permutations = torch.stack(orders)
    index = permutations[None, :, :, None].expand_as(q)
    permuted = [x.gather(2, index) for x in (q, k, v)]
    probability = functional.pad(logits(*permuted[:2]).softmax(-1), (0, 8, 0, 8))
    sums = probability.unflatten(-1, (-1, block)).sum(-1).unflatten(2, (-1, block)).sum(3)
    close(paro_attention.block_sums(*permuted[:2], block), sums.float())
    threshold = float(sums.median())
    mask = paro_attention.calibrate_mask(*permuted[:2], block, threshold)
    expected = sums.mean(0, keepdim=True) > threshold
    expected[:, :, -1] = True
    expected[..., -1] = True
    assert torch.equal(mask, expected) and not mask.all()
    with_text = paro_attention.calibrate_mask(*permuted[:2], block, threshold, num_text=17)
    expected[:, :, :2] = expected[..., :2] = True
    assert torch.equal(with_text, expected)
    visible = mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :72, :72]
    dense = torch.empty_like(q).scatter(2, index, attend(*permuted, visible))
    close(paro_attention.paro_attention(q, k, v, permutations, mask, block), dense)


def landmark_transcription(q, k, v, block: int) -> torch.Tensor:
    """Query by query, with both softmaxes written out."""
    tokens = q.shape[2]
    scores = logits(q, k)
    is_landmark = torch.arange(tokens) % block == block - 1
    out = torch.zeros(*q.shape, dtype=torch.float64)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1).double()
    for i in range(tokens):
        start = i // block * block
        own = [j for j in range(start, i + 1) if not is_landmark[j]]
        marks = [j for j in range(start) if is_landmark[j]]
        weight = scores[:, :, i, own + marks].softmax(-1)
        out[:, :, i] = (weight[..., : len(own), None] * values[:, :, own]).sum(2)
        for place, mark in enumerate(marks):
            inside = list(range(mark - block + 1, mark))
            share = scores[:, :, i, inside].softmax(-1) * weight[..., len(own) + place, None]
            out[:, :, i] += (share[..., None] * values[:, :, inside]).sum(2)
    return out.float()


@pytest.mark.parametrize(("tokens", "block"), [(38, 8), (1, 8), (5, 51), (16, 8), (9, 2)])
def test_landmark(tokens: int, block: int) -> None:
    q, k, v = heads(queries=tokens, keys=tokens, groups=(4, 2))
    expected = landmark_transcription(q, k, v, block)
    close(landmark.landmark_attention(q, k, v, block), expected)
    # With all blocks retrieved a decode step is the last row.
    for length in {tokens, max(tokens - 6, 1), min(tokens, block)}:
        step = landmark.landmark_decode(q[:, :, length - 1 : length], k[:, :, :length],
                                        v[:, :, :length], block, num_blocks=10)  # fmt: skip
        close(step, expected[:, :, length - 1 : length])


@pytest.mark.parametrize("count", [0, 2])
def test_landmark_decode_with_few_blocks(count: int) -> None:
    """The own block and those of largest landmark logit, per query head; none with no blocks."""
    q, k, v = heads(keys=45, groups=(4, 2))
    scores = logits(q, k)[:, :, 0]
    out = torch.zeros(2, 4, 16, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            marks, value = list(range(7, 40, 8)), v[b, h // 2].double()
            kept = [marks[i] for i in scores[b, h, marks].topk(count).indices]
            weight = scores[b, h, [*range(40, 45), *kept]].softmax(-1)
            out[b, h] = weight[:5] @ value[40:]
            for share, mark in zip(weight[5:], kept, strict=True):
                inside = slice(mark - 7, mark)
                out[b, h] += share * scores[b, h, inside].softmax(-1) @ value[inside]
    close(landmark.landmark_decode(q, k, v, 8, count)[:, :, 0], out.float())


def test_landmark_retrieves_the_best_blocks() -> None:
    q, k, _ = heads(keys=9)
    chosen = landmark.retrieve_blocks(q, k, 4)
    expected = logits(q, k)[:, :, 0].topk(4).indices.sort(-1).values
    assert torch.equal(chosen.long(), expected)
