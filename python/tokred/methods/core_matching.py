"""CoreMatching: keep the visual tokens that activate the same neurons as a word of the instruction.

CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
Comprehensive Acceleration of Vision-Language Models (arXiv 2505.19235).

The selection of tokens; that of neurons is not here. The published code multiplies the activations
of all tokens with each other to read one row, and sets the keys and values of dropped tokens to
zero, which leaves them a part of the softmax: here they are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._lists import check_count
from ._method import Family, Method, Needs
from ._selection import best, check_features, elbow


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
    """The tokens whose score is above the elbow of the falling scores.

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
)
