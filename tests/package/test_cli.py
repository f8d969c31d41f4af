"""python -m tokred: what its commands print, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cases import torchvision_stub

torchvision_stub.install()
for needed in ("transformers", "skimage", "matplotlib", "rich"):
    pytest.importorskip(needed)

from cases import trial_models  # noqa: E402
from tokred import __main__ as cli  # noqa: E402
from tokred.methods import METHODS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_methods_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    for method in METHODS.values():
        assert method.name in printed and method.arxiv in printed
        assert (f"{method.title} ({method.status})" in printed) == (method.status != "exact")


def test_one_method_is_described(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["methods", "tome", "quest"]) == 0
    printed = capsys.readouterr().out
    assert METHODS["tome"].load().__doc__.strip() in printed
    assert METHODS["quest"].load().__doc__.strip() in printed
    assert "https://arxiv.org/abs/2210.09461" in printed and "timm's vision transformers" in printed
    assert "r is a schedule" in printed and 'r=8, order="tome"' in printed
    assert "tomesd" not in printed.split("\n\n")[0]


def test_json_has_every_field(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed] == list(METHODS)
    for each in listed:
        assert {"title", "arxiv", "year", "family", "needs", "status", "summary"} < set(each)
        assert (each["options"] is None) == (METHODS[each["name"]].options is None)
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"tokred", "torch", "python", "cuda", "cpu features"} <= set(facts)
    assert facts["optional"]["transformers"]["install"] == "'tokred[transformers]'"


def test_info_is_the_default(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("tokred ")


def test_what_it_does_not_know(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["methods", "tomato"]) == 2
    error = capsys.readouterr().err
    assert "tomato" in error and "tome" in error
    for wrong in (["info", "--jsn"], ["merge"], ["info", "tome"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        assert stop.value.code == 2
        assert wrong[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["info", "methods", "evaluate", "benchmark", "profile", "demo", "gallery", "compare"],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m tokred {command}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny vision model, as transformers saves it."""
    path = tmp_path_factory.mktemp("model")
    trial_models.encoder().save_pretrained(path)
    return path


def test_a_saved_model_is_tried(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "report"
    arguments = ["evaluate", str(saved), "--methods", "tome,snap_kv", "--budgets", "0.5"]
    assert cli.main([*arguments, "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert 'tokred.patch(model, "tome", r=6)' in printed and "CLS cosine" in printed
    assert "snap_kv: works on a causal language model" in printed
    assert {path.name for path in out.iterdir()} == {
        f"evaluate.{e}" for e in ("json", "png", "html")
    }
    assert cli.main(["evaluate", str(saved), "--methods", "snap_kv"]) == 1  # nothing was measured
    for name in ("benchmark", "profile"):
        arguments = [name, str(saved), "--methods", "tome", "--budgets", ".5", "--repeats", "1"]
        assert cli.main([*arguments, "--batch", "2"]) == 0
        assert "ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["smolm2"], 2, "did you mean smollm2"),
        (["smollm2", "--methods", "snap_kvv"], 2, "did you mean 'snap_kv'"),
        (["smollm2", "--budgets", "2"], 2, "budgets must be shares in (0, 1]"),
        (["smollm2", "--text", "nowhere.txt"], 2, "there is no file nowhere.txt"),
        (["smollm2", "--bits", "5"], 2, "bits must be some of 1, 2, 3, 4, 8, got 5"),
        (["smollm2", "--out", f"{__file__}/report"], 2, "--out must be a folder, and /"),
        (["smollm2", "--tokens", "0"], 2, "--tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_tried(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["evaluate", *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--output", __file__],
        ["gallery", "--output", __file__],
        ["gallery", "--html", f"{__file__}/page.html"],
        ["compare", "--text", __file__, "--output", __file__],
    ],
    ids=" ".join,
)
def test_a_file_is_no_folder(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    """Said before a model is loaded."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and "must be a folder, and /" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", stop)
    assert cli.run() == 1 and capsys.readouterr().err == "tokred: interrupted\n"


def test_a_closed_pipe_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.argv = ['tokred', 'methods']; "
         "from tokred.__main__ import run; sys.stdin.read(); sys.exit(run())"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.close()
    process.stdin = process.stdout = None
    _, error = process.communicate()
    assert process.returncode == 1 and error == b""


def test_normalisation_of_a_folder(tmp_path: Path) -> None:
    from tokred.commands.load import _normalisation

    path, three = tmp_path / "preprocessor_config.json", (0.1, 0.2, 0.3)
    assert _normalisation(str(tmp_path), three, three) == (three, three)
    path.write_text('{"image_mean": 0.5, "image_std": [1, 2, 3]}', encoding="utf-8")
    assert _normalisation(str(tmp_path), three, three) == ((0.5,) * 3, (1, 2, 3))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON"):
        _normalisation(str(tmp_path), three, three)
