"""The prompt of a vision-language model, rewritten without the visual tokens a method drops."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tokred.patching import VisualCall, VisualTokens
from tokred.patching.protocols import name_of
from tokred.patching.recomputation import PerThread

from .encoder_states import Image
from .prompt_layers import LayerPruning
from .prompt_rows import Kept, Prompt, fold, keep_in_order, remember

# Of what get_image_features returns: the images as encoder_states.py tells them.
STATES = "tokred_images"


@dataclass
class _Latest:
    """The token counts of a thread's latest prompt."""

    counts: tuple[tuple[int, int], ...] | None = None


@dataclass
class VisualState:
    """A method in one core model. counts: (tokens, tokens kept) of each image in the prompt that
    the calling thread has run last, in the order of the rows, before any layer of the language
    model; placeholders of newlines included."""

    core: nn.Module
    method: Any
    modules: list[nn.Module]
    recorded: list[nn.Module]
    layers: LayerPruning | None
    _latest: PerThread = field(default_factory=lambda: PerThread(_Latest))

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        counts = self._latest.own.counts
        if counts is None:
            raise RuntimeError("no prompt with images has run inside the patch in this thread yet")
        return counts

    def keep_counts(self, counts: list[tuple[int, int]]) -> None:
        """Keeps the token counts of the current prompt."""
        self._latest.own.counts = tuple(counts)


@dataclass
class Prefill:
    """A forward pass of a prompt with images."""

    state: VisualState
    original: Callable
    given: dict[str, Any]

    def run(self) -> Any:
        ids = self.given["input_ids"]
        method = self.state.method
        features = self.given["mm_encoder_outputs"]["image"]
        flat = _flat(features.pooler_output)
        visual = ids == self.state.core.config.image_token_id
        places = visual.nonzero()
        if len(places) != len(flat):
            return self.original(**self.given)  # which says how many there are of each
        images = self._images(features, visual.sum(1).tolist())
        newline = torch.zeros_like(visual)
        keys = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        deepstack = getattr(features, "deepstack_features", None)
        deep = None if deepstack is None else [torch.cat(list(level)) for level in deepstack]
        counts, first, changed = [], 0, False
        reductions: dict[int, Any] = {}
        text = partial(_text_of, self.state.core, ids, self._valid(), visual)
        for image in images:
            part = slice(first, first + image.count)
            first = part.stop
            rows, columns = places[part].unbind(1)
            newline[rows[image.newlines], columns[image.newlines]] = True
            if not hasattr(method, "reduce_visual"):
                counts.append((image.count, image.count))
                continue
            if id(image) not in reductions:
                tokens = flat[part][image.patches]
                embeddings = text(int(rows[0]) if len(rows) else 0)
                vocabulary = self.state.core.get_input_embeddings().weight.detach()
                reductions[id(image)] = _reduce(method, image, tokens, *embeddings, vocabulary)
            slots, merged = reductions[id(image)]
            if merged is not None:
                flat, deep = _write(flat, deep, part.start + image.patches, merged)
                changed = True
            counts.append((image.count, len(slots)))
            if len(slots) == image.count and bool((slots[1:] > slots[:-1]).all()):
                continue
            # Sorted, the columns of those that stay are where they go.
            keys[rows, columns] = ids.shape[1]
            keys[rows[slots], columns[slots]] = columns[slots].sort().values
            changed = True
        self.state.keep_counts(counts)
        if not changed:
            return self._whole(visual, newline)
        return self._shortened(keys, visual, newline, places, flat, deep)

    def _valid(self) -> Tensor:
        """bool [B, L]: tokens that are no padding."""
        ids, mask = self.given["input_ids"], self.given.get("attention_mask")
        if mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {list(ids.shape)}, as input_ids, where visual tokens are "
                "dropped"
            )
        return mask.bool()

    def _positions(self) -> Tensor:
        """The positions of the whole prompt, [B, L] or [planes, B, L]."""
        positions = self.given.get("position_ids")
        positions = _own_positions(self.state.core, self.given) if positions is None else positions
        return positions.expand(*positions.shape[:-2], *self.given["input_ids"].shape)

    def _images(self, features: Any, visual: list[int]) -> list[Image]:
        """The images in the order of the placeholders; beams have those of a row again.

        Args:
            visual: the number of placeholders in each row.
        """
        images = getattr(features, STATES, None)
        if images is None:
            why = "the images were encoded outside of the patch"
            rows = [x for x in features.pooler_output if len(x)]
            none = torch.empty(0, dtype=torch.long, device=self.given["input_ids"].device)
            every = [torch.arange(len(x), device=none.device) for x in rows]
            return [Image(len(x), x, none, why_not=why) for x in every]
        once = sum(image.count for image in images)
        beams = sum(visual) // max(once, 1)
        if beams * once != sum(visual):
            raise ValueError(
                f"the prompt has {sum(visual)} tokens of images, which were encoded to {once}: it "
                "must be read at once, not in chunks (prefill_chunk_size)"
            )
        if beams == 1:
            return images
        found, left = [], iter(images)
        for row in range(0, len(visual), beams):
            group: list[Image] = []
            while sum(image.count for image in group) < visual[row]:
                group.append(next(left))
            found += group * beams
        return found

    def _whole(self, visual: Tensor, newline: Tensor) -> Any:
        """The whole prompt, which layers may still prune."""
        pruning = self.state.layers
        if pruning is None:
            return self.original(**self.given)
        ids, valid = self.given["input_ids"], self._valid()
        source = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        kept = Kept(source, valid, bool(valid.all()))
        prompt = Prompt(ids.shape[1], kept, None)
        return self._through_layers(prompt, visual & valid, newline)

    def _shortened(
        self,
        keys: Tensor,
        visual: Tensor,
        newline: Tensor,
        places: Tensor,
        flat: Tensor,
        deep: list[Tensor] | None,
    ) -> Any:
        """The prompt without the tokens whose key is its length."""
        ids, valid = self.given["input_ids"], self._valid()
        length = ids.shape[1]
        kept = keep_in_order(keys.masked_fill(~valid, length), bool(valid[:, -1].all()))
        # The number of every placeholder, in the new order of the prompt.
        number = torch.zeros_like(ids)
        number[places[:, 0], places[:, 1]] = torch.arange(len(places), device=ids.device)
        left = kept.gather(visual, False)
        order = kept.gather(number)[left]
        core = self.state.core
        blank = int(core.config.image_token_id == 0)
        positions = _left(self._positions(), kept, self.state.method.positions)
        mask = self.given.get("attention_mask")
        self.given.update(
            input_ids=kept.gather(ids, blank),
            attention_mask=kept.valid.to(torch.long if mask is None else mask.dtype),
            position_ids=positions,
        )
        for name in ("token_type_ids", "mm_token_type_ids"):
            types = self.given.get(name)
            if types is not None and types.shape != ids.shape:
                raise ValueError(
                    f"{name} must be {list(ids.shape)}, as input_ids, got {list(types.shape)}"
                )
            if types is not None:
                self.given[name] = kept.gather(types)
        encoded = self.given["mm_encoder_outputs"]
        encoded["image"] = _with_tokens(encoded["image"], flat[order], deep, order)
        prompt = Prompt(length, kept, kept.last(positions))
        return self._through_layers(prompt, left, kept.gather(newline, False))

    def _through_layers(self, prompt: Prompt, visual: Tensor, newline: Tensor) -> Any:
        pruning = self.state.layers
        if pruning is None:
            output = self.original(**self.given)
        else:
            with pruning.prompt(prompt, visual, newline):
                output = self.original(**self.given)
            if prompt.stages and prompt.stages[0].layer == 0:
                last = prompt.last
                fold(prompt, prompt.kept.last(self._positions()) if last is None else last)
        cache = self.given.get("cache")
        cache = _cache_in(output) if cache is None else cache
        if cache is not None:
            prompt.cached = prompt.places
            remember(cache, prompt)
        return output


def _cache_in(output: Any) -> Cache | None:
    values = output if isinstance(output, tuple) else output.to_tuple()
    return next((value for value in values if isinstance(value, Cache)), None)


def _flat(features: Any) -> Tensor:
    """All visual tokens, [tokens, C], in the order of the placeholders."""
    return features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))


def _text_of(
    core: nn.Module, ids: Tensor, valid: Tensor, visual: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """(embeddings [1, T, C], mask bool [1, T]) of the text in a row."""
    text = ids[row][valid[row] & ~visual[row]][None]
    with torch.no_grad():
        return core.get_input_embeddings()(text), torch.ones_like(text, dtype=torch.bool)


def _reduce(
    method: Any,
    image: Image,
    tokens: Tensor,
    text: Tensor,
    text_mask: Tensor,
    vocabulary: Tensor,
) -> tuple[Tensor, VisualTokens | None]:
    """The slots of an image that stay, in their new order, newlines included; and new tokens."""
    call = VisualCall(
        tokens[None],
        image.layout,
        image.encoder,
        text,
        text_mask,
        image.pixels,
        image.why_not,
        vocabulary,
    )
    result = method.reduce_visual(call) if tokens.shape[0] else None
    if result is None:
        chosen = torch.arange(len(tokens), device=tokens.device)
    else:
        indices = result.indices if isinstance(result, VisualTokens) else result
        chosen = indices[0][indices[0] >= 0].long()
    if chosen.unique().numel() != chosen.numel():
        raise ValueError(f"{name_of(method)} keeps a token twice: {chosen.tolist()}")
    slots = image.patches[chosen]
    if method.newlines == "keep" and len(image.newlines):
        # Each follows the tokens that came before it in the image.
        earliest = slots.flip(0).cummin(0).values.flip(0) if len(slots) else slots
        both = torch.cat([slots, image.newlines])
        slots = both[torch.cat([earliest, image.newlines]).argsort(stable=True)]
    return slots, result if isinstance(result, VisualTokens) else None


def _write(
    flat: Tensor, deep: list[Tensor] | None, places: Tensor, merged: VisualTokens
) -> tuple[Tensor, list[Tensor] | None]:
    """flat and deep with new tokens at the places whose indices they take."""
    there = merged.indices[0] >= 0
    target = places[merged.indices[0][there].long()]
    flat = flat.index_copy(0, target, merged.tokens[0][there].to(flat.dtype))
    if deep is not None and merged.token_map is not None:
        slots = merged.token_map[0].long()
        inside = torch.where(slots >= 0, slots, len(there))
        for level, x in enumerate(deep):
            rows = x[places].float()
            sums = rows.new_zeros(len(there) + 1, rows.shape[1]).index_add(0, inside, rows)
            size = rows.new_zeros(len(there) + 1).index_add(0, inside, torch.ones_like(rows[:, 0]))
            means = (sums / size.clamp(min=1)[:, None])[:-1][there]
            deep[level] = x.index_copy(0, target, means.to(x.dtype))
    return flat, deep


def _with_tokens(outputs: Any, tokens: Tensor, deep: list[Tensor] | None, order: Tensor) -> Any:
    """A copy of the encoder's outputs with these visual tokens."""
    shortened = copy.copy(outputs)
    one_tensor = isinstance(outputs.pooler_output, Tensor)
    shortened.pooler_output = tokens[None] if one_tensor else [tokens]
    if deep is not None:
        shortened.deepstack_features = [[level[order]] for level in deep]
    return shortened


def _left(positions: Tensor, kept: Kept, wanted: str) -> Tensor:
    """The positions of the tokens that stay: [B, M], or [planes, B, M] of several dimensions."""
    if wanted == "renumbered" or (wanted == "auto" and positions.dim() == 2):
        ranks = kept.ranks()
        return ranks if positions.dim() == 2 else ranks.expand(len(positions), -1, -1)
    there = kept.gather(positions)
    if there.dim() == 3 and there.shape[0] == 4:
        # The first plane tells the places of text, for masks alone.
        there = torch.cat([kept.ranks()[None], there[1:]])
    return there


def _own_positions(core: nn.Module, given: dict[str, Any]) -> Tensor:
    """The positions that the model gives the whole prompt itself."""
    ids = given["input_ids"]
    compute = getattr(core, "get_rope_index", None)
    if compute is not None and given.get("mm_token_type_ids") is not None:
        names = inspect.signature(compute).parameters
        inputs = {name: given[name] for name in names if given.get(name) is not None}
        return compute(**inputs)[0]
    return torch.arange(ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
