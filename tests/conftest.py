"""The fixtures that run a test on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("cases")

from cases import backends, torchvision_stub  # noqa: E402
from cases.backends import ISAS, KERNELS, Backend, set_cpu_isa  # noqa: E402

torchvision_stub.install()


@pytest.fixture(scope="session")
def default_isa() -> str | None:
    return None if backends._C is None else backends._C.cpu_isa()


@pytest.fixture
def one_thread(default_isa: str | None) -> Iterator[None]:
    """One thread, which is quickest at these sizes; restores the threads and the ISA afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if default_isa is not None:
        set_cpu_isa(default_isa)


@pytest.fixture(params=("reference", *KERNELS))
def backend(request: pytest.FixtureRequest, one_thread: None) -> Backend:
    """Every implementation, the plain torch one included."""
    return backends.ready(request.param)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, one_thread: None) -> Backend:
    """The implementations that promise the same bits in any batch."""
    return backends.ready(request.param)


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
