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
from tokred.methods.dymu import Calibration, DymuOptions, batch_plan, calibrate
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
