"""ShowUI: of every connected component of near-equal patches, a layer runs on a share.

ShowUI: One Vision-Language-Action Model for GUI Visual Agent (arXiv 2411.17465).

The evenly spaced picks are exact, where the authors' code rounds them in float32.
"""

from __future__ import annotations

from torch import Tensor

import tokred

from ._method import Family, Method, Needs
from ._picks import positions_of, ranks_in_groups, spaced_picks


def ui_patches(pixels: Tensor, patch: int = 28, frames: int = 2) -> Tensor:
    """[B, H', W', 3 * patch * patch * frames]: the patches between which distances are measured.

    Args:
        pixels: [B, 3, H, W], normalised as for the model. patch: must divide H and W.
        frames: a still image counts as so many equal frames, which stretches distances.

    Raises:
        ValueError: sizes that the patch does not divide.
    """
    if pixels.dim() != 4 or pixels.shape[2] % patch or pixels.shape[3] % patch:
        raise ValueError(
            f"pixels must be [B, 3, H, W] with H and W multiples of {patch}, got "
            f"{list(pixels.shape)}"
        )
    cut = pixels.unfold(2, patch, patch).unfold(3, patch, patch)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).repeat(1, 1, 1, frames)


def ui_graph(patches: Tensor, threshold: float = 1.0) -> Tensor:
    """The component of every patch: neighbours are joined where their distance is below threshold.

    Args:
        patches: [B, H, W, C], ui_patches.

    Returns:
        i32 [B, H * W], numbered by the position of their first patch.
    """
    return tokred.connected_components(patches.contiguous(), threshold)[0]


def ui_select(labels: Tensor, ratio: float = 0.5) -> Tensor:
    """The tokens on which a layer runs.

    A component of c tokens keeps max(1, c - round(c * ratio)) of them, evenly spaced in order of
    position; round takes the even one of two.

    Args:
        labels: i32 [B, N], components; -1 for tokens of none, such as text, which are all kept.
        ratio: the share that is left out, in [0, 1].

    Returns:
        bool [B, N].

    Raises:
        ValueError: a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    rank, count = ranks_in_groups(labels)
    picks = (count - (count.double() * ratio).round().long()).clamp(min=1)
    return spaced_picks(rank, count, picks) | (labels < 0)


def ui_indices(labels: Tensor, ratio: float = 0.5, capacity: int | None = None) -> Tensor:
    """ui_select as i32 [B, capacity], N where None: ascending, -1 behind the last."""
    return positions_of(ui_select(labels, ratio), capacity)


METHOD = Method(
    title="ShowUI: One Vision-Language-Action Model for GUI Visual Agent",
    arxiv="2411.17465",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="components of equal patches in a screenshot; layers skip half of each",
)
