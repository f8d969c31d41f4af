"""Numbers added to the logits of transformers' models: relative positions, and masks of floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import generated, left_padded, tiny_lm, transformers
from tokred.compat import cache_keyword, release
from tokred.integrations.transformers import attention

CACHE = cache_keyword()


@pytest.fixture(autouse=True)
def registered(one_thread: None) -> None:
    attention.register()


@pytest.fixture(scope="module", params=["T5", "UMT5"])
def t5(request: pytest.FixtureRequest) -> nn.Module:
    if release("transformers") < (5, 24):
        pytest.skip(f"this transformers has {request.param}'s attention outside of its interface")
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=96,
    )  # fmt: skip
    model = getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_relative_positions_are_those_of_eager(t5: nn.Module) -> None:
    """In the encoder with padding, in the decoder, in every cache; packed ones have all tokens in
    their window."""
    ids, mask = left_padded()
    results, texts = [], []
    for implementation in ("eager", "tokred"):
        t5.set_attn_implementation(implementation)
        results.append(t5(ids, attention_mask=mask, decoder_input_ids=ids[:, 4:]).logits)
        texts.append(generated(t5, ids, mask))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(*texts)
    assert torch.equal(generated(t5, ids, mask, cache_implementation="static"), texts[0])
    cross = transformers.DynamicCache(config=t5.config)
    packed = tokred.PackedCache(t5, 8, window=64, rotate=False)
    both = transformers.EncoderDecoderCache(packed, cross)
    assert torch.equal(generated(t5, ids, mask, **{CACHE: both}), texts[0])


def test_relative_positions_are_trained(t5: nn.Module) -> None:
    """Those of the encoder, with padding, and those of the causal decoder."""
    ids, mask = left_padded()
    names = [name for name, _ in t5.named_parameters() if "relative_attention_bias" in name]
    results = []
    for implementation in ("eager", "tokred"):
        t5.set_attn_implementation(implementation)
        loss = t5(ids, attention_mask=mask, labels=ids[:, 4:].contiguous()).loss
        weights = [t5.get_parameter(name) for name in (*names, "shared.weight")]
        results.append(torch.autograd.grad(loss, weights))
    assert len(names) >= 2
    for actual, expected in zip(results[1], results[0], strict=True):
        largest = expected.abs().max().item()
        assert largest > 1e-4
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * largest)


def float_mask(hidden: float, padded: Tensor) -> Tensor:
    """[B, 1, L, L]: causal, with a slope of distances; only padding sees padding, itself."""
    length = padded.shape[1]
    place = torch.arange(length)
    distance = place[:, None] - place
    visible = (distance >= 0) & padded.bool()[:, None, None] | (distance == 0)
    return (-0.1 * distance.float()).expand(visible.shape).masked_fill(~visible, hidden)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
@torch.no_grad()
def test_float_masks_are_added(hidden: float) -> None:
    model = tiny_lm("Llama", head_dim=16)
    ids, padded = left_padded()
    mask = float_mask(hidden, padded)
    results = []
    for implementation in ("eager", "tokred"):
        model.set_attn_implementation(implementation)
        whole = model(ids, attention_mask=mask).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = [
            model(ids[:, rows], attention_mask=mask[:, :, rows, : rows.stop], **{CACHE: cache})
            for rows in (slice(0, 9), slice(9, 10), slice(10, 13))
        ]
        results.append([each[padded.bool()] for each in (
            whole, torch.cat([part.logits for part in parts], 1)
        )])  # fmt: skip
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    packed = tokred.PackedCache(model, 8, window=64, rotate=False)
    parts = [
        model(ids[:, rows], attention_mask=mask[:, :, rows, : rows.stop], **{CACHE: packed})
        for rows in (slice(0, 9), slice(9, 10), slice(10, 13))
    ]
    logits = torch.cat([part.logits for part in parts], 1)[padded.bool()]
    torch.testing.assert_close(logits, results[0][1], rtol=1e-4, atol=1e-4)
    refused = "know no numbers that are added to the logits"
    for method, options in (("token_select", {"k": 4}), ("h2o", {"budget": 4})):
        with tokred.patch(model, method, **options), pytest.raises(ValueError, match=refused):
            model(ids, attention_mask=mask)
