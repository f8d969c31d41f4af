"""How the visual tokens of each image came out of a vision encoder, told from its shapes.

Encoders of crops give [crops, tokens, C], of which several patches may have become one token;
models of any resolution pack the crops of an image (pack_image_features), and end rows in tokens of
their own; encoders of grids (Qwen) take the patches of all images in a row, several to a token.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokred.patching import EncoderStates, Layout

from .attention_tap import Attended, missed


@dataclass
class Image:
    """One image as the language model gets it: `count` tokens, of which `patches` i64 [N] are parts
    of the picture and `newlines` i64 the others; see VisualCall for the rest."""

    count: int
    patches: Tensor
    newlines: Tensor
    layout: Layout | None = None
    encoder: EncoderStates | None = None
    pixels: Tensor | None = None
    why_not: str = ""


@dataclass
class Seen:
    """What a vision encoder has left on the way to its visual tokens.

    modules: its attention modules in order, and attended: the calls of those that were recorded.
    projected: what the projector was given. packed: by image, what each of its tokens is made of,
    see `pack_maps`. window_index: the order in which a Qwen encoder took its units.
    """

    modules: Sequence[nn.Module]
    attended: dict[nn.Module, list[Attended]] = field(default_factory=dict)
    projected: Tensor | None = None
    packed: list[Tensor | None] | None = None
    tilings: list[tuple[int, int]] | None = None
    window_index: Tensor | None = None


def pack_maps(
    core: nn.Module, pack: Callable[..., Any], args: Any, kwargs: Any, seen: Seen
) -> None:
    """Runs the model's packing of crops on numbers in place of features, and keeps what comes out.

    seen.packed gets i64 [tokens] for each image: crop * P + patch, -1 for a newline; or None where
    the tokens are mixed of several (interpolated).
    """
    bound = inspect.signature(pack).bind(*args, **kwargs)
    features = bound.arguments["image_features"]
    device = features[0].device
    numbers = []
    for crops in features:
        place = torch.arange(crops.shape[0] * crops.shape[1], device=device, dtype=torch.float64)
        pair = torch.stack([place, (place * 7919) % 104729], -1)  # the second one tells a mixture
        numbers.append(pair.view(crops.shape[0], crops.shape[1], 2))
    bound.arguments["image_features"] = numbers
    if bound.arguments.get("image_newline") is not None:
        newline = torch.full((2,), -1.0, dtype=torch.float64, device=device)
        bound.arguments["image_newline"] = newline
    packed, _ = pack(*bound.args, **bound.kwargs)
    seen.packed = []
    for pair in packed:
        place, check = pair.unbind(-1)
        whole = place.round()
        mixed = (whole != place) | ((place >= 0) & ((whole * 7919) % 104729 != check))
        seen.packed.append(None if bool(mixed.any()) else whole.long())
    shape = sys.modules[type(core).__module__].get_anyres_image_grid_shape
    config = core.config
    seen.tilings = [
        shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in bound.arguments["image_sizes"]
    ]


def images_of(core: nn.Module, outputs: Any, pixels: Tensor, grids: Tensor | None, seen: Seen,
              project: nn.Module | None) -> list[Image]:  # fmt: skip
    """The images whose tokens are outputs.pooler_output, in its order.

    Args:
        outputs: of the model's get_image_features. pixels, grids: its pixel_values and
            image_grid_thw.
    """
    tokens = list(outputs.pooler_output)
    if grids is not None and len(tokens) == len(grids):
        return _of_grids(core, tokens, grids, seen)
    encoded = outputs.last_hidden_state
    if seen.packed is not None:
        return _of_packed(core, tokens, pixels, seen, project)
    total = sum(len(x) for x in tokens)
    if encoded is not None and encoded.dim() == 3 and total % max(encoded.shape[0], 1) == 0:
        return _of_crops(core, tokens, total // encoded.shape[0], encoded.shape[0], pixels, seen,
                         project)  # fmt: skip
    why = f"the adapter does not know how {type(core).__name__} makes its visual tokens"
    return [_plain(len(x), x.device, why) for x in tokens]


def _plain(count: int, device: torch.device, why_not: str) -> Image:
    """An image of which nothing is known but its tokens."""
    none = torch.empty(0, dtype=torch.long, device=device)
    return Image(count, torch.arange(count, device=device), none, why_not=why_not)


def _of_crops(
    core: nn.Module,
    tokens: list[Tensor],
    count: int,
    crops: int,
    pixels: Tensor,
    seen: Seen,
    project: nn.Module | None,
) -> list[Image]:
    """Each crop of the encoder is an image of `count` tokens, a square of squares of patches."""
    device = tokens[0].device
    rows, columns = _patch_grid(core, pixels)
    pool = math.isqrt(rows * columns // max(count, 1))
    if pool < 1 or pool * pool * count != rows * columns or rows % pool or columns % pool:
        why = (
            f"{rows} x {columns} patches became {count} tokens, which are not the squares of a "
            "grid (of LLaVA, vision_feature_select_strategy must drop the class token)"
        )
        return [_plain(count, device, why)] * crops
    place = torch.arange(rows * columns, dtype=torch.int32, device=device)
    cell = place // columns // pool * (columns // pool) + place % columns // pool
    layout = Layout(
        torch.zeros(count, dtype=torch.int32, device=device),
        torch.arange(count, dtype=torch.int32, device=device),
        (rows // pool, columns // pool),
    )
    real = pixels if pixels.dim() == 4 and pixels.shape[0] == crops else None
    images = []
    for number in range(crops):
        image = _plain(count, device, "")
        image.layout = layout
        states = _crop_states(seen, slice(number, number + 1), crops, cell[None])
        image.encoder, image.why_not = states
        if image.encoder is not None and pool == 1:
            image.encoder.project = project
        image.pixels = None if real is None else real[number][None, None]
        images.append(image)
    return images


def _of_packed(
    core: nn.Module, tokens: list[Tensor], pixels: Tensor, seen: Seen, project: nn.Module | None
) -> list[Image]:
    """Images of several crops: a thumbnail, then tiles, without what was padding."""
    assert seen.packed is not None and seen.tilings is not None
    device = tokens[0].device
    rows, columns = _patch_grid(core, pixels)
    patches = rows * columns
    counts = [1 if len(x) <= patches + 1 else 1 + t[0] * t[1]
              for x, t in zip(tokens, seen.tilings, strict=True)]  # fmt: skip
    images, first = [], 0
    for number, (x, place, tiling) in enumerate(
        zip(tokens, seen.packed, seen.tilings, strict=True)
    ):
        crops = slice(first, first + counts[number])
        first = crops.stop
        if place is None:
            why = "the model has resized the visual tokens of the image (anyres_max)"
            images.append(_plain(len(x), device, why))
            continue
        slots = torch.arange(len(x), device=device)
        image = Image(len(x), slots[place >= 0], slots[place < 0])
        kept = place[place >= 0]
        image.layout = Layout(
            (kept // patches).int(),
            (kept % patches).int(),
            (rows, columns),
            tiling if counts[number] > 1 else None,
        )
        token_of_patch = torch.full((counts[number] * patches,), -1, dtype=torch.int32,
                                    device=device)  # fmt: skip
        token_of_patch[kept] = torch.arange(len(kept), dtype=torch.int32, device=device)
        states = _crop_states(
            seen, crops, sum(counts), token_of_patch.view(counts[number], patches)
        )
        image.encoder, image.why_not = states
        if image.encoder is not None:
            image.encoder.project = project
        if pixels.dim() == 5:
            image.pixels = pixels[number, : counts[number]][None]
        elif pixels.shape[0] == sum(counts):
            image.pixels = pixels[crops][None]
        images.append(image)
    return images


def _crop_states(
    seen: Seen, crops: slice, total: int, token_of_patch: Tensor
) -> tuple[EncoderStates | None, str]:
    """The states of the crops of an image, of `total` that the encoder was given together."""
    patches = token_of_patch.shape[1]
    states = EncoderStates(len(seen.modules), 0, token_of_patch)
    prefixes = set()
    for layer, module in enumerate(seen.modules):
        calls = seen.attended.get(module)
        if calls is None:
            continue
        if not calls:
            return None, missed(module)
        if len(calls) != 1 or calls[0].q.shape[0] != total:
            return None, f"{type(module).__name__} was not called once for all crops"
        call = calls[0]
        if call.masked:
            return None, "the vision encoder attends under a mask, as of padded images"
        prefixes.add(call.q.shape[2] - patches)
        states.scale[layer] = call.scale
        states.heads[layer] = lambda call=call: (call.q[crops][None], call.k[crops][None])
    if prefixes:
        states.num_prefix = prefixes.pop()
        if prefixes or states.num_prefix < 0:
            return None, "the vision encoder does not have a token for every patch"
    given = seen.projected
    if given is not None and given.dim() == 3 and given.shape[:2] == (total, patches):
        states.features = lambda: given[crops][None]
    return states, "the projector is not given one token for every patch"


def _of_grids(core: nn.Module, tokens: list[Tensor], grids: Tensor, seen: Seen) -> list[Image]:
    """Images of (1, height, width) patches in a row, where units of several become one token."""
    images, first = [], 0
    for x, (frames, height, width) in zip(tokens, grids.tolist(), strict=True):
        patches = frames * height * width
        unit = patches // max(len(x), 1)
        side = math.isqrt(unit)
        image = _plain(len(x), x.device, "")
        images.append(image)
        part = slice(first, first + patches)
        first = part.stop
        if frames != 1 or side * side != unit or unit * len(x) != patches:
            image.why_not = f"{frames} x {height} x {width} patches became {len(x)} tokens"
            continue
        every = torch.arange(len(x), dtype=torch.int32, device=x.device)
        image.layout = Layout(torch.zeros_like(every), every, (height // side, width // side))
        if seen.window_index is not None:
            units = slice(part.start // unit, part.stop // unit)
            every = (seen.window_index[units].to(x.device) - units.start).int()
        image.encoder, image.why_not = _row_states(seen, part, every.repeat_interleave(unit)[None])
    return images


def _row_states(
    seen: Seen, part: slice, token_of_patch: Tensor
) -> tuple[EncoderStates | None, str]:
    """The states of one image in an encoder that takes the patches of all in a row."""
    states = EncoderStates(len(seen.modules), 0, token_of_patch)
    for layer, module in enumerate(seen.modules):
        calls = seen.attended.get(module)
        if calls is None:
            continue
        if not calls:
            return None, missed(module)
        if any(call.masked for call in calls):
            return None, "the vision encoder attends under a mask"
        both = [(call.q, call.k) for call in calls]

        def heads(both: list[tuple[Tensor, Tensor]] = both) -> tuple[Tensor, Tensor]:
            q, k = (torch.cat([x[i] for x in both], 2) for i in (0, 1))
            return q[:, None, :, part], k[:, None, :, part]

        states.heads[layer] = heads
        states.scale[layer] = calls[0].scale
    given = seen.projected
    if given is not None and given.dim() == 2:
        states.features = lambda: given[part][None, None]
    return states, "the projector takes several patches at once"


def _patch_grid(core: nn.Module, pixels: Tensor) -> tuple[int, int]:
    """(rows, columns) of the patches of one crop."""
    size = core.config.vision_config.patch_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return pixels.shape[-2] // height, pixels.shape[-1] // width
