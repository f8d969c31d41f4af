"""The backends every op is tested on, and the comparisons the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision_stub
from torch import Tensor

import tokred
from tokred import PackedKV, reference

try:
    from tokred import _C
except ImportError:
    _C = None

torchvision_stub.install()

ISAS = ("generic", "avx2", "avx512")
KERNELS = (*(f"cpu-{isa}" for isa in ISAS), "simt", "cuda")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SIMT_LIBRARY = Path(
    os.environ.get("TOKRED_SIMT_LIBRARY", Path(__file__).parents[1] / "build" / "libtokred_simt.so")
)


# Their wrappers take more than the ops do.
PACKED_OPS = ("kv_pack", "kv_unpack", "kv_append", "packed_attention", "packed_qk_score")


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
        return type(value)(move(v, device) for v in value)
    if isinstance(value, PackedKV):
        codes, params = move((value.codes, value.params), device)
        return replace(value, codes=codes, params=params)
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
        if self.name == "simt" and op in PACKED_OPS:
            return _wrapper_on_simt(op)
        if self.name == "simt":
            return getattr(torch.ops.tokred_simt, op)
        return getattr(tokred, op)

    def run(self, op: str, *args: Any, **kwargs: Any) -> Any:
        args = move(args, self.device)
        kwargs = {name: move(value, self.device) for name, value in kwargs.items()}
        return move(self.function(op)(*args, **kwargs), "cpu")


def _simt_loaded() -> bool:
    if not SIMT_LIBRARY.exists():
        return False
    torch.ops.load_library(str(SIMT_LIBRARY))
    return True


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


@pytest.fixture(scope="session")
def default_isa() -> str | None:
    return None if _C is None else _C.cpu_isa()


@pytest.fixture
def one_thread(default_isa: str | None) -> Iterator[None]:
    """One thread, which is quickest at these sizes; restores the threads and the ISA afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if default_isa is not None:
        set_cpu_isa(default_isa)


def _backend(name: str) -> Backend:
    """The backend, ready to run; skips where this machine cannot run it."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "simt" and not _simt_loaded():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{SIMT_LIBRARY} is not built")
    isa = name.removeprefix("cpu-")
    if isa in ISAS and not set_cpu_isa(isa):
        pytest.skip(f"the CPU kernels cannot run on {isa} here")
    return Backend(name)


@pytest.fixture(params=("reference", *KERNELS))
def backend(request: pytest.FixtureRequest, one_thread: None) -> Backend:
    """Every implementation, the plain torch one included."""
    return _backend(request.param)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, one_thread: None) -> Backend:
    """The implementations that promise the same bits in any batch."""
    return _backend(request.param)


@pytest.fixture
def on_every_cpu(one_thread: None) -> Callable[[Callable[[], Any]], dict[str, Any]]:
    """Calls a function on every supported ISA with 1 and 2 threads."""

    def call(function: Callable[[], Any]) -> dict[str, Any]:
        results = {}
        for isa in filter(set_cpu_isa, ISAS):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results[f"{isa}, {threads} threads"] = function()
        return results

    return call


def label(case: Any) -> str:
    """A test id: the fields of a dataclass that differ from their defaults."""
    values = {f.name: getattr(case, f.name) for f in fields(case)}
    changed = [f.name for f in fields(case) if values[f.name] != f.default]
    return ",".join(f"{name}={values[name]}".replace("torch.", "") for name in changed) or "default"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def widened(inputs: tuple) -> tuple:
    """The inputs with their float tensors in float64."""
    return tuple(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    )


def assert_bitwise_equal(actual: Any, expected: Any, context: str = "") -> None:
    """Equal bits, NaN included; the message names the first element that differs."""
    for number, (a, b) in enumerate(zip(flat(actual), flat(expected), strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{context}: result {number}"
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        different = (a.contiguous().view(width) != b.contiguous().view(width)).nonzero()
        if len(different):
            where = tuple(different[0].tolist())
            pytest.fail(
                f"{context}: result {number} differs at {len(different)} places, first at {where}: "
                f"{a[where].item()!r} is not {b[where].item()!r}"
            )


def assert_one_result(results: dict[str, Any]) -> None:
    """All of them have the bits of the first."""
    first, *others = results.items()
    for name, result in others:
        assert_bitwise_equal(result, first[1], f"{name} against {first[0]}")


def assert_as_accurate(
    actual: Tensor, exact: Tensor, same_precision: Tensor, slack: float, context: str = ""
) -> None:
    """At most twice the error of a plain torch computation at the same precision, plus slack.

    `exact` is in float64; where it is not finite, actual must be the same.
    """
    actual, same_precision = actual.double(), same_precision.double()
    finite = exact.isfinite()
    same = torch.where(exact.isnan(), actual.isnan(), actual == exact)
    assert same[~finite].all(), f"{context}: not finite in different places"
    error = (actual - exact)[finite].abs()
    allowed = 2 * (same_precision - exact)[finite].abs().nan_to_num(0)
    limit = (allowed.max() if allowed.numel() else 0) + slack
    assert (error <= limit).all(), f"{context}: error {error.max():.3g}, allowed {limit:.3g}"
