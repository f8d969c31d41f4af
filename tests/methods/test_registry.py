"""The registry of methods: what each file says of its own, and that a new file is a new method."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tokred
from cases.new_methods import methods_in
from tokred import methods
from tokred.__main__ import main
from tokred.methods import METHODS, Family, Method, Needs, Options, get, names

ROOT = Path(methods.__file__).resolve().parents[3]
PATCHED = [method for method in METHODS.values() if method.options is not None]
PAPER = dict(
    title="A Paper", arxiv="2401.00001", family=Family.DECODE, needs=(Needs.LANGUAGE_MODEL,),
    status="exact", summary="do nothing",
)  # fmt: skip


def id_of(method: Method) -> str:
    return method.name


# What each file says.


@pytest.mark.parametrize("name", names())
def test_file_says_what_its_method_is(name: str) -> None:
    """Its METHOD is whole, and its docstring has the paper's title and number, and the status."""
    method = get(name)
    doc = " ".join((method.load().__doc__ or "").split())
    assert method.title in doc and method.arxiv in doc
    assert ("approximate" in doc) == (method.status == "approximate")


@pytest.mark.parametrize("name", names())
def test_every_method_has_a_test(name: str) -> None:
    imports = re.compile(rf"tokred\.methods(\.{name}\b| import [^\n]*\b{name}\b)")
    tests = (ROOT / "tests").rglob("test_*.py")
    assert any(imports.search(test.read_text()) for test in tests), f"no test imports {name}"


def test_they_are_listed_by_family_and_age() -> None:
    listed = list(METHODS.values())
    assert sorted(METHODS) == names()
    order = [(list(Family).index(m.family), m.year, m.arxiv, m.name) for m in listed]
    assert order == sorted(order)
    assert METHODS["tome"].year == 2022 and METHODS["arkv"].year == 2026


# Options.


@pytest.mark.parametrize("method", PATCHED, ids=id_of)
def test_options_are_named_and_described(method: Method) -> None:
    words = method.name.split("_")
    assert method.options.__name__ == "".join(map(str.capitalize, words)) + "Options"
    for field in dataclasses.fields(method.options):
        assert re.search(rf"\b{field.name}\b", method.options.__doc__), f"{field.name} is unsaid"


@pytest.mark.parametrize("method", PATCHED, ids=id_of)
def test_options_refuse_other_types(method: Method) -> None:
    """Each option with a simple type is refused by its name."""
    wrong = {int: (2.5, "8", True), float: ("0.5", True), bool: ("yes", 2), str: (3, False)}
    required = {n: [] for n, d in method.defaults().items() if d is dataclasses.MISSING}
    for option, hint in typing.get_type_hints(method.options).items():
        members = {*typing.get_args(hint)} - {type(None)} or {hint}
        values = wrong.get(*members, ()) if len(members) == 1 else ()
        if typing.get_origin(hint) is typing.Literal:
            values = ("nothing like it", 7)
        for value in values:
            words = rf"{option} must be .*got {re.escape(repr(value))}"
            with pytest.raises(ValueError, match=words):
                method.options(**{**required, option: value})


@pytest.mark.parametrize("method", PATCHED, ids=id_of)
def test_what_can_be_patched_is_swept(method: Method) -> None:
    """Over the models of test_model_sweep_encoders, test_model_sweep_decoders, test_diffusers or
    test_vision_language."""
    swept = {
        Needs.VISION_ENCODER: {"timm", "transformers"},
        Needs.LANGUAGE_MODEL: {"causal_lm", "causal_lm_cache"},
        Needs.VISION_LANGUAGE_MODEL: {"vision_language"},
        Needs.IMAGE_DIFFUSION: {"diffusers"},
    }
    known = [need for need in method.needs if need in swept]
    assert known, f"no sweep has models for {method.name}, which needs {method.needs_in_words}"
    fitting = set.union(*(swept[need] for need in known))
    assert {*method.options.adapters} <= fitting, f"not what {method.name} needs"


# The registry.


def test_only_the_method_asked_for_is_imported() -> None:
    code = (
        "import sys; from tokred import methods; methods.get('tome'); "
        "print(*(n for n in sys.modules if n.startswith('tokred.methods.') and '._' not in n))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "python",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == ["tokred.methods.tome"]


@pytest.mark.parametrize("field", PAPER)
def test_a_method_that_says_too_little_is_refused(field: str) -> None:
    for value in ("", None, (), "two\nlines"):
        with pytest.raises(ValueError, match=f"{field} must be"):
            Method(**{**PAPER, field: value})
    with pytest.raises(TypeError, match=f"'{field}'"):
        Method(**{name: value for name, value in PAPER.items() if name != field})


def test_options_are_a_class_of_options() -> None:
    for value in (dict, Options(), "k"):
        with pytest.raises(ValueError, match="options must be None or a subclass of"):
            Method(**PAPER, options=value)


@pytest.fixture
def new_file(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Writes the text of a method's file beside the others; returns the method's name."""

    def write(text: str) -> str:
        (tmp_path / "new_method.py").write_text(text)
        return "new_method"

    with methods_in(tmp_path):
        yield write


NEW = '''
"""A new method."""

from dataclasses import dataclass

from tokred.methods import Family, Method, Needs, Options


@dataclass(frozen=True)
class NewMethodOptions(Options):
    """k: keys attended to, if it did anything."""

    k: int = 256

    adapters = ("causal_lm",)

    def attention(self, layers):
        return self

    def attend(self, call):
        return call.dense()


METHOD = Method(
    title="A New Method",
    arxiv="2401.00001",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="attend to everything",
    options=NewMethodOptions,
)
'''


def test_a_new_file_is_a_new_method(
    new_file: Callable[[str], str], capsys: pytest.CaptureFixture
) -> None:
    """Listed, described, documented, patched and swept, with no other file changed."""
    from bench import methods_page
    from cases.tiny_models import left_padded, selectors, tiny_lm

    name = new_file(NEW)
    assert name in names() and methods.METHODS[name].title == "A New Method"
    assert main(["methods"]) == 0 and "A New Method" in capsys.readouterr().out
    assert f"[`{name}`]" in methods_page.overview()
    assert f'tokred.patch(model, "{name}", k=256)' in methods_page.page()
    assert selectors(2, 4, 3)[name] == {"k": 3}
    model, (ids, mask) = tiny_lm("Llama"), left_padded()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with tokred.patch(model, name):
            logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="k must be an int"):
        tokred.patch(model, name, k=2.5)


def test_the_page_on_adding_a_method_shows_a_whole_one(tmp_path: Path) -> None:
    from cases.tiny_models import reducers

    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    shown = re.search(r"```python\n# python/tokred/methods/(\w+)\.py\n(.*?)```", page, re.DOTALL)
    name, text = shown.groups()
    (tmp_path / f"{name}.py").write_text(text)
    with methods_in(tmp_path):
        test_file_says_what_its_method_is(name)
        test_options_are_named_and_described(get(name))
        test_options_refuse_other_types(get(name))
        assert name in reducers()


def test_a_file_without_a_method_says_what_it_lacks(new_file: Callable[[str], str]) -> None:
    name = new_file('"""A file with functions alone."""\n')
    with pytest.raises(TypeError, match=r"new_method\.py must define METHOD = "):
        get(name)
    with pytest.raises(TypeError, match=r"new_method\.py must define METHOD = "):
        methods.METHODS  # noqa: B018


def test_functions_alone_cannot_be_put_into_a_model() -> None:
    words = r"call the functions of tokred\.methods\.quest, which need a causal language model"
    with pytest.raises(ValueError, match=words):
        tokred.patch(torch.nn.Linear(1, 1), "quest")
    assert issubclass(METHODS["tome"].options, Options) and METHODS["quest"].options is None
