"""Merged caches against their formulas in torch: KVMerger and EMS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import tokred
from cases.dense import close, heads, listed, logits, repeat
from cases.inputs import generator
from tokred import PackFormat
from tokred.integrations.transformers.kept_keys import KeptKeysLayer
from tokred.methods import ems, kv_merger

pytestmark = pytest.mark.usefixtures("one_thread")


def smooth_keys(keys: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys that drift slowly, with jumps; and the attention that they received, f32 [B, H, N]."""
    q, k, v = heads(keys=keys, queries=keys)
    drift = torch.where(torch.rand(2, 2, keys, 1, generator=torch.Generator().manual_seed(1)) < 0.3,
                        2.0, 0.25)  # fmt: skip
    k = (k * drift).cumsum(2)
    columns = tokred.attention_columns(q, k, causal=True)
    return q, k, v, columns.unflatten(1, (2, 3)).sum(2)


def segments(k: Tensor, alone: Tensor, threshold: float) -> list[list[int]]:
    """Runs of one head, found from the last token on."""
    runs = [[len(k) - 1]]
    for t in range(len(k) - 2, -1, -1):
        similar = cosine_similarity(k[t], k[t + 1], 0) > threshold
        if similar and not alone[t] and not alone[t + 1]:
            runs[-1].insert(0, t)
        else:
            runs.append([t])
    return runs[::-1]


@pytest.mark.parametrize("sigma", [None, 0.8, 5.0])
def test_kv_merger(sigma: float | None) -> None:
    q, k, v, scores = smooth_keys()
    width = {} if sigma == 5.0 else {"sigma": sigma}  # 5 is the default
    cache = kv_merger.kv_merger(k, v, scores, 0.75, num_heavy=5, num_recent=8, **width)
    out, counted = (cache.attend(q[:, :, -1:], c)[0] for c in (False, True))
    longest = 0
    for b in range(2):
        for h in range(2):
            alone = torch.zeros(60, dtype=torch.bool)
            alone[scores[b, h, :52].topk(5).indices] = True
            alone[52:] = True
            runs = segments(k[b, h], alone, 0.75)
            longest = max(longest, len(runs))
            keys, values = [], []
            for run in runs:
                pivot = k[b, h, run[int(scores[b, h, run].argmax())]]
                square = (k[b, h, run] - pivot).square().sum(1)
                width = square.mean() + 1e-8 if sigma is None else sigma**2
                g = torch.exp(-square / (2 * width))
                keys.append((g / g.sum()) @ k[b, h, run])
                values.append((g / g.sum()) @ v[b, h, run])
            count = len(runs)
            keys, values = torch.stack(keys), torch.stack(values)
            close(cache.k[b, h, :count], keys)
            close(cache.v[b, h, :count], values)
            assert cache.counts[b, h].tolist()[:count] == [len(run) for run in runs]
            assert not cache.counts[b, h, count:].any()
            size = torch.tensor([float(len(run)) for run in runs])
            mine = q[b, 3 * h : 3 * h + 3, -1]
            close(out[b, 3 * h : 3 * h + 3, 0], (mine @ keys.T / 4).softmax(-1) @ values)
            weights = (mine @ keys.T / 4 + size.log()).softmax(-1)
            close(counted[b, 3 * h : 3 * h + 3, 0], weights @ values)
    assert cache.k.shape[2] == longest < 55


def test_kv_merger_packed() -> None:
    q, k, v, scores = smooth_keys()
    runs = kv_merger.run_map(k, kv_merger.stays_alone(scores, 5, 8))
    cache = kv_merger.merge_runs(k, v, scores, runs, num_out=64)
    keys, values = cache.pack(PackFormat(8, 16, "token"), PackFormat(8, 16))
    for counted in (False, True):
        bias = cache.bias(counted)
        packed = tokred.packed_attention(q, keys, values, key_bias=bias)[0]
        torch.testing.assert_close(packed, cache.attend(q, counted)[0], rtol=0.05, atol=0.05)


def test_kv_merger_with_nothing_alike() -> None:
    q, k, v = heads(keys=30)
    cache = kv_merger.kv_merger(k, v, torch.rand(2, 2, 30), threshold=1.5)
    assert cache.counts.eq(1).all()
    close(cache.k, k)
    close(cache.attend(q)[0], tokred.biased_attention(q, k, v)[0])


def test_ems_score() -> None:
    q, k, _ = heads(queries=50, keys=50)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    p = logits(q, k).masked_fill(~causal, -torch.inf).softmax(-1)
    overall, local = p.sum(2), p[:, :, -12:].sum(2)
    overall, local = (x.unflatten(1, (2, 3)).sum(2) for x in (overall, local))
    expected = overall * (local.mean(2) / overall.mean(2))[..., None] + local
    close(ems.global_local_score(q, k, 12), expected.float())


@pytest.mark.parametrize("threshold", [0.0, 0.2, 2.0])
def test_ems(threshold: float) -> None:
    q, k, v = heads(keys=60)
    scores = torch.rand(2, 2, 60, generator=generator())
    cache = ems.ems(k, v, scores, 24, 20, window=10, threshold=threshold)
    out, counted = (cache.attend(q, c)[0] for c in (False, True))
    joined = 0
    for b in range(2):
        for h in range(2):
            order = scores[b, h, :50].argsort(descending=True).tolist()
            kept, merging = sorted(order[:14]) + list(range(50, 60)), order[14:34]
            assert cache.indices[b, h].tolist() == kept
            members = {t: [t] for t in kept}
            for t in merging:
                likeness = {
                    other: float(cosine_similarity(k[b, h, t], k[b, h, other], 0)
                                 * cosine_similarity(v[b, h, t], v[b, h, other], 0))
                    for other in kept
                }  # fmt: skip
                best = max(likeness, key=likeness.get)
                if likeness[best] > threshold:
                    members[best].append(t)
                    joined += 1
            for place, t in enumerate(kept):
                mine = k[b, h, members[t]]
                direction = normalize(normalize(mine, dim=1).mean(0), dim=0)
                close(cache.k[b, h, place], direction * mine.norm(dim=1).mean())
                close(cache.v[b, h, place], v[b, h, members[t]].mean(0))
                assert cache.counts[b, h, place] == len(members[t])
    weights = logits(q, cache.k)
    close(out, (weights.softmax(-1) @ repeat(cache.v, q).double()).float())
    weights = weights + repeat(cache.counts, q)[:, :, None].log()
    close(counted, (weights.softmax(-1) @ repeat(cache.v, q).double()).float())
    assert (joined == 0) == (threshold > 1)
    assert listed(cache.indices, 60).sum() == 4 * 24


def test_ems_with_room_for_all() -> None:
    q, k, v = heads(keys=20)
    cache = ems.ems(k, v, torch.rand(2, 2, 20), 50, 10)
    close(cache.k, k)
    close(cache.attend(q)[0], tokred.biased_attention(q, k, v)[0])


def test_merged_caches_refuse() -> None:
    q, k, v = heads(queries=20, keys=20)
    scores = torch.rand(2, 2, 20)
    for options in ({"num_heavy": -1}, {"num_recent": -2}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            kv_merger.kv_merger(k, v, scores, **options)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        kv_merger.kv_merger(k, v, scores, sigma=0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ems.global_local_score(q, k, 0)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        ems.ems(k, v, scores, 0, 3)
    with pytest.raises(ValueError, match="num_merged must be at least 0, got -3"):
        ems.ems(k, v, scores, 4, -3)


@pytest.mark.parametrize("tokens", [1, 2])
def test_merging_next_to_nothing(tokens: int) -> None:
    """One token is its own run; two alike ones become their weighted mean."""
    q, k, v = heads(keys=tokens)
    k = k[:, :, :1].expand_as(k).contiguous()
    cache = kv_merger.kv_merger(k, v, torch.rand(2, 2, tokens), num_recent=0)
    assert cache.counts.eq(tokens).all() and cache.k.shape[2] == 1
    close(cache.k, k[:, :, :1])
    close(cache.v, v.mean(2, keepdim=True))
    everything = ems.ems(k, v, torch.rand(2, 2, tokens), 4, 4)
    close(everything.attend(q)[0], tokred.biased_attention(q, k, v)[0])


# Inside a patch.


def prompted(options: Any) -> tuple[KeptKeysLayer, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A layer's cache after a prompt with left padding in its second row, q, k and v, the keys that
    are left, and the output of a token that follows."""
    draw, layer = generator(5), KeptKeysLayer(options, 2, 4)
    q = torch.randn(2, 4, 61, 16, generator=draw)
    k, v = (torch.randn(2, 2, 61, 16, generator=draw) for _ in range(2))
    k = k + 3 * torch.randn(2, 2, 21, 16, generator=draw).repeat_interleave(3, 2)[:, :, :61]
    mask = torch.ones(2, 1, 1, 61, dtype=torch.bool)
    mask[1, ..., :9] = False
    parts = []
    for first, last in ((0, 60), (60, 61)):
        states, _ = layer.update(k[:, :, first:last], v[:, :, first:last])
        parts.append(states.attend(q[:, :, first:last], mask[..., :last], None)[0])
        if first == 0:
            layer_keys = layer.keys.clone()
    return layer, q, k, v, (layer_keys, parts[1])


METHODS = (
    (kv_merger.KvMergerOptions(threshold=0.6, recent=4, heavy=3), False),
    (kv_merger.KvMergerOptions(threshold=0.6, recent=4, sigma=None, counted=True), True),
    (ems.EmsOptions(budget=20, merged=15, window=4), False),
    (ems.EmsOptions(budget=20, merged=15, window=4, counted=True), True),
)


@pytest.mark.parametrize(("options", "counted"), METHODS, ids=lambda each: type(each).__name__)
def test_a_patch_merges_every_row_without_its_padding(options: Any, counted: bool) -> None:
    layer, q, k, v, (kept, out) = prompted(options)
    for row, skip in ((0, 0), (1, 9)):
        own = [x[row : row + 1, :, skip:60] for x in (q, k, v)]
        if isinstance(options, ems.EmsOptions):
            scores = ems.global_local_score(own[0], own[1], 4)
            cache = ems.ems(own[1], own[2], scores, 20, 15, 4)
            assert torch.equal(layer.position[row, :, :20], cache.indices[0] + skip)
        else:
            scores = tokred.attention_columns(own[0], own[1], causal=True)
            scores = scores.unflatten(1, (2, -1)).sum(2)
            cache = kv_merger.kv_merger(
                own[1], own[2], scores, 0.6, options.heavy, 4, options.sigma
            )
        count = cache.k.shape[2]
        torch.testing.assert_close(kept[row, :, :count], cache.k[0])
        bias = cache.counts.log() if counted else cache.counts.clamp(max=1).log()
        new = [torch.cat([held, x[row : row + 1, :, 60:]], 2) for held, x in
               ((cache.k, k), (cache.v, v))]  # fmt: skip
        bias = torch.cat([bias, torch.zeros(1, 2, 1)], 2)
        expected, _ = tokred.biased_attention(q[row : row + 1, :, 60:], *new, bias)
        torch.testing.assert_close(out[row], expected[0])
    assert layer.length == 61 and layer.keys.shape[2] < 61


def test_layers_that_kv_merger_leaves_alone() -> None:
    for number, layers in ((0, 4), (1, 4), (3, 4)):
        layer = KeptKeysLayer(kv_merger.KvMergerOptions(threshold=-2.0, recent=0), number, layers)
        states, _ = layer.update(*torch.randn(2, 1, 2, 9, 16))
        states.attend(torch.randn(1, 4, 9, 16), None, None)
        assert layer.keys.shape[2] == 9


def test_options_of_patches_that_merge() -> None:
    for kind, options, words in (
        (ems.EmsOptions, {"budget": 8}, "budget must be at least 32, the window"),
        (ems.EmsOptions, {"merged": -1}, "merged must be at least 0"),
        (kv_merger.KvMergerOptions, {"sigma": 0.0}, "sigma must be positive"),
        (kv_merger.KvMergerOptions, {"first": -1}, "first must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            kind(**options)
