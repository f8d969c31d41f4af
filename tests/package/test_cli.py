"""python -m tokred: what its commands print, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokred import __main__ as cli
from tokred.methods import METHODS

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
    assert "tomesd" not in printed.split("\n\n")[0]


def test_json_has_every_field(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed] == list(METHODS)
    for each in listed:
        assert {"title", "arxiv", "year", "family", "needs", "status", "summary"} < set(each)
        assert (each["options"] is None) == (METHODS[each["name"]].options is None)
    assert cli.main(["info", "--json"]) == 0
    assert {"tokred", "torch", "python", "cuda"} <= set(json.loads(capsys.readouterr().out))


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


@pytest.mark.parametrize("command", ["info", "methods", "demo"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m tokred {command}" in capsys.readouterr().out


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
