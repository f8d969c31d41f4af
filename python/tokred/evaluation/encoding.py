"""Encoders: how close the features on fewer tokens are to those of the unpatched model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tokred.methods import get
from tokred.patching import patch

from .budgets import fitted
from .candidates import Candidate, Methods, for_encoder
from .inputs import Batch
from .results import Measure
from .tally import Tally

CLASS, MEAN, PATCHES, TOKENS = "CLS cosine", "mean cosine", "patch cosine", "token cosine"
MEASURES = tuple(Measure(name, "higher") for name in (CLASS, MEAN, PATCHES, TOKENS))


def features(model: nn.Module, batch: Batch) -> Tensor:
    """[B, N, C]: the tokens after the last layer of a timm or transformers encoder.

    Raises:
        ValueError: the model gives none.
    """
    if hasattr(model, "forward_features"):
        tokens = model.forward_features(*batch.values())
    else:
        output = getattr(model, "base_model", model)(**batch)
        tokens = getattr(output, "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        raise ValueError(
            f"{type(model).__name__} gives no tokens [B, N, C] as last_hidden_state or from "
            "forward_features: pass its encoder"
        )
    return tokens


@dataclass(frozen=True)
class Reading:
    """A model's output for a batch.

    tokens: [B, N, C], one for each input token. there: bool [B, N], False for padding.
    left: how many tokens of a row there were after the last layer, prefix included.
    """

    tokens: Tensor
    there: Tensor
    left: int


class EncoderTask:
    """How close the features of all tokens stay to the unpatched model's."""

    measures = MEASURES

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        with patch(model, "tome", r=0) as handle:
            self.tokens, self.reads_text = 0, False  # until candidates() has seen some
            self.num_prefix, self.layers = handle.num_prefix, handle.states[0].num_layers
        self.title = f"{type(model).__name__}: features on fewer tokens"
        self.notes = (
            "Cosines are between a token's feature, or that of the token it merged into, and the "
            "unpatched model's; dropped tokens count as 0.",
        )

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """The batch, where the model is."""
        yield {
            name: x.to(self.device, self.dtype if x.is_floating_point() else None)
            for name, x in batch.items()
        }

    def candidates(
        self, part: Batch, methods: Methods, budgets: Sequence[float], bits: Sequence[int]
    ) -> list[Candidate]:
        """The candidates, at budgets that are shares of this batch's tokens.

        Raises:
            ValueError: bits, which are for caches.
        """
        if bits:
            raise ValueError("bits are for the cache of a decoder, and this is an encoder")
        self.reads_text = "input_ids" in part
        self.tokens = features(self.model, part).shape[1] - self.num_prefix
        return for_encoder(methods, budgets, self.layers, self.tokens)

    def fitted(self, part: Batch, candidate: Candidate) -> Candidate:
        """The candidate with the ratio that leaves its share of tokens."""
        if candidate.budget is None:
            return candidate
        wanted = candidate.budget * self.tokens
        own = {name: x for name, x in candidate.options.items() if name != "ratio"}

        def left(options: dict[str, Any]) -> int:
            trial = replace(candidate, options={**own, **options})
            return self.read(part, trial).left - self.num_prefix

        ratio = {name: x for name, x in candidate.options.items() if name == "ratio"}
        options = {**own, **fitted(get(candidate.method), self.layers, ratio, wanted, left)}
        if "ratio" in options:
            options["ratio"] = round(options["ratio"], 4)
        return replace(candidate, options=options)

    def counted(self, candidate: Candidate, reading: Reading) -> Candidate:
        """The candidate with the tokens that were left."""
        return replace(candidate, kept=reading.left - self.num_prefix)

    def read(self, part: Batch, candidate: Candidate | None = None) -> Reading:
        """The model, with the candidate's patch, reads a batch."""
        if candidate is None:
            tokens = features(self.model, part)
            return Reading(tokens, _there(part, tokens), tokens.shape[1])
        with candidate.patch(self.model, trace_source=True) as handle:
            tokens = features(self.model, part)
            left = round(float((handle.size > 0).sum()) / len(tokens))
            if tokens.shape[1] < handle.counts[0]:
                tokens = handle.unmerge(tokens)
            return Reading(tokens, _there(part, tokens), left)

    def add(self, tally: Tally, reading: Reading, dense: Reading | None) -> None:
        """Adds a reading; dense is the unpatched model's, None where the reading is that one."""
        ours = reading.tokens.float()
        theirs = ours if dense is None else dense.tokens.float()
        there = reading.there
        if self.num_prefix:
            tally.add(CLASS, cosine_similarity(ours[:, 0], theirs[:, 0], dim=-1))
        else:
            mean, other = ((x * there[..., None]).sum(1) for x in (ours, theirs))
            tally.add(MEAN, cosine_similarity(mean, other, dim=-1))
        cosines = cosine_similarity(ours, theirs, dim=-1)[:, self.num_prefix :]
        name = TOKENS if self.reads_text else PATCHES
        tally.add(name, cosines[there[:, self.num_prefix :]])

    def figures(self, tally: Tally, dense: Tally) -> dict[str, float]:
        """The measures of all that was added."""
        return tally.means()


def _there(part: Batch, tokens: Tensor) -> Tensor:
    """bool [B, N]: the tokens that are no padding."""
    mask = part.get("attention_mask")
    if mask is None or mask.shape != tokens.shape[:2]:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return mask.bool()
