"""What a method gives a patch: a TokenReducer, or a KeySelector.

A method is put into a model as an object of its options class. Its `adapters` name the integrations
(tokred.integrations) whose layers it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from .attention_call import AttentionCall
from .reduction_call import Reduction, ReductionCall


class TokenReducer(Protocol):
    """A method that gives layers fewer tokens: an object of its options.

    One object serves all layers, all threads and all forward passes, so it keeps no state: what one
    layer leaves to the next belongs into `call.carried`.
    """

    adapters: ClassVar[tuple[str, ...]]

    def layers(self, num_layers: int) -> Sequence[int]:
        """The layers, of num_layers, that may give up tokens; all others stay untouched.

        Raises:
            ValueError: options that do not fit the number of layers.
        """

    def plan(self, call: ReductionCall) -> Reduction:
        """What one of these layers does with its tokens: a token map, the tokens that stay, or the
        new tokens, see Reduction.

        Their number follows from shapes and options alone, never from values.
        """


class KeySelector(Protocol):
    """A method that chooses the cached keys that a layer attends to.

    Its options have `attention(layers)`, which returns one KeySelector for all full-attention
    layers of a model, `layers` being the model's own numbers of them; and `rotation`, "cached", or
    "compact" for queries and keys without rotation. Where it works on a PackedCache, its class has
    `reads_packed = True`.
    """

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out [B, Hq, L, Dv], lse f32 [B, Hq, L]) of one layer; call.dense() where it is dense."""
