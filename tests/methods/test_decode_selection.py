"""Methods that choose keys for one decoded token, against their formulas written out in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.compare import assert_bitwise_equal
from cases.dense import attend, close, heads, logits
from tokred.methods import kinetics
from tokred.methods.fasa import DominantKeys, chunk_dims, dominant_dims, fasa_attention
from tokred.methods.quest import quest_attention
from tokred.methods.tidal_decode import TidalDecodeOptions
from tokred.methods.top_k_attention import top_k_attention


def top_visible(scores: Tensor, k: int) -> Tensor:
    """bool like scores: its k largest entries along the last dimension."""
    chosen = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def test_tidal_decode() -> None:
    """Layers 0, 1, 2 and 4 are dense; 3 uses the choice of 2, and 5 that of 4."""
    state = TidalDecodeOptions(k=20, sparse_layer_start=2, correction_layer=4).attention(range(6))
    carried: dict[str, Tensor] = {}
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, :30] = False
    chosen = None
    for layer in range(6):
        q, k, v = heads(seed=layer)
        padded = mask[:, None, None]
        if layer in (2, 4):
            chosen = top_visible(logits(q, k).masked_fill(~padded, -torch.inf), 20)
        visible = chosen if layer in (3, 5) else padded
        close(state.step(layer, q, k, v, carried, mask)[0], attend(q, k, v, visible))


def test_tidal_decode_needs_a_choice() -> None:
    with pytest.raises(ValueError, match="layer 3 is sparse"):
        TidalDecodeOptions().attention(range(6)).step(3, *heads(), {})


def test_tidal_decode_is_told_how_many_layers_there_are() -> None:
    with pytest.raises(ValueError, match=r"sparse_layer_start must be below 6.* got 6"):
        TidalDecodeOptions(sparse_layer_start=6).attention(range(6))
    # The only layer of six that attends to everything: there is no later one to be sparse.
    with pytest.warns(RuntimeWarning, match="tidal_decode changes nothing"):
        TidalDecodeOptions(sparse_layer_start=2).attention([5])
    for options in ({"k": -5}, {"sparse_layer_start": -1}, {"correction_layer": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            TidalDecodeOptions(**options)


@pytest.mark.parametrize("causal", [False, True])
def test_top_k_attention(causal: bool) -> None:
    q, k, v = heads(queries=70, keys=90)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    mask[1, ..., :9] = False
    visible = mask.expand(-1, 6, 70, -1)
    if causal:
        visible = visible & torch.ones(70, 90, dtype=torch.bool).tril(20)
    scores = logits(q, k).masked_fill(~visible, -torch.inf)
    out, _ = top_k_attention(q, k, v, 12, causal, mask)
    close(out, attend(q, k, v, top_visible(scores, 12) & visible))
    whole = top_k_attention(q, k, v, 90, causal, mask)
    assert_bitwise_equal(whole, tokred.biased_attention(q, k, v, causal=causal, mask=mask))


@pytest.mark.parametrize("interleaved", [False, True])
def test_fasa(interleaved: bool) -> None:
    """Calibration by overlap of top keys, then scores over the dominant chunks only."""
    q, k, v = heads(queries=3, dim=16)
    half = 8
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    parts = torch.stack([logits(q[..., list(p)], k[..., list(p)], 1.0) for p in pairs])
    whole = top_visible(parts.sum(0), 30)
    overlap = torch.stack([(top_visible(part, 30) & whole).sum(-1) / 30 for part in parts])
    agreement = overlap.mean((1, 3))
    chunks = agreement.topk(3, dim=0).indices.T.sort(-1).values
    dims = dominant_dims(q, k, num_chunks=3, top=30, interleaved=interleaved)
    kth = agreement.topk(4, dim=0).values
    clear = kth[2] - kth[3] > 1e-6
    assert clear.any()
    assert torch.equal(dims[clear], chunk_dims(chunks, 16, interleaved)[clear])

    query = q[:, :, :1]
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, 150:] = False
    kept = torch.zeros(6, 16).scatter(1, dims.long(), 1.0)
    scores = logits(query * kept[None, :, None], k).masked_fill(~mask[:, None, None], -torch.inf)
    out, _ = fasa_attention(query, k, v, dims, num_keys=25, mask=mask)
    close(out, attend(query, k, v, top_visible(scores, 25)))


def test_fasa_dominant_keys() -> None:
    """The dimensions kept apart, grown key by key, choose what masked queries choose."""
    q, k, v = heads(queries=3, dim=16)
    dims = dominant_dims(q, k, num_chunks=3, top=30, shared=True)
    assert dims.shape == (k.shape[1], 6)
    query = q[:, :, :1]
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, 150:] = False
    kept = torch.zeros(k.shape[1], 16).scatter(1, dims.long(), 1.0)
    scores = group_mean(query, k * kept[:, None]).masked_fill(~mask[:, None], -torch.inf)

    dominant = DominantKeys(k[:, :, :190], dims, capacity=200)
    for token in range(190, 200):
        dominant.append(k[:, :, token : token + 1])
    assert torch.equal(dominant.rows, DominantKeys(k, dims).rows)
    close(dominant.score(query, mask).double(), scores)
    out, _ = fasa_attention(query, k, v, dominant, num_keys=25, mask=mask)
    chosen = top_visible(scores, 25).repeat_interleave(q.shape[1] // k.shape[1], 1)
    close(out, attend(query, k, v, chosen[:, :, None]))


def test_fasa_dominant_keys_refuse() -> None:
    q, k, v = heads(dim=16)
    dims = chunk_dims(torch.zeros(k.shape[1], 1, dtype=torch.long), 16)
    dominant = DominantKeys(k, dims)
    with pytest.raises(ValueError, match=r"dims must be \[2, 2F\]"):
        DominantKeys(k, dims[:1])
    with pytest.raises(ValueError, match=r"dims must lie in \[0, 16\), got 0 to 16"):
        DominantKeys(k, dims * 2)
    with pytest.raises(ValueError, match="k must fit into 200 keys, got 201"):
        dominant.append(k[:, :, :1])
    with pytest.raises(ValueError, match="dims must hold the 199 keys of k, got 200"):
        fasa_attention(q, k[:, :, 1:], v[:, :, 1:], dominant)


def group_mean(q: Tensor, k: Tensor) -> Tensor:
    return logits(q, k)[:, :, 0].unflatten(1, (k.shape[1], -1)).mean(2)


def test_short_caches_are_attended_whole() -> None:
    q, k, v = heads(keys=7)
    dense = attend(q, k, v)
    close(quest_attention(q, k, v)[0], dense)
    close(fasa_attention(q, k, v, chunk_dims(torch.tensor([[0]] * 6), 16))[0], dense)
    close(kinetics.kinetics_attention(q, k, v, kinetics.block_topk(q, k, 4))[0], dense)
