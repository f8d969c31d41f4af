"""The options with which a method leaves a share of the tokens, or keeps a share of the keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import tokred.methods
from tokred.methods import Method, Needs

TOLERANCE = 0.03  # of a budget, within which the number of tokens left must be
# Methods that give up tokens in one layer; the others in their options they only read.
REDUCE_ONCE = ("hiprune",)
FORCED = {"n_init": 4, "n_local": 32}  # keys that token_select attends to in any case


def reducers(names: Sequence[str], argument: str) -> list[Method]:
    """The methods for transformers' vision encoders that have an option for how many tokens stay.

    Args:
        names: only these, if any.
        argument: what an error calls them.

    Raises:
        ValueError: a name that is none of them.
    """
    found = {
        method.name: method
        for method in tokred.methods.METHODS.values()
        if Needs.VISION_ENCODER in method.needs
        and Needs.TRAINING not in method.needs
        and "transformers" in getattr(method.options, "adapters", ())
        and options_at(method, 12, 100, 0.5) is not None
    }
    return named(found, names, argument)


def options_at(method: Method, layers: int, tokens: int, keep: float) -> dict[str, Any] | None:
    """The options with which a share `keep` of the tokens is left after the last of the layers.

    Every layer that the method reduces by default gives up as many tokens, or the same share. None
    for a method whose amount follows from what the tokens are, or that wants what only training or
    calibration knows.
    """
    assert method.options is not None
    known = {field.name for field in fields(method.options)}
    if any(default is MISSING for default in method.defaults().values()):
        return None
    if "r" in known:
        total = round(tokens * (1 - keep))
        return {"r": [total * (i + 1) // layers - total * i // layers for i in range(layers)]}
    if "ratio" not in known:
        return None
    return {"ratio": keep ** (1 / _reducing(method, layers))}


def fitted(
    method: Method,
    layers: int,
    options: dict[str, Any],
    wanted: float,
    tokens_left: Callable[[dict[str, Any]], int],
    steps: int = 8,
) -> dict[str, Any]:
    """Options whose ratio leaves about `wanted` tokens, found by trying: what a ratio leaves after
    all layers depends on the method.

    Args:
        options: to begin with; returned as they are without a ratio.
        tokens_left: runs the model with the options it is given; how many tokens that leaves.
        steps: how many runs at most.
    """
    ratio = options.get("ratio")
    if ratio is None or ratio == 1:
        return options
    low, high = 0.0, 1.0
    closest, best = math.inf, ratio
    for step in range(steps):
        left = tokens_left({"ratio": ratio})
        if abs(left - wanted) < closest:
            closest, best = abs(left - wanted), ratio
        if closest <= TOLERANCE * wanted:
            break
        if left < wanted:
            low = ratio
        else:
            high = ratio
        # Two steps as if the layers' ratios multiplied; then by bisection.
        guess = ratio * (wanted / max(left, 1)) ** (1 / _reducing(method, layers))
        ratio = guess if step < 2 and low < guess < high else (low + high) / 2
    return {"ratio": best}


def _reducing(method: Method, layers: int) -> int:
    """The number of layers in which the method drops or merges tokens by default."""
    if method.name in REDUCE_ONCE:
        return 1
    options: Any = method.options
    return max(len(options(ratio=0.5).layers(layers)), 1)


def selectors(names: Sequence[str] = ()) -> list[Method]:
    """The methods that choose k cached keys in a causal language model without calibration.

    Raises:
        ValueError: a name that is none of them.
    """
    found = {
        method.name: method
        for method in tokred.methods.METHODS.values()
        if Needs.LANGUAGE_MODEL in method.needs
        and "causal_lm" in getattr(method.options, "adapters", ())
        and "k" in method.defaults()
        and MISSING not in method.defaults().values()
    }
    return named(found, names, "--methods")


def keys_at(method: Method, keys: int) -> dict[str, Any] | None:
    """The options with which a step attends to so many keys, first and last ones included.

    None for a method whose number of keys follows from what they are, or that wants what only
    calibration knows.
    """
    known = method.defaults()
    if MISSING in known.values():
        return None
    if "budget" in known:
        window = known.get("window", 0)
        return {"budget": keys} | ({"window": max(keys // 2, 1)} if window > keys // 2 else {})
    if "k" not in known:
        return None
    # At most half of a small budget goes to keys that are not chosen by score.
    forced = {n: min(count, keys // 4) for n, count in FORCED.items() if n in known}
    return {"k": max(keys - sum(forced.values()), 1), **forced}


def named(found: Mapping[str, Any], names: Sequence[str], argument: str) -> list[Any]:
    """The values of `found` by these names, in its own order; all of them where there are none.

    Raises:
        ValueError: a name that `found` has not; the message says `argument`.
    """
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise ValueError(f"{argument} must be some of {', '.join(found)}, got {', '.join(unknown)}")
    return [value for name, value in found.items() if not names or name in names]
