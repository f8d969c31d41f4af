"""The backends every op is tested on: plain torch, the CPU kernels on each ISA, and the devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tokred
from tokred import PackedKV, reference

try:
    from tokred import _C
except ImportError:
    _C = None

ISAS = ("generic", "avx2", "avx512")
KERNELS = (*(f"cpu-{isa}" for isa in ISAS), "simt", "cuda")
SIMT_LIBRARY = Path(
    os.environ.get("TOKRED_SIMT_LIBRARY", Path(__file__).parents[2] / "build" / "libtokred_simt.so")
)


# Their wrappers take more than the ops do.
PACKED_OPS = ("kv_pack", "kv_unpack", "kv_append", "packed_attention", "packed_qk_score")
POOLING_OPS = ("segment_pool", "segment_weights", "adjacent_runs", "forest_merge")


def _wrapper_on_simt(op: str) -> Callable[..., Any]:
    """The op's wrapper, calling the emulated device."""

    wrapper = getattr(tokred, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.dict(wrapper.__globals__, {"_ops": torch.ops.tokred_simt}):
            return wrapper(*args, **kwargs)

    return call


def move(value: Any, device: str) -> Any:
    """The value with every tensor in it on the device, strides kept."""
    if isinstance(value, tuple | list):
        moved = [move(v, device) for v in value]
        return moved if isinstance(value, list) else tuple(moved)
    if isinstance(value, PackedKV):
        codes, params, levels = move((value.codes, value.params, value.levels), device)
        return replace(value, codes=codes, params=params, levels=levels)
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    elements = value.untyped_storage().nbytes() // value.element_size()
    storage = value.detach().as_strided((elements,), (1,), 0).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


@dataclass(frozen=True)
class Backend:
    """One way of running an op. Inputs and results are CPU tensors."""

    name: str

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" else "cpu"

    def function(self, op: str) -> Any:
        if self.name == "reference":
            return getattr(reference, op)
        if self.name == "simt" and op in (*PACKED_OPS, *POOLING_OPS):
            return _wrapper_on_simt(op)
        if self.name == "simt":
            return getattr(torch.ops.tokred_simt, op)
        return getattr(tokred, op)

    def run(self, op: str, *args: Any, **kwargs: Any) -> Any:
        args = move(args, self.device)
        kwargs = {name: move(value, self.device) for name, value in kwargs.items()}
        return move(self.function(op)(*args, **kwargs), "cpu")


def set_cpu_isa(isa: str) -> bool:
    """Whether the CPU kernels now run on that instruction set.

    Where tokred._C was built for another Python they cannot be switched, and run on what
    TOKRED_CPU_ISA names, or else on the best there is.
    """
    if _C is not None:
        return _C.set_cpu_isa(isa)
    capability = torch.backends.cpu.get_cpu_capability().lower()
    best = capability if capability in ISAS else "generic"
    return isa == os.environ.get("TOKRED_CPU_ISA", best)


def each_vnni() -> Iterator[bool]:
    """Without VNNI, then with it where the CPU kernels now use it: results are the same."""
    choices = (False, True) if _C is not None and _C.cpu_isa() == "avx512" and _C.cpu_vnni() else ()
    for use in choices or (False,):
        if choices:
            _C.set_cpu_vnni(use)
        yield use


def why_not(name: str) -> str | None:
    """Why this machine cannot run the backend; None where it can."""
    if name == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if name == "simt" and not SIMT_LIBRARY.exists():
        return f"{SIMT_LIBRARY} is not built"
    isa = name.removeprefix("cpu-")
    if isa in ISAS and isa not in _ISAS_HERE:
        return "not on this CPU, or not built"
    return None


def _supported_isas() -> list[str]:
    before = None if _C is None else _C.cpu_isa()
    supported = [isa for isa in ISAS if set_cpu_isa(isa)]
    if before is not None:
        set_cpu_isa(before)
    return supported


_ISAS_HERE = _supported_isas()
HERE = tuple(name for name in KERNELS if why_not(name) is None)


def ready(name: str) -> Backend:
    """The backend, loaded and switched to."""
    if name == "simt":
        torch.ops.load_library(str(SIMT_LIBRARY))
    if name.startswith("cpu-") and not set_cpu_isa(name.removeprefix("cpu-")):
        raise RuntimeError(f"{name} does not run here")
    return Backend(name)
