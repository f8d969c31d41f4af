"""tokred.benchmark and tokred.profile: what they time, on tiny models."""

from __future__ import annotations

import pytest
import torch

from cases import torchvision_stub

torchvision_stub.install()
transformers = pytest.importorskip("transformers")

import tokred  # noqa: E402
from cases.trial_models import decoder, encoder, images, tokens  # noqa: E402
from tokred.evaluation import profiler  # noqa: E402
from tokred.evaluation.speed import held  # noqa: E402


def test_decoders_are_timed() -> None:
    result = tokred.benchmark(
        decoder(), tokens(2), ["snap_kv", "tome"], [0.25], bits=[8], repeats=1
    )
    snap, tome, packed = result.rows
    assert "this is a causal language model" in tome.reason
    for row in (snap, packed):
        assert {*row.figures} == {*result.dense.figures}
        assert all(value > 0 for value in row.figures.values()), row
    assert result.dense.figures["speed-up"] == 1
    # 39 tokens of 2 rows, 2 layers, a head of 16 numbers, keys and values; SnapKV keeps 10.
    whole = 2 * 2 * 16 * 2 * 4 / 1e6
    assert result.dense.figures["cache MB"] == pytest.approx(40 * whole)  # room for a step
    assert 10 * whole <= snap.figures["cache MB"] < 14 * whole
    assert "StaticCache" in result.table() and "batch 2" in result.title


def test_a_model_without_sdpa_is_timed_beside_eager() -> None:
    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=16,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    if model._supports_sdpa:
        pytest.skip("this transformers has SDPA for Gemma 2")
    result = tokred.benchmark(model, tokens(), ["snap_kv"], [0.25], repeats=1)
    assert not result.rows[0].reason and result.rows[0].figures["ms a token"] > 0
    assert "eager attention, StaticCache" in result.table()


def test_encoders_are_timed() -> None:
    result = tokred.benchmark(encoder(), images(), ["tome"], [0.5], repeats=2)
    (row,) = result.rows
    assert row.kept == 18 and row.figures["ms"] > 0 and row.figures["MB"] > 0
    with pytest.raises(ValueError, match="repeats must be an int of at least 1, got 0"):
        tokred.benchmark(encoder(), images(), repeats=0)


def test_where_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "_PASSES", 1)
    for model, inputs, name in (
        (decoder(), tokens(), "top_k_attention"), (encoder(), images(), "tome")
    ):  # fmt: skip
        result = tokred.profile(model, inputs, [name], [0.5], repeats=1)
        (row,) = result.rows
        for figures in (result.dense.figures, row.figures):
            parts = [figures[f"{part} ms"] for part in ("weights", "attention", "choosing", "rest")]
            assert sum(parts) == pytest.approx(figures["ms"])
            assert figures["weights ms"] > 0 and figures["attention ms"] > 0
        assert result.dense.figures["choosing ms"] == 0 < row.figures["choosing ms"]
        assert "overhead µs a layer" in row.figures


def test_ops_by_what_they_are_for() -> None:
    for op, kind in (
        ("aten::addmm", "weights"), ("aten::mkldnn_convolution", "weights"), ("aten::add", None),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("tokred::sparse_attention", "attention"), ("tokred::packed_qk_score", "choosing"),
        ("tokred::attention_rows", "choosing"), ("tokred::merge", "choosing"),
    ):  # fmt: skip
        assert profiler._kind(op) == kind, op
    with torch.inference_mode():
        cache = transformers.DynamicCache(config=decoder().config)
        cache.update(torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16), 0)
        cache.update(torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16), 1)
    assert held(cache) == 2 * 2 * 3 * 16 * 4
