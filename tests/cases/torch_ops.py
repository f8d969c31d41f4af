"""What the tests of the ops inside torch's machinery share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from cases.compare import assert_bitwise_equal
from cases.inputs import generator


def tokens(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=generator()).requires_grad_(grad)


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def assert_compiles_once(function: Callable[..., Any], calls: Iterable[tuple]) -> None:
    """Without breaks and recompiles over calls of different lengths, to the same bits."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for arguments in calls:
        with torch.no_grad():
            assert_bitwise_equal(compiled(*arguments), function(*arguments))
        frames.append(counter.frame_count)
    # Tracing may start over within the first call, to step out of a context manager.
    assert frames == frames[:1] * len(frames)
