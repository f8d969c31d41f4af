"""GlobalCom2: the thumbnail's class logits give every crop its share and help to pick in it.

Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
Vision-Language Models (arXiv 2501.05179).

The published code places the kept tokens of letter-boxed crops in the wrong places of the grid,
which is not followed. The logits are those before the softmax: after it the crops' shares would be
all but equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ._arguments import head_mean
from ._crops import crops_of, number_crops
from ._grids import cell_sums, resize
from ._method import Family, Method, Needs
from ._picks import best, close_gaps
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def crop_ratios(
    thumbnail: Tensor,
    grid: tuple[int, int],
    tiling: tuple[int, int],
    ratio: float,
    temperature: float = 10.0,
) -> Tensor:
    """f64 [B, crops]: the share of its tokens that each crop keeps, at most 1.

    ratio * (1 + w - mean w), w the softmax over crops of the sums of the thumbnail's logits in each
    crop's part, divided by the temperature.

    Args:
        thumbnail: f32 [B, P], class logits of the thumbnail. grid: its (H, W).
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    sums = cell_sums(thumbnail, grid, tiling).double()
    weight = (sums - sums.amax(1, keepdim=True)).div_(temperature).exp_()
    weight = weight.div_(weight.sum(1, keepdim=True).add_(1e-8))
    return (weight - weight.mean(1, keepdim=True)).add_(1).mul_(ratio).clamp_(max=1)


def spread(
    thumbnail: Tensor,
    grid: tuple[int, int],
    tiling: tuple[int, int],
    valid: Tensor | None = None,
) -> Tensor:
    """f32 [B, crops, P]: the thumbnail's map over the part of the crops that is not padding.

    It is resized bilinearly, corners not aligned, to the rows and columns in which the stitched
    crops have valid tokens, and cut into crops.

    Args:
        thumbnail: f32 [B, P]. valid: bool [B, crops, P], all where None.
    """
    batch, size = len(thumbnail), (grid[0] * tiling[0], grid[1] * tiling[1])
    if valid is None:
        return _cut(resize(thumbnail, grid, size), grid, tiling)
    stitched = valid.view(batch, *tiling, *grid).transpose(2, 3).reshape(batch, *size)
    weights = []
    for axis in (2, 1):
        there = stitched.any(axis)
        count = there.sum(1, keepdim=True)
        first = there.int().argmax(1, keepdim=True)
        source = grid[2 - axis]
        place = torch.arange(size[2 - axis], device=valid.device)
        at = (place - first + 0.5) * (source / count.clamp(min=1)) - 0.5
        at = at.clamp(0, source - 1)
        grid_place = torch.arange(source, device=valid.device)
        weights.append((1 - (at[..., None] - grid_place).abs()).clamp(min=0).float())
    image = weights[0] @ thumbnail.float().view(batch, *grid) @ weights[1].mT
    return _cut(image, grid, tiling)


def _cut(image: Tensor, grid: tuple[int, int], tiling: tuple[int, int]) -> Tensor:
    """[B, crops, P]: a map of the stitched crops, by crops."""
    image = image.reshape(-1, tiling[0], grid[0], tiling[1], grid[1])
    return image.transpose(2, 3).reshape(len(image), tiling[0] * tiling[1], grid[0] * grid[1])


def select_tokens(
    logits: Tensor,
    ratio: float,
    grid: tuple[int, int],
    tiling: tuple[int, int],
    valid: Tensor | None = None,
    temperature: float = 10.0,
) -> Tensor:
    """The thumbnail's int(P ratio) best tokens, best first, then those of the crops by position.

    A crop keeps the int(size * crop_ratios) tokens of the highest sum of its own logits and of the
    thumbnail's in its place, both divided by their norms.

    Args:
        logits: f32 [B, 1 + crops, P], of the class token over the patches of the thumbnail and of
            the crops, in the encoder's last layer, averaged over heads.
        ratio: the share kept of all, in [0, 1].
        grid: (H, W) of a crop. tiling: (rows, columns) of the crops.
        valid: bool [B, 1 + crops, P]; padding, which is False, is not kept.

    Returns:
        i32 [B, int(P ratio) + int(crops P ratio)], numbers in [B, (1 + crops) * P], crop after
        crop, -1 behind the last.

    Raises:
        ValueError: another shape, grid or tiling, or a ratio outside [0, 1].

    O(B N) time, but O(B N (rows + columns)) for the resized map.
    """
    number, places = 1 + tiling[0] * tiling[1], grid[0] * grid[1]
    if logits.dim() != 3 or logits.shape[1:] != (number, places):
        raise ValueError(f"logits must be [B, {number}, {places}], got {list(logits.shape)}")
    logits = logits.detach().float()
    thumbnail, own = logits[:, 0], logits[:, 1:]
    ratios = crop_ratios(thumbnail, grid, tiling, ratio, temperature)
    there, inside = (None, None) if valid is None else (valid[:, 0], valid[:, 1:])
    count = int(places * ratio + 1e-9)
    first = best(thumbnail, count, there, "score")
    wide = spread(thumbnail, grid, tiling, inside)
    if inside is None:
        sizes: int | Tensor = places
    else:
        own, wide = own.masked_fill(~inside, 0.0), wide.masked_fill(~inside, 0.0)
        sizes = inside.sum(2)
    scores = functional.normalize(own, dim=-1) + functional.normalize(wide, dim=-1)
    kept = (sizes * ratios).add_(1e-9).to(torch.int32)
    # The crops' ratios are ratio on average, and none has more than P tokens.
    most = int((number - 1) * places * ratio + 1e-6)
    picks = best(scores, kept, inside, places=min(places, most))
    return close_gaps(torch.cat([first, number_crops(picks, places, 1)], 1), count + most)


@dataclass(frozen=True)
class Globalcom2Options(VisualOptions):
    """Options of tokred.patch(model, "globalcom2", ...).

    keep: visual tokens kept per image. ratio: the share kept instead; published is 0.25.
    temperature: of the shares of the crops. layer: of the encoder, whose logits are read.
    positions, newlines: as VisualOptions has them.
    """

    temperature: float = 10.0
    layer: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens; of an image of one crop the tokens of highest logits, best first.

        Raises:
            ValueError: the encoder has no class token.
        """
        logits = head_mean(call.class_attention(self.layer, softmax=False))
        batch, tokens = logits.shape
        k, layout = self.count(tokens), call.layout
        if k == tokens:
            return None
        if layout is None or layout.tiling is None:
            return best(logits, k, order="score")
        crops = crops_of(call)
        shape = (batch, crops.number, -1)
        picks = select_tokens(
            crops.values(logits).view(shape),
            k / tokens,
            layout.crop_grid,
            layout.tiling,
            crops.valid(batch).view(shape),
            self.temperature,
        )
        places = layout.crop_grid[0] * layout.crop_grid[1]
        thumbnail = crops.of_flat(torch.where(picks < places, picks, -1), "score")
        others = crops.of_flat(torch.where(picks >= places, picks, -1))
        return close_gaps(torch.cat([thumbnail, others], 1), picks.shape[1])


METHOD = Method(
    title=(
        "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution "
        "Large Vision-Language Models"
    ),
    arxiv="2501.05179",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="the thumbnail's class logits give every crop its share and help to pick in it",
    options=Globalcom2Options,
)
