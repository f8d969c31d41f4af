"""Records the queries and keys that chosen modules pass to transformers' attention interface.

A model keeps its own attention; while the calling thread has a recording open, a tapped module also
stores references to its inputs there, without copies.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokred.patching import Overrides

_PREFIX = "tokred_tap_"


@dataclass(frozen=True)
class Attended:
    """One call of a module's attention: q [B, Hq, L, D], k [B, Hkv, N, D], the scale of its logits,
    and whether it was under a mask."""

    q: Tensor
    k: Tensor
    scale: float
    masked: bool


@dataclass
class Recording:
    """What each of the recorded modules attended with.

    stops: the first recorded module that attends ends the forward pass by raising Stopped.
    """

    calls: dict[nn.Module, list[Attended]] = field(default_factory=dict)
    stops: bool = False


class Stopped(Exception):
    """Ends a forward pass once the recording has what it wants."""


class _Open(threading.local):
    recording: Recording | None = None


_open = _Open()


@contextmanager
def record(modules: Iterable[nn.Module], stops: bool = False) -> Iterator[Recording]:
    """Opens a recording for the calling thread, in place of the one that is open."""
    outer = _open.recording
    recording = _open.recording = Recording({module: [] for module in modules}, stops)
    try:
        yield recording
    finally:
        _open.recording = outer


def missed(module: nn.Module) -> str:
    """The error message for a module of which nothing was recorded."""
    return (
        f"{type(module).__name__} did not attend once by the attention of this patch: choose "
        "attn_implementation before the patch is entered, and leave patches that were put into the "
        "model later"
    )


def tap(modules: Iterable[nn.Module], overrides: Overrides) -> None:
    """Lets the attention of the modules be recorded, as long as the overrides are in place."""
    configs = {id(module.config): module.config for module in modules}
    for config in configs.values():
        name = config._attn_implementation
        if not name.startswith(_PREFIX):
            overrides.assign(config, "_attn_implementation_internal", _register(name))


def _register(original: str) -> str:
    """The name under which attention of that name is tapped."""
    name = f"{_PREFIX}{original}"

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        recording = _open.recording
        if recording is not None and module in recording.calls:
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            masked = attention_mask is not None
            recording.calls[module].append(Attended(query.detach(), key.detach(), scale, masked))
            if recording.stops:
                raise Stopped
        return _attention(original, module)(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attend)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """The module's attention of that name; eager attention is a function of the model's file."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
