"""DyMU's calibration and thresholds against the published rule, one link after the other."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tokred
from cases.groups import check_in_a_model, groups_of, in_slots, tokens_of
from cases.tiny_models import tiny_timm
from tokred.methods._maps import identity
from tokred.methods.dymu import (
    Calibration,
    DymuOptions,
    batch_plan,
    calibrate,
    grown_map,
    unmerged_prompt,
)
from tokred.patching import LayerAttention, ReductionCall


def links(metric: Tensor, num_prefix: int, seen: Tensor) -> list[tuple[float, int, int, int]]:
    """(similarity, item, source, destination) of all items, best first."""
    unit = functional.normalize(metric.double(), dim=-1)
    found = []
    for item, tokens in product(range(len(metric)), [range(num_prefix, metric.shape[1])]):
        live = [t for t in tokens if seen[item, t]]
        for source in (t for t in live if t % 2 == 0):
            to = [(float(unit[item, source] @ unit[item, t]), -t) for t in live if t % 2]
            if to:
                best, destination = max(to)
                found.append((best, item, source, -destination))
    return sorted(found, key=lambda link: (-link[0], *link[1:]))


@pytest.mark.parametrize(("tokens", "num_prefix", "total"), product((16, 23), (0, 1), (0, 5, 14)))
def test_the_best_links_of_a_batch(tokens: int, num_prefix: int, total: int) -> None:
    metric = tokens_of(3, tokens)
    mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(2)) > 0.25
    for seen in (None, mask):
        live = torch.ones(3, tokens, dtype=torch.bool) if seen is None else seen
        token_map, counts, threshold = batch_plan(metric, total, num_prefix, seen)
        ranked = links(metric, num_prefix, live)
        members = [{t: {t} for t in range(tokens) if live[item, t]} for item in range(3)]
        for _, item, source, destination in ranked[:total]:
            members[item][destination] |= members[item].pop(source)
        rejected = ranked[total][0] if total < len(ranked) else 0.0
        assert threshold.item() == pytest.approx(max(rejected, 0.0), abs=1e-6)
        for item in range(3):
            assert groups_of(token_map[item]) == in_slots(members[item])
            assert counts[item] == len(members[item])


def test_thresholds_of_a_calibrated_model() -> None:
    """Above the first layer's threshold lie exactly r links an image, on what it was found with."""
    torch.manual_seed(0)
    model = tiny_timm().eval()
    pixels = torch.randn(4, 3, 48, 48)
    thresholds = calibrate(model, [pixels], [6, 0, 4])
    assert len(thresholds) == 3 and thresholds[1] == 2.0 and 0 < thresholds[0] < 1
    seen = []
    attention = model.blocks[0].attn
    hook = attention.qkv.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(pixels)
    hook.remove()
    keys = seen[0].unflatten(-1, (3, 2, 16))[:, :, 1].mean(2)
    _, counts = tokred.threshold_matching(keys, thresholds[0], 1)
    assert (37 - counts).sum() == 6 * 4
    halves = [calibrate(model, [half], [6]) for half in pixels.split(2)]
    both = calibrate(model, pixels.split(2), [6])
    assert both[0] == pytest.approx((halves[0][0] + halves[1][0]) / 2)
    with torch.no_grad(), tokred.patch(model, "dymu", threshold=thresholds) as handle:
        merged = []
        for image in pixels:
            model(image[None])
            merged.append(37 - handle.counts[1] if len(handle.counts) > 1 else 0)
    assert sum(merged) >= 6 * 4  # the first merge of each image, in its first layer with links


@pytest.mark.parametrize("threshold", (0.2, 0.6))
def test_one_image_merges_every_link_above(threshold: float) -> None:
    for seed in range(3):
        keys = tokens_of(3, 22 + seed, 8)[:1, None]
        attention = LayerAttention({"k": (keys, lambda heads: heads)})
        call = ReductionCall(keys[:, 0], 0, 1, 1, None, attention)
        found = DymuOptions(threshold=threshold).plan(call)
        ranked = links(keys[:, 0], 1, torch.ones(1, 22 + seed, dtype=torch.bool))
        limit = (21 + seed) // 2
        above = [link for link in ranked if link[0] > threshold][:limit]
        members = {t: {t} for t in range(22 + seed)}
        for _, _, source, destination in above:
            members[destination] |= members.pop(source)
        assert groups_of(found[0][0]) == in_slots(members)


def test_in_a_model() -> None:
    check_in_a_model("dymu", dict(threshold=1.0), dict(threshold=-1.0, max_r=5), (37, 32, 27, 22))
    check_in_a_model("dymu", dict(threshold=[2, 2, 2]), dict(threshold=[-1, 2, -1]), (37, 19, 10))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., N, D] by the angles [N, D / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def expanded_layer(
    x: Tensor, weights: list[Tensor], token_map: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """[M, C] after dense causal attention over all positions of one item, its mean by token."""
    wide = x[token_map.long()]
    q, k, v = ((wide @ w).unflatten(-1, (2, -1)).transpose(0, 1) for w in weights)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    seen = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    groups = functional.one_hot(token_map.long(), len(x)).to(seen).mT
    return x + (groups @ seen.transpose(0, 1).flatten(1)) / groups.sum(1, keepdim=True)


def test_from_calibration_to_a_prompt() -> None:
    """A stream of batches, a model that merges, and a language model that sees nothing of it."""
    torch.manual_seed(0)
    model = tiny_timm().eval()
    stream = (torch.randn(2, 3, 48, 48) for _ in range(3))
    thresholds = calibrate(model, stream, 6, run=lambda model, batch: model(batch))
    pixels = torch.randn(2, 3, 48, 48)
    with (
        torch.no_grad(),
        tokred.patch(model, "dymu", threshold=thresholds, trace_source=True) as handle,
    ):
        visual = model.forward_features(pixels)
        merged = visual.shape[1]
        assert merged < 37 and handle.token_map.shape == (2, 37)
        project, channels = torch.randn(visual.shape[2], 16), 16
        before, after = torch.randn(2, 3, channels), torch.randn(2, 4, channels)
        prompt = unmerged_prompt(visual @ project, handle.token_map, before, after, num_prefix=1)
    count, positions = merged - 1 + 7, 36 + 7
    assert prompt.embeddings.shape == (2, count, channels)
    assert prompt.token_map.shape == (2, positions)
    tail = torch.arange(count - 4, count, dtype=torch.int32)
    assert (prompt.token_map[:, -4:] == tail).all()
    assert (prompt.token_map[:, :3] == torch.arange(3)).all()
    angle = torch.arange(positions + 2)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    cos, sin = angle.cos(), angle.sin()
    layers = [[torch.randn(channels, channels) / 4 for _ in range(3)] for _ in range(2)]
    x, dense = prompt.embeddings, [*prompt.embeddings.double()]
    word = torch.randn(2, 2, channels)  # two tokens that follow
    longer = grown_map(prompt.token_map, count, 2)
    both = [torch.cat([row, new.double()]) for row, new in zip(dense, word, strict=True)]
    for weights in layers:
        q, k, v = ((x @ w).unflatten(-1, (2, -1)).transpose(1, 2) for w in weights)
        angles = cos[None, :positions], sin[None, :positions]
        out = tokred.unmerged_attention(q, k, v, prompt.token_map, *angles)
        new_q, new_k, new_v = ((word @ w).unflatten(-1, (2, -1)).transpose(1, 2) for w in weights)
        new = tokred.unmerged_attention(
            new_q,
            torch.cat([k, new_k], 2),
            torch.cat([v, new_v], 2),
            longer,
            cos[None],
            sin[None],
            query_map=identity(word),
        )
        x, word = x + out.transpose(1, 2).flatten(2), word + new.transpose(1, 2).flatten(2)
        wide = [w.double() for w in weights]
        for item in range(2):
            here, tables = prompt.token_map[item], (cos.double(), sin.double())
            dense[item] = expanded_layer(dense[item], wide, here, *(t[:positions] for t in tables))
            both[item] = expanded_layer(both[item], wide, longer[item], *tables)
            torch.testing.assert_close(x[item].double(), dense[item], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(both[item][:-2], dense[item])
            torch.testing.assert_close(word[item].double(), both[item][-2:], rtol=1e-4, atol=1e-4)


def test_prompt_refusals() -> None:
    x, token_map = torch.zeros(2, 5, 8), torch.zeros(2, 9, dtype=torch.int32)
    for message, arguments in (
        ("visual must be", (x[0], token_map)),
        (r"token_map must be int32 \[2, N\], got torch.int64", (x, token_map.long())),
        (r"token_map must be int32 \[2, N\], got torch.int32 \[1, 9\]", (x, token_map[:1])),
        (r"before must be \[2, N, C\]", (x, token_map, x[:1])),
        ("after must have 8 channels, got 4", (x, token_map, x, x[..., :4])),
        ("num_prefix must be an int, got 0.5", (x, token_map, None, None, 0.5)),
    ):
        with pytest.raises(ValueError, match=message):
            unmerged_prompt(*arguments)
    with pytest.raises(ValueError, match="new must be at least 0, got -1"):
        grown_map(token_map, 5, -1)


def test_refusals() -> None:
    for value in ("0.9", [0.5, "1"], float("nan"), [True]):
        with pytest.raises(ValueError, match="threshold must be a number or a list of numbers"):
            DymuOptions(threshold=value)
    with pytest.raises(ValueError, match="threshold must have one number for each of 3 layers"):
        tokred.patch(tiny_timm(), "dymu", threshold=[0.5])
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        calibrate(tiny_timm(), [], 4)
    with (
        torch.no_grad(),
        tokred.patch(tiny_timm(), "dymu", calibration=Calibration(4), prop_attn=False) as handle,
        pytest.raises(ValueError, match="patch with prop_attn=True"),
    ):
        handle.model(torch.randn(2, 3, 48, 48))
    two = torch.nn.ModuleList([tiny_timm(), tiny_timm()])
    with pytest.raises(ValueError, match="the model has 2 encoders"):
        calibrate(two, [torch.randn(1, 3, 48, 48)], 4)
