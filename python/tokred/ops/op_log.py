"""The logger `tokred`: with TOKRED_LOG=ops in the environment, a line for every call of an op."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("tokred")
LOGS_OPS = "ops" in os.environ.get("TOKRED_LOG", "").split(",")

if LOGS_OPS:
    logger.setLevel(logging.DEBUG)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)


def logged(run: Callable[..., Any], before: int) -> Callable[..., Any]:
    """`run`, which logs each call; it is called with the op, `before` other arguments, and those
    of the op."""

    def call(op: Any, *args: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            logger.debug(line(op, args[before:]))
        return run(op, *args)

    return call


def line(op: Any, args: tuple[Any, ...]) -> str:
    """As in `topk(scores=f32[2, 9], k=3)`; what has its default is left out."""
    parts = []
    for argument, value in zip(op._schema.arguments, args, strict=False):
        plain = not isinstance(value, Tensor) and argument.has_default_value()
        if plain and value == argument.default_value:
            continue
        parts.append(f"{argument.name}={_shown(value)}")
    return f"{op._schema.name.partition('::')[2]}({', '.join(parts)})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)
