"""tokred.evaluate: its figures beside plain formulas, rows with reasons, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from cases import torchvision_stub

torchvision_stub.install()
transformers = pytest.importorskip("transformers")

import tokred  # noqa: E402
from cases.trial_models import VOCABULARY, decoder, encoder, images, tokens  # noqa: E402
from tokred.compat import cache_keyword  # noqa: E402
from tokred.evaluation import needles  # noqa: E402
from tokred.evaluation.inputs import batches, count, without_padding  # noqa: E402


class Words:
    """A tokenizer of words."""

    def __call__(self, text: str, **_: object) -> object:
        ids = torch.tensor([[sum(map(ord, word)) % VOCABULARY for word in text.split()]])
        return type("Encoded", (), {"input_ids": ids})()


def test_figures_of_a_decoder() -> None:
    """Beside decoding by hand, the unpatched model and SnapKV."""
    ids = tokens(2)
    result = tokred.evaluate(decoder(), ids, ["snap_kv"], [0.5], decoded=4, bits=[8])
    snap, packed = result.rows
    assert snap.options == {"budget": 18, "window": 9} and snap.kept == 18

    def log_probabilities() -> Tensor:
        rows, past = [], transformers.DynamicCache(config=decoder().config)
        decoder()(ids[:, :36], **{cache_keyword(): past})
        for place in range(36, 40):
            logits = decoder()(ids[:, place, None], **{cache_keyword(): past}).logits
            rows.append(logits[:, -1].double().log_softmax(-1))
        return torch.stack(rows, 1)

    with torch.no_grad():
        dense = log_probabilities()
        with tokred.patch(decoder(), "snap_kv", **snap.options):
            ours = log_probabilities()
    for row, found in ((result.dense, dense), (snap, ours)):
        loss = -found.gather(2, ids[:, 37:, None]).mean()
        assert row.figures["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    kl = (dense.exp() * (dense - ours)).sum(-1).mean()
    assert snap.figures["logit KL"] == pytest.approx(float(kl), rel=1e-3) and kl > 1e-3
    assert snap.figures["to dense"] == pytest.approx(
        snap.figures["perplexity"] / result.dense.figures["perplexity"]
    )
    assert packed.method == "packed_cache" and packed.figures["to dense"] == pytest.approx(1, 0.1)
    assert "tokred.PackedCache(model, 8)" in packed.line


def test_all_keys_are_the_unpatched_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method that serves it by default, with needles, a list of sequences, in training."""
    monkeypatch.setattr(needles, "NEEDLES", needles.NEEDLES[:1])
    model = decoder().train()
    result = tokred.evaluate(
        model, [tokens()[0], tokens()], budgets=[1.0], decoded=1, tokenizer=Words()
    )
    assert model.training and model.model.layers[0].training
    model.eval()
    names = {row.method for row in result.rows}
    assert {"top_k_attention", "token_select", "snap_kv", "streaming_llm"} <= names
    for row in result.rows:
        if row.method == "tidal_decode":  # of models with more layers
            assert "layer" in row.reason and not row.figures
            continue
        assert row.figures["logit KL"] == pytest.approx(0, abs=1e-4), row
        assert row.figures["needle recall"] == result.dense.figures["needle recall"]


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_figures_of_an_encoder(name: str) -> None:
    result = tokred.evaluate(encoder(), images(), [name], [0.5])
    (row,) = result.rows
    with torch.no_grad(), tokred.patch(encoder(), name, trace_source=True, **row.options) as handle:
        ours = handle.unmerge(encoder()(images()).last_hidden_state)
        assert row.kept == handle.counts[-1] - 1 and abs(row.kept - 18) <= 2
    with torch.no_grad():
        cosine = torch.cosine_similarity(ours, encoder()(images()).last_hidden_state, dim=-1)
    assert row.figures["CLS cosine"] == pytest.approx(float(cosine[:, 0].mean()), abs=1e-5)
    assert row.figures["patch cosine"] == pytest.approx(float(cosine[:, 1:].mean()), abs=1e-5)
    assert result.dense.figures["CLS cosine"] == pytest.approx(1)
    assert row.line == f'tokred.patch(model, "{name}", ' + (
        f"r={row.options['r']})" if name == "tome" else f"ratio={row.options['ratio']})"
    )


def test_what_does_not_fit_is_a_row_with_its_reason() -> None:
    methods = {
        "tome": {"r": 2}, "snap_kv": {"budget": 8}, "fasa": {}, "quest": {}, "fastv": {},
        "evit": {"rr": 3}, "pitome": {"ratio": 1.5},
    }  # fmt: skip
    result = tokred.evaluate(encoder(), {"pixel_values": images()}, methods, [0.5])
    reasons = {row.method: row.reason for row in result.rows}
    assert [row.method for row in result.rows if row.figures] == ["tome"]
    assert reasons["snap_kv"] == "works on a causal language model, and this is an encoder"
    assert "a vision-language model" in reasons["fastv"]
    assert "tokred.methods.quest" in reasons["quest"]
    assert "'evit' has no option rr" in reasons["evit"] and "ratio" in reasons["pitome"]
    result = tokred.evaluate(decoder(), tokens(), ["fasa", "tome"], decoded=1)
    assert "needs dims, which calibration gives" in result.rows[0].reason
    assert "this is a causal language model" in result.rows[1].reason
    assert "not measured:" in result.table() and "needs dims" in result.table()


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokred.methods.evit import EvitOptions

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EvitOptions, "plan", stop)
    result = tokred.evaluate(encoder(), images(), ["tome", "evit", "pitome"], [0.5])
    assert result.interrupted and "interrupted" in result.table()
    tome, *others = result.rows
    assert tome.figures and all("interrupted" in row.reason for row in others)
    assert encoder()(images()).last_hidden_state.shape[1] == 37  # not patched any more
    monkeypatch.setattr(nn.Linear, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        tokred.evaluate(encoder(), images(), ["tome"])


def test_interrupted_in_a_later_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method stands beside the unpatched model on the batches that both have read."""
    from tokred.evaluation.decoding import DecoderTask

    first, others = tokens(), tokens() + 1
    alone = tokred.evaluate(decoder(), first % VOCABULARY, {"h2o": {"budget": 8}}, decoded=4)
    read, calls = DecoderTask.read, []

    def stops(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(DecoderTask, "read", stops)
    batches = [first, others % VOCABULARY]
    result = tokred.evaluate(decoder(), batches, {"h2o": {"budget": 8}}, decoded=4)
    assert result.interrupted and result.rows[0].figures == alone.rows[0].figures


def test_parts_of_a_model_keep_their_attention() -> None:
    from tokred.evaluation.decoding import dense_attention

    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=decoder().config.to_dict())
    model = transformers.LlavaForConditionalGeneration(config)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    parts = config, config.vision_config, config.text_config
    before = [part._attn_implementation for part in parts]
    assert before[1:] == ["eager", "sdpa"]
    with dense_attention(model):
        assert config.text_config._attn_implementation == "tokred"
    assert [part._attn_implementation for part in parts] == before


def test_results_are_written(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    result = tokred.evaluate(encoder(), images(), ["tome", "fasa"], [0.75, 0.5])
    assert [row.label for row in result.rows] == ["tome 0.75", "tome 0.5", "fasa"]
    report = json.loads(result.to_json(tmp_path / "new" / "a.json").read_text())
    assert report["rows"][0]["figures"] == result.rows[0].figures
    assert report["origin"]["tokred"] == tokred.__version__
    assert result.plot(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = result.to_html(tmp_path / "a.html").read_text()
    assert "data:image/png;base64" in page and "http" not in page.replace("http-equiv", "")
    assert "tokred.patch(model, &quot;tome&quot;" in page and "this is an encoder" in page
    assert result.to_dict()["interrupted"] is False


def test_a_patched_model_is_refused() -> None:
    with tokred.patch(encoder(), "tome"), pytest.raises(ValueError, match="model is patched"):
        tokred.evaluate(encoder(), images())


def test_inputs() -> None:
    padded = {"input_ids": tokens(2, 5), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}
    assert [x.shape for x in without_padding(padded)] == [(1, 4), (1, 4)]
    assert [[*b] for b in batches([[1, 2, 3], tokens(), (images(), 0)])] == [
        ["input_ids"], ["input_ids"], ["pixel_values"]
    ]  # fmt: skip
    assert next(batches([1, 2, 3]))["input_ids"].shape == (1, 3)
    assert next(batches({key: x[0] for key, x in padded.items()}))["attention_mask"].shape == (1, 5)
    for wrong, kind, message in (
        ("text", TypeError, "tokenize it first"),
        (3, TypeError, "inputs must be a tensor, a dict, a list of these or a loader, got int"),
        ([], ValueError, "inputs must have at least one batch"),
        ([{"labels": 1}], ValueError, r"inputs\[0\] must have tensors input_ids or pixel_values"),
        (torch.ones(2, 2, 2, 2, 2), ValueError, r"pixels \[B, C, H, W\]"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, "not empty"),
        (
            padded | {"attention_mask": torch.ones(2, 4)},
            ValueError,
            r"must be \[2, 5\] as input_ids",
        ),
        (padded | {"attention_mask": torch.zeros(2, 5)}, ValueError, "must leave a token"),
    ):
        with pytest.raises(kind, match=message):
            list(batches(wrong))


def test_refusals() -> None:
    for arguments, options, kind, message in (
        ((decoder(), tokens(), ["snap_kvv"]), {}, ValueError, "did you mean 'snap_kv'"),
        ((decoder(), tokens(), "snap_kv"), {}, TypeError, "methods must be names"),
        ((decoder(), tokens(), {"h2o": 3}), {}, TypeError, r"methods\['h2o'\] must be a dict"),
        ((decoder(), tokens(), None, [1.5]), {}, ValueError, r"budgets must be shares in \(0, 1\]"),
        ((decoder(), tokens()), {"bits": [5]}, ValueError, "bits must be some of 1, 2, 3, 4, 8"),
        ((decoder(), tokens()), {"decoded": 0}, ValueError, "decoded must be an int of at least 1"),
        ((decoder(), tokens()), {"bits": 4}, TypeError, "bits must be a list"),
        ((decoder(), tokens(), None, 0.5), {}, TypeError, "budgets must be a list of shares"),
        ((decoder(), tokens(), None, ["0.5"]), {}, TypeError, "budgets must be numbers, got '0.5'"),
        ((decoder(), tokens(), []), {}, ValueError, "methods must name a method"),
        ((decoder(), images()), {}, ValueError, "token numbers for LlamaForCausalLM, got pixels"),
        ((encoder(), tokens()), {}, ValueError, "pixels for ViTModel, got token numbers"),
        ((nn.ReLU(), images()), {}, ValueError, "ReLU has no weights"),
        ((decoder(), tokens(1, 3)), {}, ValueError, "at least 4 tokens, got 3"),
        ((decoder(), tokens(1, 300)), {}, ValueError, "300 tokens, and the model at most 256"),
        ((decoder(), tokens() + 100), {}, ValueError, r"token numbers must be in \[0, 128\)"),
        ((encoder(), images()), {"bits": [4]}, ValueError, "bits are for the cache of a decoder"),
        (("model", tokens()), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((nn.Linear(2, 2), images()), {}, ValueError, "Linear has no layer"),
    ):
        with pytest.raises(kind, match=message):
            tokred.evaluate(*arguments, **options)


def test_progress_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    tokred.evaluate(encoder(), images(), ["tome"], [0.5, 0.25])
    assert capsys.readouterr().err.splitlines() == [
        "1: unpatched", "1 of 2: tome 0.5", "2 of 2: tome 0.25"
    ]  # fmt: skip
    assert [count(x) for x in ([1, 2], tokens(), [tokens()] * 3, iter([]))] == [1, 1, 3, None]


def test_padding_of_texts_is_left_out() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model, mask = transformers.BertModel(config).eval(), torch.ones(1, 12, dtype=torch.long)
    short = {"input_ids": tokens(1, 12), "attention_mask": mask}
    longer = {
        "input_ids": torch.cat([tokens(1, 12), tokens(1, 5)], 1),
        "attention_mask": torch.cat([mask, torch.zeros(1, 5, dtype=torch.long)], 1),
    }
    methods = {"tome": {"r": 2}}
    for one, other in zip(
        *(tokred.evaluate(model, batch, methods).rows for batch in (short, longer)), strict=True
    ):
        assert one.kept == other.kept == 7
        assert one.figures == pytest.approx(other.figures, abs=1e-5)
        assert {*one.figures} == {"CLS cosine", "token cosine"} and one.figures["token cosine"] < 1


def test_long_options_are_left_out_of_the_line() -> None:
    dims = [torch.arange(4, dtype=torch.int32).repeat(2, 1)] * 2
    (row,) = tokred.evaluate(decoder(), tokens(), {"fasa": {"dims": dims, "k": 8}}, decoded=1).rows
    assert row.line == 'tokred.patch(model, "fasa", dims=..., k=8)' and row.figures
