"""Encoders: how like the features on fewer tokens are to those of the unpatched model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tokred.methods import get
from tokred.patching import patch

from .budgets import fitted
from .candidates import Candidate, Methods, for_encoder
from .inputs import Batch
from .results import Measure
from .tally import Tally

CLASS, MEAN, PATCHES = "CLS cosine", "mean cosine", "patch cosine"
MEASURES = (Measure(CLASS, "higher"), Measure(MEAN, "higher"), Measure(PATCHES, "higher"))


def features(model: nn.Module, batch: Batch) -> Tensor:
    """[B, N, C]: the tokens behind the last layer of a timm or transformers encoder.

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
    """tokens [B, N, C], as many as there were; left: how many of them were apart, of a row."""

    tokens: Tensor
    left: int


class EncoderTask:
    """How like the features of all tokens stay."""

    measures = MEASURES

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        with patch(model, "tome", r=0) as handle:
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
        """What is tried, at shares of this batch's tokens.

        Raises:
            ValueError: bits, which are for caches.
        """
        if bits:
            raise ValueError("bits are for the cache of a decoder, and this is an encoder")
        return for_encoder(methods, budgets, self.layers, self._tokens(part))

    def fitted(self, part: Batch, candidate: Candidate) -> Candidate:
        """The candidate with the ratio that leaves its share of tokens, and what that leaves."""
        if candidate.budget is None:
            return replace(candidate, kept=self._left(part, candidate))
        wanted = candidate.budget * self._tokens(part)
        own = {name: x for name, x in candidate.options.items() if name != "ratio"}

        def left(options: dict[str, Any]) -> int:
            return self._left(part, replace(candidate, options={**own, **options}))

        sized = {name: x for name, x in candidate.options.items() if name == "ratio"}
        options = {**own, **fitted(get(candidate.method), self.layers, sized, wanted, left)}
        if "ratio" in options:
            options["ratio"] = round(options["ratio"], 4)
        found = replace(candidate, options=options)
        return replace(found, kept=self._left(part, found))

    def read(self, part: Batch, candidate: Candidate | None = None) -> Reading:
        """The model, with the candidate's patch, reads a batch."""
        if candidate is None:
            tokens = features(self.model, part)
            return Reading(tokens, tokens.shape[1])
        with candidate.patch(self.model, trace_source=True) as handle:
            tokens = features(self.model, part)
            left = round(float((handle.size > 0).sum()) / len(tokens))
            if tokens.shape[1] < handle.counts[0]:
                tokens = handle.unmerge(tokens)
            return Reading(tokens, left)

    def add(self, tally: Tally, reading: Reading, dense: Reading | None) -> None:
        """Adds what was read; dense is the unpatched model's, None where it is that itself."""
        ours = reading.tokens.float()
        theirs = ours if dense is None else dense.tokens.float()
        prefix = self.num_prefix
        if prefix:
            tally.add(CLASS, cosine_similarity(ours[:, 0], theirs[:, 0], dim=-1))
        else:
            means = (x.mean(1) for x in (ours, theirs))
            tally.add(MEAN, cosine_similarity(*means, dim=-1))
        tally.add(PATCHES, cosine_similarity(ours[:, prefix:], theirs[:, prefix:], dim=-1))

    def figures(self, tally: Tally, dense: Tally) -> dict[str, float]:
        """The measures of all that was added."""
        return tally.means()

    def _tokens(self, part: Batch) -> int:
        return features(self.model, part).shape[1] - self.num_prefix

    def _left(self, part: Batch, candidate: Candidate) -> int:
        return self.read(part, candidate).left - self.num_prefix
