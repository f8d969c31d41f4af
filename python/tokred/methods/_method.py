"""What a method's file says of it, its METHOD, and the base of the options tokred.patch fills."""

from __future__ import annotations

import importlib
import re
import types
import typing
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from types import ModuleType
from typing import Any, Literal

Status: typing.TypeAlias = Literal["exact", "approximate"]


class Family(Enum):
    """What a method does to save time or memory; lists of methods are in this order."""

    MERGE = "merge similar tokens"
    PRUNE = "drop tokens inside a model"
    DECODE = "choose keys for every decoded token"
    PREFILL = "choose keys for prompts, images and video"
    EVICT = "keep fewer tokens in the KV cache"
    QUANTIZE = "keep the KV cache in fewer bits"
    REUSE = "reuse what an earlier pass computed"
    REWEIGHT = "change what attention gives"


class Needs(Enum):
    """What a method works on, and what has to be done to a model before it does."""

    VISION_ENCODER = "a vision encoder"
    IMAGE_DIFFUSION = "an image diffusion model"
    VIDEO_DIFFUSION = "a video diffusion model"
    VISION_LANGUAGE_MODEL = "a vision-language model"
    LANGUAGE_MODEL = "a causal language model"
    DIFFUSION_LANGUAGE_MODEL = "a diffusion language model"
    CALIBRATION = "a calibration pass"
    TRAINING = "training with the method"


@dataclass(frozen=True)
class Options:
    """Base class of <Method>Options, frozen dataclasses that tokred.patch fills.

    Fields of type int, float, bool, str and Literal, and these | None, refuse other values by name.

    Raises:
        ValueError: a field has a value of another type.
    """

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise ValueError(f"{name} must be {_in_words(hint)}, got {value!r}")


_NUMBERS: dict[Any, Any] = {int: int, float: (int, float)}
_WORDS = {
    int: "an int",
    float: "a number",
    bool: "True or False",
    str: "a str",
    types.NoneType: "None",
}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type, as far as `_WORDS` has it."""
    members = _members(hint)
    if len(members) > 1:
        return any(_fits(value, member) for member in members)
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _WORDS else True


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return " or ".join(_WORDS[member] for member in _members(hint))


def written(value: Any) -> str:
    """A default as it is written in a call."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


@dataclass(frozen=True)
class Method:
    """What a published method is.

    Args:
        title, arxiv: of the paper; its number on arXiv, such as "2210.09461".
        family: under which it is listed.
        needs: what it works on, then what has to be done to the model first.
        status: "exact" where the published algorithm is followed to the letter, "approximate" where
            the result differs in a way that the module's docstring states.
        summary: what it does, in one line.
        options: the class that tokred.patch fills; None where the method is functions alone.
        name: of the file; the registry fills it in.

    Raises:
        ValueError: one of these is none; the message names it.
    """

    title: str
    arxiv: str
    family: Family
    needs: tuple[Needs, ...]
    status: Status
    summary: str
    options: type[Options] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for name, text in (("title", self.title), ("summary", self.summary)):
            if not isinstance(text, str) or not text.strip() or "\n" in text:
                raise ValueError(f"{name} must be one line of text, got {text!r}")
        if not isinstance(self.arxiv, str) or not re.fullmatch(r"\d{4}\.\d{4,5}", self.arxiv):
            raise ValueError(f'arxiv must be a number such as "2210.09461", got {self.arxiv!r}')
        if not isinstance(self.family, Family):
            raise ValueError(f"family must be one of tokred.methods.Family, got {self.family!r}")
        needs = self.needs
        if not isinstance(needs, tuple) or not needs or {type(need) for need in needs} != {Needs}:
            raise ValueError(f"needs must be a tuple of tokred.methods.Needs, got {needs!r}")
        if self.status not in typing.get_args(Status):
            raise ValueError(f"status must be 'exact' or 'approximate', got {self.status!r}")
        options = self.options
        if options is not None and not (isinstance(options, type) and issubclass(options, Options)):
            raise ValueError(
                f"options must be None or a subclass of tokred.methods.Options, got {options!r}"
            )

    @property
    def year(self) -> int:
        """The year of the paper's first version on arXiv, from its number."""
        return 2000 + int(self.arxiv[:2])

    @property
    def needs_in_words(self) -> str:
        return ", ".join(need.value for need in self.needs)

    def defaults(self) -> dict[str, Any]:
        """The default of every option, dataclasses.MISSING where it has none."""
        return {f.name: f.default for f in fields(self.options)} if self.options else {}

    def as_dict(self) -> dict[str, Any]:
        """All of this in what JSON has: options with their defaults, null where there is none."""
        options = {n: None if d is MISSING else d for n, d in self.defaults().items()}
        return {
            "name": self.name,
            "title": self.title,
            "arxiv": self.arxiv,
            "year": self.year,
            "family": self.family.name.lower(),
            "needs": [need.name.lower() for need in self.needs],
            "status": self.status,
            "summary": self.summary,
            "options": None if self.options is None else options,
        }

    def load(self) -> ModuleType:
        """The module tokred.methods.<name>."""
        return importlib.import_module(f"tokred.methods.{self.name}")

    def usage(self) -> str:
        """How it is put into a model, with the defaults; empty where it is functions alone."""
        if self.options is None:
            return ""
        options = (
            f", {name}=..." if default is MISSING else f", {name}={written(default)}"
            for name, default in self.defaults().items()
        )
        return f'tokred.patch(model, "{self.name}"{"".join(options)})'
