"""What a method gives a patch: a TokenReducer, a KeySelector, a KeyEvictor, a VisualReducer or a
PromptPruner.

A method is put into a model as an object of its options class. Its `adapters` name the integrations
(tokred.integrations) whose layers it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from .attention_call import AttentionCall
from .eviction_call import Eviction, EvictionCall, Replacement
from .prompt_call import LayerStates, PromptCall, PromptTokens
from .reduction_call import Reduction, ReductionCall
from .visual_call import VisualCall, VisualReduction


def name_of(method: object) -> str:
    """The name that users give a method: of one in tokred.methods that of its file, of one of their
    own that of its class."""
    package, _, name = type(method).__module__.rpartition(".")
    known = package == "tokred.methods" and not name.startswith("_")
    return name if known else type(method).__name__


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
        """The reduction of one of these layers: a token map, the tokens that stay, or the new
        tokens, see Reduction.

        Their number follows from shapes and options alone, never from values.
        """


class KeySelector(Protocol):
    """A method that chooses the cached keys that a layer attends to.

    Its options have `attention(layers)`, which returns one KeySelector for all full-attention
    layers of a model, `layers` being the model's own numbers of them; `heads_may_be_split`, True
    where it works on each head alone or by `AttentionCall.score`; and `rotation`, "cached", or
    "compact" for queries and keys without rotation. Where it works on a PackedCache, its class has
    `reads_packed = True`.
    """

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out [B, Hq, L, Dv], lse f32 [B, Hq, L]) of one layer; call.dense() where it is dense."""


class KeyEvictor(Protocol):
    """A method that keeps fewer keys than there are tokens: an object of its options.

    Its adapters are ("causal_lm_cache",). One object serves all layers, threads and forward passes,
    so it keeps no state: what it knows of the stored keys goes into Eviction.state. Options that
    compare equal are the same method: a cache goes on with either. A method may also have:

    prompts_only: True if it is not asked after passes of a single token.
    reads_rotary: True if it reads the model's rotary embedding, call.rotary.
    attended(module, layer, attentions, given, rotary): is called after the attention module, with
        the layer's cache and the module's arguments; see PressAdapter.
    """

    adapters: ClassVar[tuple[str, ...]]

    def evict(self, call: EvictionCall) -> Eviction | Replacement | None:
        """Which keys of a layer stay, after the attention of every forward pass; None: all.

        Heads may keep different numbers of keys: those with fewer end in -1 (Eviction.padded).
        """


class VisualReducer(Protocol):
    """A method that gives a language model fewer visual tokens: an object of its options.

    Its adapters are ("vision_language",). One object serves all images, threads and forward passes,
    so it keeps no state.

    positions: whether the tokens that stay keep the positions they had in the prompt, or are
        numbered anew; "auto" keeps positions of several dimensions (M-RoPE) and renumbers others.
    newlines: whether tokens at the ends of rows of patches (image_newline), of which the method
        knows nothing, are kept or dropped.
    """

    adapters: ClassVar[tuple[str, ...]]
    positions: Literal["auto", "kept", "renumbered"]
    newlines: Literal["keep", "drop"]

    def encoder_layers(self, num_layers: int) -> Sequence[int]:
        """The layers of the vision encoder, of num_layers, whose attention or keys it reads.

        Negative ones count from the last. Layers that are not named cost nothing.
        """

    def reduce_visual(self, call: VisualCall) -> VisualReduction:
        """The tokens of an image that stay, or new ones, see VisualReduction.

        Their number K follows from shapes and options alone, never from values; rows with fewer end
        in -1.
        """


class PromptPruner(Protocol):
    """A method that prunes visual tokens between layers of the language model: an object of its
    options, with adapters ("vision_language",) and without state, as a VisualReducer.

    A method may have both `reduce_visual` and `prune`. Where its options have `watch(num_layers)`,
    which names layers, `observe(states: LayerStates)` is called after each of these in a prompt,
    with the neurons of the layer's MLP where they have `reads_neurons`.

    positions, newlines: see VisualReducer.
    """

    adapters: ClassVar[tuple[str, ...]]
    positions: Literal["auto", "kept", "renumbered"]
    newlines: Literal["keep", "drop"]

    def prune_layers(self, num_layers: int) -> Sequence[int]:
        """The layers, of num_layers, before which tokens are pruned.

        Raises:
            ValueError: options that do not fit the number of layers.
        """

    def prune(self, call: PromptCall) -> Tensor | PromptTokens | None:
        """i32 [B, K]: which of the V visual slots stay, in any order, -1 for none; None: all.

        Or PromptTokens, where some of them get new tokens.
        """

    def watch(self, num_layers: int) -> Sequence[int]:
        """The layers, of num_layers, that `observe` is called for."""

    def observe(self, states: LayerStates) -> None:
        """Called with a layer's states; what later calls need goes into states.carried."""
