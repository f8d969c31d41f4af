"""Vision-language models without tokens, row by row and without a cache: the oracle of the adapter.

A row's embeddings and positions are those that the unpatched model hands to its language model; its
layers are then run one by one on the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cases.tiny_vlms import IMAGE, IMAGES


@dataclass
class Row:
    """One row without its padding.

    x: [n, C]. positions: [n] or [planes, n]. image: i64 [n], the number of the image, -1 for text.
    block: i64 [n], tokens of the same block from 0 see each other. deep: [levels, n, C], what is
    added after the first layers.
    """

    x: Tensor
    positions: Tensor
    image: Tensor
    block: Tensor
    deep: Tensor | None

    def take(self, places: Tensor, renumber: bool) -> Row:
        positions = self.positions[..., places]
        if renumber:
            positions = torch.arange(len(places)).expand_as(positions).clone()
        deep = None if self.deep is None else self.deep[:, places]
        return replace(self, x=self.x[places], positions=positions, image=self.image[places],
                       block=self.block[places], deep=deep)  # fmt: skip

    def grown(self, token: Tensor) -> Row:
        """The row with one more token of text, embedded."""
        last = self.positions[..., -1:] + 1
        deep = self.deep
        return replace(
            self,
            x=torch.cat([self.x, token[None]]),
            positions=torch.cat([self.positions, last], -1),
            image=torch.cat([self.image, torch.tensor([-1])]),
            block=torch.cat([self.block, torch.tensor([-1])]),
            deep=None if deep is None else torch.cat([deep, torch.zeros_like(deep[:, :1])], 1),
        )


def language_of(core: nn.Module) -> nn.Module:
    return core.text_model if hasattr(core, "text_model") else core.language_model


@torch.no_grad()
def rows_of(model: nn.Module, name: str, inputs: dict[str, Any]) -> list[Row]:
    """The rows of a prompt, of the unpatched model."""
    core, seen = model.model, {}
    language = language_of(core)
    handle = language.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    positions = seen.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    positions = positions.expand(*positions.shape[:-2], *ids.shape)
    deep = None
    if seen.get("deepstack_visual_embeds") is not None:
        deep = torch.zeros(
            len(seen["deepstack_visual_embeds"]), *ids.shape, seen["inputs_embeds"].shape[-1]
        )
        for level, x in enumerate(seen["deepstack_visual_embeds"]):
            deep[level][seen["visual_pos_masks"]] = x
    rows = []
    for b in range(len(ids)):
        there = mask[b]
        is_image = (ids[b][there] == IMAGE).long()
        starts = (is_image.diff(prepend=torch.zeros(1, dtype=torch.long)) == 1).cumsum(0) - 1
        image = torch.where(is_image == 1, starts, -1)
        block = torch.full_like(image, -1)
        if "token_type_ids" in inputs and name == "gemma3":
            block = image
        if "token_type_ids" in inputs and name == "paligemma":
            block = torch.where(inputs["token_type_ids"][b][there] == 0, 0, -1)
        rows.append(Row(seen["inputs_embeds"][b, there], positions[..., b, there], image, block,
                        None if deep is None else deep[:, b, there]))  # fmt: skip
    return rows


@torch.no_grad()
def logits_of(
    model: nn.Module, row: Row, drops: dict[int, Tensor] | None = None, renumber: bool = False
) -> Tensor:
    """[tokens left, vocabulary].

    Args:
        drops: by layer, the places of the prompt that this and all later layers do not have; of
            the numbers of the tokens in `row`. renumber: positions after each of them.
    """
    language = language_of(model.model)
    config, number = language.config, torch.arange(len(row.x))
    for index, layer in enumerate(language.layers):
        if drops and index in drops:
            left = ~torch.isin(number, drops[index])
            row, number = row.take(left.nonzero()[:, 0], renumber), number[left]
        length = len(row.x)
        place = torch.arange(length)
        visible = place[:, None] >= place
        same = (row.block[:, None] == row.block) & (row.block >= 0)
        visible = visible | same
        kinds = getattr(config, "layer_types", None)
        kind = kinds[index] if kinds else "full_attention"
        if kind == "sliding_attention":
            visible = visible & (place[:, None] - place < config.sliding_window)
        positions = row.positions
        # The first of four planes is not for rotation.
        positions = positions[-3:, None] if positions.dim() == 2 else positions[None]
        args = (kind,) if "sliding_attention" in (kinds or []) else ()
        tables = language.rotary_emb(row.x[None], positions, *args)
        x = layer(row.x[None], attention_mask=visible[None, None], position_embeddings=tables,
                  position_ids=positions)  # fmt: skip
        row = replace(row, x=x[0])
        if row.deep is not None and index < len(row.deep):
            row = replace(row, x=row.x + row.deep[index])
    return model.lm_head(language.norm(row.x))


@torch.no_grad()
def greedy(
    model: nn.Module, row: Row, count: int, drops: dict[int, Tensor] | None = None,
    renumber: bool = False,
) -> list[int]:  # fmt: skip
    """Tokens by the largest logit, recomputed from the start for each."""
    found = []
    for _ in range(count):
        logits = logits_of(model, row, drops, renumber)[-1]
        logits[list(IMAGES)] = -torch.inf
        found.append(int(logits.argmax()))
        row = row.grown(model.get_input_embeddings()(torch.tensor(found[-1])))
    return found


def kept_places(row: Row, choose: Callable[[int], Tensor]) -> Tensor:
    """The places of a row of which each image of n tokens keeps choose(n), in that order."""
    pieces, n = [], len(row.x)
    place = torch.arange(n)
    for image in range(-1, int(row.image.max()) + 1):
        there = place[row.image == image]
        if image < 0:
            keys = values = there
        else:
            values = there[choose(len(there))]
            keys = values.sort().values
        pieces.append((keys, values))
    keys, values = (torch.cat(part) for part in zip(*pieces, strict=True))
    return values[keys.argsort()]
