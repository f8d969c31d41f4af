"""CoreMatching: keep the visual tokens that activate the same neurons as a word of the instruction.

CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
Comprehensive Acceleration of Vision-Language Models (arXiv 2505.19235).

The selection of tokens; that of neurons is not here. The published code multiplies the activations
of all tokens with each other to read one row, and sets the keys and values of dropped tokens to
zero, which leaves them a part of the softmax: here they are dropped. It chooses in each of several
layers anew; a patch chooses once, before the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ._arguments import check_features
from ._lists import check_count, check_minimum
from ._method import Family, Method, Needs, Options
from ._picks import best
from ._prompts import DEPTH
from ._thresholds import elbow

if TYPE_CHECKING:
    from tokred.patching import LayerStates, PromptCall

CARRIED = "core_matching.shared"


def activations(gate: Tensor, up: Tensor) -> Tensor:
    """bool [..., F]: the neurons of a gated MLP that are active, silu(gate) * up > 0."""
    return functional.silu(gate.detach()) * up.detach() > 0


def coactivation(word: Tensor, image: Tensor) -> Tensor:
    """f32 [B, N]: how many neurons each visual token shares with the word, a whole number.

    Args:
        word: bool [B, F], the active neurons of one token of the instruction; published is the
            fifth from the last of the prompt.
        image: bool [B, N, F], those of the visual tokens.

    Raises:
        ValueError: another shape or dtype.

    O(B N F) time; every token is compared with one word alone.
    """
    check_features("image", image)
    batch, _, neurons = image.shape
    for name, x, shape in (("word", word, [batch, neurons]), ("image", image, [*image.shape])):
        if x.dtype != torch.bool or [*x.shape] != shape:
            raise ValueError(f"{name} must be {shape} in torch.bool, got {[*x.shape]} in {x.dtype}")
    if neurons == 0:
        return image.sum(-1, dtype=torch.float32)
    if neurons % 8:
        image, word = (functional.pad(x, (0, -neurons % 8)) for x in (image, word))
    # Eight neurons a word of 64 bits, one in each byte, which up to 255 sums do not overflow.
    image, word = (x.contiguous().view(torch.int64) for x in (image, word[:, None]))
    counts = [
        (a & b).sum(-1, keepdim=True).view(torch.uint8).sum(-1)
        for a, b in zip(image.split(128, -1), word.split(128, -1), strict=True)
    ]
    return torch.stack(counts).sum(0).float()


def select_tokens(
    scores: Tensor,
    valid: Tensor | None = None,
    order: str = "position",
    k: int | None = None,
) -> Tensor:
    """The tokens whose score is above the elbow of the descending scores.

    The elbow is the point (rank, score) farthest from the chord between the first and the last one;
    tokens of its score are dropped, and so all are where all are alike.

    Args:
        scores: [B, N], coactivation.
        valid: bool [B, N]; padding, which is False, is neither kept nor a part of the curve.
        order: "position", as published, or "score".
        k: at most so many are kept, those of highest score; no limit where None.

    Returns:
        i32 [B, k], or [B, N], -1 behind the last.

    Raises:
        ValueError: another order.

    O(B N log N) time.
    """
    check_count("k", k, optional=True)
    above = scores > elbow(scores, valid)
    above = above if valid is None else above & valid
    return best(scores, scores.shape[1] if k is None else k, above, order)


@dataclass(frozen=True)
class CoreMatchingOptions(Options):
    """Options of tokred.patch(model, "core_matching", ...).

    keep: at most so many visual tokens of a prompt stay; no limit where None, as published.
    layer: of the language model, before which tokens are dropped, by the neurons of the layer
    before it; 6 of 32 where None, the first of the published ones.
    word: which of the prompt's tokens counts, from the last, which is 1.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    keep: int | None = None
    layer: int | None = None
    word: int = 5
    positions: Literal["auto", "kept", "renumbered"] = "auto"
    newlines: Literal["keep", "drop"] = "keep"

    adapters: ClassVar[tuple[str, ...]] = ("vision_language",)
    reads_neurons = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("keep", self.keep, minimum=1, optional=True)
        check_count("layer", self.layer, minimum=1, optional=True)
        check_minimum(1, word=self.word)

    def prune_layers(self, num_layers: int) -> list[int]:
        """The one before which tokens are dropped."""
        return [max(1, num_layers * 6 // DEPTH) if self.layer is None else self.layer]

    def watch(self, num_layers: int) -> list[int]:
        """The layer before it."""
        return [self.prune_layers(num_layers)[0] - 1]

    def observe(self, states: LayerStates) -> None:
        """Counts the neurons that every token shares with the word."""
        assert states.neurons is not None
        active = states.neurons > 0
        valid = states.valid
        behind = valid.flip(1).cumsum(1).flip(1)
        number = valid.sum(1, keepdim=True).clamp(max=self.word)
        place = ((behind == number) & valid).int().argmax(1)
        word = active[torch.arange(len(active), device=active.device), place]
        states.carried[CARRIED] = coactivation(word, active)

    def prune(self, call: PromptCall) -> Tensor:
        """select_tokens of the visual tokens that are left."""
        scores = call.of_visual(call.carried[CARRIED])
        return select_tokens(scores, call.is_slot, k=self.keep)


METHOD = Method(
    title=(
        "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for "
        "Comprehensive Acceleration of Vision-Language Models"
    ),
    arxiv="2505.19235",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep the visual tokens that activate the same neurons as a word of the instruction",
    options=CoreMatchingOptions,
)
