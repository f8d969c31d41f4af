"""Candidates to try on a model: methods with the options of a budget, and caches of few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, replace
from typing import Any, TypeAlias

from torch import nn

import tokred.methods
from tokred.methods import Method, Needs, get, written
from tokred.patching import patch

from .budgets import keys_at, options_at

Methods: TypeAlias = Sequence[str] | Mapping[str, Mapping[str, Any]] | None

PACKED = "packed_cache"
_ADAPTERS = {"decoder": ("causal_lm", "causal_lm_cache"), "encoder": ("timm", "transformers")}
_AMOUNTS = ("k", "budget", "r", "ratio", "keep", "threshold")


@dataclass(frozen=True)
class Candidate:
    """One method with its options, or a packed cache.

    budget: the share of tokens or keys that it leaves, None where its options say how many, and
        kept how many these are. bits: of a packed cache. reason: why it cannot be measured.
    """

    method: str
    options: dict[str, Any]
    budget: float | None = None
    kept: int | None = None
    bits: int | None = None
    reason: str = ""

    @property
    def label(self) -> str:
        """Its name in a table or a plot."""
        if self.bits is not None:
            return f"{self.bits} bits"
        if self.budget is None:
            return self.method
        return f"{self.method} {self.budget:.4g}"

    @property
    def line(self) -> str:
        """The Python line that puts it into a model, for the user to copy."""
        if self.bits is not None:
            return (
                'model.set_attn_implementation("tokred"); '
                f"model.generate(ids, cache=tokred.PackedCache(model, {self.bits}))"
            )
        options = "".join(f", {name}={_short(value)}" for name, value in self.options.items())
        return f'tokred.patch(model, "{self.method}"{options})'

    def patch(self, model: nn.Module, **settings: Any) -> AbstractContextManager:
        """The patch; of a packed cache the attention that reads it."""
        from .decoding import dense_attention

        if self.bits is not None:
            return dense_attention(model)
        return patch(model, self.method, **self.options, **settings)


def _short(value: Any) -> str:
    """A value as it is written in a call; "..." for tensors and other long ones."""
    text = written(value)
    return "..." if "\n" in text or len(text) > 200 else text


def check_budgets(budgets: Iterable[float]) -> tuple[float, ...]:
    """The budgets, descending and each once.

    Raises:
        ValueError: one outside (0, 1], or none. TypeError: they are no numbers.
    """
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise TypeError(f"budgets must be a list of shares, got {budgets!r}")
    given = list(budgets)
    if wrong := [share for share in given if not isinstance(share, int | float)]:
        raise TypeError(f"budgets must be numbers, got {wrong[0]!r}")
    found = tuple(sorted({*given}, reverse=True))
    if not found or not all(0 < share <= 1 for share in found):
        raise ValueError(f"budgets must be shares in (0, 1], got {given}")
    return found


def check_bits(bits: Iterable[int]) -> None:
    """Raises for bits that no packed cache has.

    Raises:
        ValueError: saying which. TypeError: they are no list.
    """
    if not isinstance(bits, Iterable):
        raise TypeError(f"bits must be a list of numbers, got {bits!r}")
    for each in bits:
        if type(each) is not int or each not in (1, 2, 3, 4, 8):
            raise ValueError(f"bits must be some of 1, 2, 3, 4, 8, got {each!r}")


def check_methods(methods: Methods) -> None:
    """Refuses names that are no methods.

    Raises:
        ValueError: with the nearest names.
        TypeError: neither names nor a dict of options by name.
    """
    if methods is None:
        return
    if isinstance(methods, str) or not isinstance(methods, Sequence | Mapping):
        raise TypeError(f"methods must be names, or a dict of options by name, got {methods!r}")
    for name in methods:
        get(name)
    if isinstance(methods, Mapping):
        for name, options in methods.items():
            if not isinstance(options, Mapping):
                raise TypeError(f"methods[{name!r}] must be a dict of options, got {options!r}")


def for_decoder(
    methods: Methods, budgets: Sequence[float], bits: Sequence[int], keys: int
) -> list[Candidate]:
    """Candidates for a language model after a prompt of so many keys."""

    def options(method: Method, budget: float) -> tuple[dict[str, Any] | None, int]:
        kept = max(round(keys * budget), 1)
        return keys_at(method, kept), kept

    found = _candidates("decoder", methods, budgets, options)
    return found + [Candidate(PACKED, {"bits": each}, bits=each) for each in bits]


def for_encoder(
    methods: Methods, budgets: Sequence[float], layers: int, tokens: int
) -> list[Candidate]:
    """Candidates for an encoder of so many layers and tokens."""

    def options(method: Method, budget: float) -> tuple[dict[str, Any] | None, int]:
        options = options_at(method, layers, tokens, budget)
        if options and len({*(options.get("r") or ())}) == 1:
            options = {"r": options["r"][0]}  # shorter to copy
        return options, max(round(tokens * budget), 1)

    return _candidates("encoder", methods, budgets, options)


def _candidates(
    kind: str,
    methods: Methods,
    budgets: Sequence[float],
    options_of: Callable[[Method, float], tuple[dict[str, Any] | None, int]],
) -> list[Candidate]:
    if methods is None:
        methods = [
            m.name
            for m in tokred.methods.METHODS.values()
            if _serves(m, kind) and options_of(m, 0.5)[0]
        ]
    given = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    found = []
    for name, own in given.items():
        method = get(name)
        reason = _why_not(method, kind, own)
        sized = not reason and any(option in own for option in _AMOUNTS)
        if reason or sized or options_of(method, 0.5)[0] is None:
            found.append(Candidate(name, dict(own), reason=reason))
            continue
        for budget in budgets:
            options, kept = options_of(method, budget)
            found.append(Candidate(name, {**(options or {}), **own}, budget, kept))
    return found


def _serves(method: Method, kind: str) -> bool:
    adapters = getattr(method.options, "adapters", ())
    return Needs.TRAINING not in method.needs and any(a in adapters for a in _ADAPTERS[kind])


def _why_not(method: Method, kind: str, own: Mapping[str, Any]) -> str:
    """Why a method cannot be put into a model of this kind; empty where it can."""
    if method.options is None:
        return f"has functions only, in tokred.methods.{method.name}; no patch puts it into a model"
    adapters = getattr(method.options, "adapters", ())
    if not any(adapter in adapters for adapter in _ADAPTERS[kind]):
        return f"works on {method.needs[0].value}, and this is {_WORDS[kind]}"
    missing = [n for n, value in method.defaults().items() if value is MISSING and n not in own]
    if missing:
        return (
            f"needs {', '.join(missing)}, which calibration gives: pass methods="
            f"{{{method.name!r}: {{{missing[0]!r}: ...}}}}"
        )
    return ""


_WORDS = {"decoder": "a causal language model", "encoder": "an encoder"}


def refused(candidate: Candidate, error: Exception) -> Candidate:
    """The candidate with the reason that the error gives."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
    return replace(candidate, reason=kind + text)
