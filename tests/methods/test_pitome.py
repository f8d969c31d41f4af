"""PiToMe's energy and groups against the published formulas, written out in plain torch."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.methods.pitome import PitomeOptions, energy, pitome_plan


def metric_of(batch: int, tokens: int) -> Tensor:
    """Tokens around a few centres, so that energies differ."""
    generator = torch.Generator().manual_seed(tokens)
    centres = torch.randn(5, 16, generator=generator)
    chosen = torch.randint(5, (batch, tokens), generator=generator)
    return centres[chosen] + 0.6 * torch.randn(batch, tokens, 16, generator=generator)


def cosines(metric: Tensor) -> Tensor:
    unit = functional.normalize(metric.double(), dim=-1)
    return unit @ unit.transpose(1, 2)


def plain_energy(metric: Tensor, margin: float, kind: str) -> Tensor:
    cosine = cosines(metric)
    if kind == "vision":
        above = cosine - margin
        return torch.where(above > 0, above, above.exp() - 1).mean(-1)
    deviation = 1 - margin
    density = torch.exp(-(((1 - cosine) / deviation) ** 2) / 2)
    return (density / (deviation * math.sqrt(2 * math.pi))).mean(-1)


@pytest.mark.parametrize(("kind", "margin"), product(("vision", "text"), (0.0, 0.45, 0.9)))
def test_energy(kind: str, margin: float) -> None:
    metric = metric_of(2, 33)
    expected = plain_energy(metric, margin, kind).float()
    torch.testing.assert_close(energy(metric, margin, kind), expected)


def groups(metric: Tensor, r: int, margin: float, variant: str, kind: str) -> list[set]:
    """The published partition of one item's tokens [1, T, C] as a list of sets."""
    order = plain_energy(metric, margin, kind)[0].argsort(descending=True).tolist()
    cosine = cosines(metric)[0]
    if variant == "bsm":
        sources, destinations = order[0::2], order[1::2]
    elif kind == "vision":
        sources, destinations = order[: 2 * r][0::2], order[: 2 * r][1::2]
    else:
        sources, destinations = order[:r], order[r : 2 * r]
    best, partner = cosine[sources][:, destinations].max(1)
    members = {token: {token} for token in order}
    for i in best.argsort(descending=True)[:r].tolist():
        members[destinations[partner[i]]].add(sources[i])
        del members[sources[i]]
    return list(members.values())


@pytest.mark.parametrize(
    ("tokens", "num_prefix", "ratio", "variant", "kind"),
    [
        case
        for case in product(
            (32, 45), (0, 1, 3), (0.9, 0.75, 0.5), ("pitome", "bsm"), ("vision", "text")
        )
        if case[3:] != ("bsm", "text")
    ],
)
def test_groups(tokens: int, num_prefix: int, ratio: float, variant: str, kind: str) -> None:
    margin = 0.6
    metric = metric_of(2, tokens)
    rest = tokens - num_prefix
    r = math.floor(rest - rest * ratio)
    token_map, num_out = pitome_plan(metric, num_prefix, ratio, margin, variant, kind)
    assert num_out == tokens - r
    assert torch.equal(token_map[:, :num_prefix], torch.arange(num_prefix).int().expand(2, -1))
    for item in range(2):
        slots = token_map[item, num_prefix:].tolist()
        actual = {
            frozenset(i for i, slot in enumerate(slots) if slot == wanted)
            for wanted in range(num_prefix, num_out)
        }
        expected = groups(metric[item : item + 1, num_prefix:], r, margin, variant, kind)
        assert actual == {frozenset(group) for group in expected}


def test_lone_tokens_are_protected() -> None:
    """A tight cluster merges, tokens unlike any other stay alone."""
    cluster = torch.ones(1, 10, 12) + 0.01 * torch.randn(
        1, 10, 12, generator=torch.Generator().manual_seed(0)
    )
    lone = -torch.eye(12)[None, :6]
    metric = torch.cat([lone, cluster], 1)
    token_map, num_out = pitome_plan(metric, 0, ratio=0.75, margin=0.5)
    assert num_out == 12
    counts = torch.bincount(token_map[0], minlength=12)
    assert (counts[token_map[0, :6].long()] == 1).all()


def test_amounts_are_rounded_down_as_computed() -> None:
    """floor(T - T ratio) of the doubles: 25 - 25 * 0.56 is 10.999..., and merges 10."""
    for tokens, ratio, r in ((25, 0.56, 10), (75, 0.68, 23), (100, 0.55, 44), (40, 0.75, 10)):
        assert pitome_plan(metric_of(1, tokens + 1), 1, ratio)[1] == tokens + 1 - r
    assert pitome_plan(metric_of(1, 9), 0, ratio=0.95) is None


@pytest.mark.parametrize(
    ("rule", "margin", "variants"),
    [
        ("deit", 0.75, ["bsm", "bsm", "bsm", "pitome", "pitome"]),
        ("mae", 0.75, ["pitome", "pitome", "pitome", "bsm", "bsm"]),
        ("augreg", 0.9, ["pitome"] * 5),
        ("lavis_clip", 0.95, ["pitome"] * 5),
    ],
)
def test_published_layer_rules(rule: str, margin: float, variants: list[str]) -> None:
    rules = [PitomeOptions(rule=rule).layer_rule(layer, 5) for layer in range(5)]
    assert [variant for _, variant in rules] == variants
    margins = [margin for margin, _ in rules]
    assert margins == pytest.approx([margin * (5 - layer) / 5 for layer in range(5)])


@pytest.mark.parametrize(
    ("rule", "margins", "variants"),
    [
        ("blip", (0.9, 0.675, 0.45, 0.225), ["pitome"] * 4),
        ("blip2", (0.75, 0.65, 0.55, 0.45), ["pitome"] * 4),
        ("clip", (0.9, 0.675, 0.45, 0.225), ["tome"] * 4),
        ("bert", (0.9, 0.8375, 0.775, 0.7125), ["pitome"] * 4),
    ],
)
def test_other_published_rules(rule: str, margins: tuple, variants: list[str]) -> None:
    options = PitomeOptions(rule=rule)
    rules = [options.layer_rule(layer, 4) for layer in range(4)]
    assert [margin for margin, _ in rules] == pytest.approx(margins)
    assert [variant for _, variant in rules] == variants
    assert list(options.layers(4)) == ([0, 1, 2] if rule == "bert" else [0, 1, 2, 3])
    assert PitomeOptions(rule="clip").layer_rule(13, 24)[1] == "pitome"


@pytest.mark.parametrize("variant", ("pitome", "bsm", "tome"))
def test_prune_drops_what_would_merge(variant: str) -> None:
    metric = metric_of(2, 33)
    merged, num_out = pitome_plan(metric, 1, 0.7, 0.6, variant)
    pruned, same = pitome_plan(metric, 1, 0.7, 0.6, variant, mode="prune")
    assert same == num_out and num_out == 33 - math.floor(32 - 32 * 0.7)
    for item in range(2):
        for slot in range(num_out):
            group = (merged[item] == slot).nonzero()[:, 0].tolist()
            left = [token for token in group if pruned[item, token] == slot]
            assert len(left) == 1 and all(pruned[item, t] == -1 for t in group if t not in left)
            if variant == "tome" and len(group) > 1:
                assert left[0] % 2 == 1  # ToMe's destinations


def test_tome_variant_is_tome() -> None:
    metric = metric_of(2, 33)
    expected = tokred.bipartite_soft_matching(metric, 9, 1)
    assert torch.equal(pitome_plan(metric, 1, 0.7, 0.6, "tome")[0], expected)


def test_options() -> None:
    changed = PitomeOptions(ratio=0.9, margin=0.8, bsm_layers=1)
    assert changed.layer_rule(0, 4) == (0.8, "bsm")
    assert changed.layer_rule(3, 4) == (pytest.approx(0.2), "pitome")
    assert PitomeOptions().layer_rule(11, 12)[0] == pytest.approx(0.75 / 12)
    assert PitomeOptions(margin=0.75, margin_drop=0.4).layer_rule(3, 4)[0] == pytest.approx(0.45)
    last = PitomeOptions(rule="mae", bsm_layers=1)
    assert [last.layer_rule(layer, 3)[1] for layer in range(3)] == ["pitome", "pitome", "bsm"]
    assert list(PitomeOptions(ratio=1).layers(2)) == [] and list(PitomeOptions().layers(2)) == [
        0,
        1,
    ]
    for options in ({"rule": "vit"}, {"ratio": 0.4}, {"bsm_layers": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PitomeOptions(**options)


def test_refusals() -> None:
    metric = metric_of(1, 9)
    for ratio in (0.4, 1.1):
        with pytest.raises(ValueError, match="ratio"):
            pitome_plan(metric, 0, ratio)
    with pytest.raises(ValueError, match="variant"):
        pitome_plan(metric, 0, 0.9, variant="best")
    with pytest.raises(ValueError, match="mode"):
        pitome_plan(metric, 0, 0.9, mode="drop")
    with pytest.raises(ValueError, match="kind"):
        energy(metric, 0.5, "audio")
    with pytest.raises(ValueError, match="margin"):
        energy(metric, 1.0, "text")


@torch.no_grad()
def test_in_a_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=48, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    pixels = torch.randn(2, 3, 48, 48)
    expected = model(pixels).last_hidden_state
    with tokred.patch(model, "pitome", ratio=0.75, trace_source=True) as handle:
        merged = model(pixels).last_hidden_state
        assert handle.counts == (37, 28, 22, 17)
        assert torch.equal(handle.size.sum(1), torch.full((2,), 37.0))
        assert handle.unmerge(merged).shape == expected.shape
    with tokred.patch(model, "pitome", ratio=1):
        assert torch.equal(model(pixels).last_hidden_state, expected)
