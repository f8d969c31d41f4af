"""The fixtures that run a test on every backend."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("cases")

from cases import backends, torchvision_stub  # noqa: E402
from cases.backends import HERE, ISAS, KERNELS, Backend, set_cpu_isa  # noqa: E402

torchvision_stub.install()

BACKENDS = ("backend", "kernels", "processors")  # the fixtures that are one of them

SLOWEST = "package/test_demo.py"  # comes first, so that no worker waits for it at the end


def pytest_report_header() -> list[str]:
    reasons = {name: backends.why_not(name) for name in KERNELS if name not in HERE}
    left_out = [f"not {name} ({reason})" for name, reason in reasons.items()]
    return [f"backends: {', '.join(['reference', *HERE, *left_out])}"]


def pytest_configure() -> None:
    if "simt" not in HERE and os.environ.get("CI"):
        raise pytest.UsageError(backends.why_not("simt"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """No float64 on devices; the backends of a case run one after another and share its oracle."""
    params = {item: item.callspec.params if hasattr(item, "callspec") else {} for item in items}

    def backend(item: pytest.Item) -> str | None:
        return next((params[item][name] for name in BACKENDS if name in params[item]), None)

    def is_double(item: pytest.Item) -> bool:
        case = params[item].get("case")
        return torch.float64 in (params[item].get("dtype"), getattr(case, "dtype", None))

    def case(item: pytest.Item) -> str:
        function, _, names = item.nodeid.partition("[")
        return f"{function}[{names.replace(backend(item) or '', '', 1)}"

    unsupported = [i for i in items if backend(i) in ("simt", "cuda") and is_double(i)]
    config.hook.pytest_deselected(items=unsupported)
    left_out = set(unsupported)
    first: dict[str, int] = {}
    order = {
        item: (not item.path.match(SLOWEST), first.setdefault(case(item), place))
        for place, item in enumerate(items)
    }
    items[:] = sorted((item for item in items if item not in left_out), key=order.__getitem__)


def pytest_collection_finish() -> None:
    """Takes the tests and modules out of the garbage collector, which needs a second for them."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(params=("reference", *HERE))
def backend(request: pytest.FixtureRequest, one_thread: None) -> Backend:
    """Every implementation, the plain torch one included."""
    return backends.ready(request.param)


@pytest.fixture(params=HERE)
def kernels(request: pytest.FixtureRequest, one_thread: None) -> Backend:
    """The implementations that promise the same bits in any batch."""
    return backends.ready(request.param)


@pytest.fixture(params=[name for name in HERE if name != "simt"])
def processors(request: pytest.FixtureRequest, one_thread: None) -> Backend:
    """The kernels that run on real processors, for what takes the emulated device too long."""
    return backends.ready(request.param)


@pytest.fixture
def on_every_cpu(one_thread: None) -> Callable[[Callable[[], Any]], dict[str, Any]]:
    """Calls a function on every supported ISA, without VNNI and with it, with 1 and 2 threads."""

    def call(function: Callable[[], Any]) -> dict[str, Any]:
        results = {}
        for isa in filter(set_cpu_isa, ISAS):
            for vnni in backends.each_vnni():
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    results[f"{isa}{' with VNNI' * vnni}, {threads} threads"] = function()
        return results

    return call
