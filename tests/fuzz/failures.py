"""Calls of a PackedCache in which one allocation fails: the cache is as it was, and goes on."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import Mismatch
from draw import Draw
from guard import Guard
from histories import LAYERS, config, equal, live, options

import tokred

MAX_ALLOCATIONS = 200
_guard = Guard()


def _state(cache: Any) -> list:
    return [(layer.length, live(layer)) for layer in cache.layers]


def examine(name: str, seed: int) -> None:
    """Every call on one cache, with each of its allocations failing in turn.

    Raises:
        Mismatch: a failed call changed the cache, or the next one goes wrong.
    """
    draw = Draw(name, seed)
    head_dim = 16 * draw.one_of(1, 2, 4)
    model, some = config(head_dim, 2), options(draw, head_dim)
    some.pop("capacity", None)
    tokens = draw.one_of(0, 3, 40, 100)

    def states(count: int) -> torch.Tensor:
        return torch.randn(2, 2, count, head_dim, generator=draw.generator())

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        base = tokred.PackedCache(model, **some)
        for number in range(LAYERS if tokens else 0):
            base.update(states(tokens), states(tokens), number)
        new = states(30), states(30)
        remove = -draw.randrange(1, tokens + 1) if tokens else 0
        path = Path(folder) / "cache"
        calls: dict[str, Callable[[Any], Any]] = {"update": lambda c: c.layers[0].update(*new)}
        if tokens:
            calls |= {
                "crop": lambda c: c.layers[0].crop(remove),
                "reorder": lambda c: c.layers[0].reorder_cache(torch.tensor([1, 0])),
                "select": lambda c: c.layers[0].batch_select_indices(torch.tensor([1])),
                "repeat": lambda c: c.layers[0].batch_repeat_interleave(2),
                "save": lambda c: c.save(path),
            }
        for call_name, call in calls.items():
            where = f"{call_name}, {tokens} tokens, PackedCache(**{some}), head_dim {head_dim}"
            _examine_call(base, call, where)


def _examine_call(base: Any, call: Callable[[Any], Any], where: str) -> None:
    expected = copy.deepcopy(base)
    call(expected)
    for allocation in range(MAX_ALLOCATIONS):
        cache = copy.deepcopy(base)
        failed = False
        with _guard.on():
            try:
                with _guard.failing(allocation):
                    call(cache)
            except (RuntimeError, MemoryError):
                failed = True
        if not failed:
            return
        if not equal(_state(cache), _state(base)):
            raise Mismatch(f"allocation {allocation} of {where} failed, and the cache changed")
        call(cache)
        if not equal(_state(cache), _state(expected)):
            raise Mismatch(f"after the failed allocation {allocation} {where} does something else")
    raise Mismatch(f"{where} hides failed allocations, or makes over {MAX_ALLOCATIONS}")
