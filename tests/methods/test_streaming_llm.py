"""StreamingLLM: the first tokens and the last ones."""

from __future__ import annotations

import pytest
from torch import Tensor

from cases.eviction import Step, check_layer
from tokred.methods.streaming_llm import StreamingLlmOptions


@pytest.mark.parametrize("sinks", [0, 3])
def test_it_keeps_sinks_and_the_last_tokens(sinks: int) -> None:
    def published(step: Step) -> Tensor:
        stays = step.alive.clone()
        stays[:, sinks : stays.shape[1] - (11 - sinks)] = False
        return stays

    check_layer(StreamingLlmOptions(budget=11, sinks=sinks), published)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="budget must be at least 5"):
        StreamingLlmOptions(budget=4)
    with pytest.raises(ValueError, match="sinks must be at least 0"):
        StreamingLlmOptions(sinks=-1)
