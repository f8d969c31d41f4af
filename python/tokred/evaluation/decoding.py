"""Decoders: how well the tokens after a prompt are predicted, one by one as in generate."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from tokred.compat import cache_keyword

from .candidates import Candidate, Methods, for_decoder
from .inputs import Batch, without_padding
from .needles import Needle, hidden, needles
from .results import Measure
from .tally import Tally

PERPLEXITY, RATIO, KL, RECALL = "perplexity", "to dense", "logit KL", "needle recall"
_DENSE = "loss of the unpatched model"  # of the same tokens, no column
MEASURES = (
    Measure(PERPLEXITY, "lower", 5),
    Measure(RATIO, "", 4),
    Measure(KL, "lower", 3),
    Measure(RECALL, "higher", 3),
)


@contextmanager
def dense_attention(model: nn.Module, name: str = "tokred") -> Iterator[None]:
    """The model on tokred's dense attention, or another, until the block is left."""
    from tokred.integrations.transformers.attention import register

    register()
    # The parts of a model may have different ones.
    found = {id(each): each for each in _configs(model)}.values()
    before = [(each, each._attn_implementation_internal) for each in found]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def best_dense(model: nn.Module) -> str:
    """The implementation of attention that is best practice for a model of transformers: "sdpa", or
    "eager" where it has no SDPA (Gemma 2, whose logits are capped)."""
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs of a model of transformers and of its parts."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            yield config
            for name in config.sub_configs:
                part = getattr(config, name, None)
                if hasattr(part, "_attn_implementation_internal"):
                    yield part


def forward(model: nn.Module, ids: Tensor, cache: Any) -> Tensor:
    """f32 [B, vocabulary]: the logits after the last of ids i64 [B, N], which join the cache."""
    options: dict[str, Any] = {cache_keyword(): cache}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    return model(ids, **options).logits[:, -1].float()


def cache_of(model: nn.Module, candidate: Candidate | None) -> Any:
    """An empty cache: transformers' own without a candidate, one that grows in place with one."""
    from transformers import DynamicCache

    from tokred.cache import DenseCache, PackedCache

    if candidate is None:
        return DynamicCache(config=model.config)
    if candidate.bits is not None:
        return PackedCache(model, candidate.bits)
    return DenseCache(model)


@dataclass(frozen=True)
class Passage:
    """Sequences in two parts.

    context: i64 [B, N], the prompt. after: i64 [B, S + 1], read one by one; all but the first of
    them are predicted.
    """

    context: Tensor
    after: Tensor


@dataclass(frozen=True)
class Reading:
    """A model's predictions for a passage.

    log_probabilities: f32 [B, S, vocabulary]. predicted: i64 [B, S], the tokens of the passage.
    named: bool [B, T], which tokens of all needles' answers it predicted; None without needles.
    """

    log_probabilities: Tensor
    predicted: Tensor
    named: Tensor | None


class DecoderTask:
    """How well a decoder predicts the last tokens of sequences, whose beginning is its prompt."""

    measures = MEASURES

    def __init__(self, model: nn.Module, tokenizer: Any, decoded: int) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder and a decoder: pass one of the two, or a "
                "language model"
            )
        self.model, self.decoded = model, decoded
        self.needles: list[Needle] = [] if tokenizer is None else needles(tokenizer)
        self.device = next(model.parameters()).device
        self.title = f"{type(model).__name__}: quality of decoding"

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines that explain the figures."""
        lines = [
            f"Perplexity and KL (nats, from the unpatched model) are of at most {self.decoded} "
            "tokens after each prompt, decoded one by one; kept counts keys, of the first prompt.",
        ]
        if self.needles:
            lines.append(
                f"Needle recall is of {len(self.needles)} numbers hidden in every prompt, "
                "and asked for after it."
            )
        return tuple(lines)

    def parts(self, batch: Batch) -> Iterator[Passage]:
        """The sequences of a batch as passages, with needles where there are any.

        Raises:
            ValueError: too few tokens or too many, or numbers that are no tokens of the model.
        """
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        for ids in without_padding(batch):
            if ids.shape[1] < 4:
                raise ValueError(f"a sequence must have at least 4 tokens, got {ids.shape[1]}")
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"token numbers must be in [0, {vocabulary}) here, got {low} to {high}"
                )
            ids = ids.to(self.device)
            scored = min(self.decoded, (ids.shape[1] - 1) // 2)
            context, after = ids[:, : -scored - 1], ids[:, -scored - 1 :]
            if self.needles:
                context = hidden(context, self.needles)
            self._check_length(context.shape[1] + after.shape[1])
            yield Passage(context, after)

    def _check_length(self, length: int) -> None:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and length > longest:
            added = " with the needles" if self.needles else ""
            raise ValueError(
                f"a sequence has {length} tokens{added}, and the model at most {longest} positions"
            )

    def candidates(
        self, part: Passage, methods: Methods, budgets: Sequence[float], bits: Sequence[int]
    ) -> list[Candidate]:
        """The candidates, at budgets that are shares of this passage's prompt."""
        return for_decoder(methods, budgets, bits, part.context.shape[1])

    def fitted(self, part: Passage, candidate: Candidate) -> Candidate:
        """The candidate as it is: its options say how many keys it keeps."""
        return candidate

    def counted(self, candidate: Candidate, reading: Reading) -> Candidate:
        """The candidate as it is."""
        return candidate

    def read(self, part: Passage, candidate: Candidate | None = None) -> Reading:
        """The model, with the candidate's patch, reads a passage."""
        if candidate is None:
            return self._read(part, cache_of(self.model, None))
        with candidate.patch(self.model):
            return self._read(part, cache_of(self.model, candidate))

    def _read(self, part: Passage, cache: Any) -> Reading:
        forward(self.model, part.context, cache)
        named = [
            needle.to(part.context).named(lambda ids: self._decode(ids, copy.deepcopy(cache)))
            for needle in self.needles
        ]
        return Reading(
            self._decode(part.after[:, :-1], cache),
            part.after[:, 1:],
            torch.cat(named, 1) if named else None,
        )

    def _decode(self, ids: Tensor, cache: Any) -> Tensor:
        """f32 [B, N, vocabulary], of the token that follows each of ids i64 [B, N], read one by
        one."""
        rows = [forward(self.model, token, cache).log_softmax(-1) for token in ids.split(1, 1)]
        return torch.stack(rows, 1)

    def add(self, tally: Tally, reading: Reading, dense: Reading | None) -> None:
        """Adds a reading; dense is the unpatched model's, None where the reading is that one."""
        ours = reading.log_probabilities
        tally.add(PERPLEXITY, -ours.gather(2, reading.predicted[..., None]))
        if dense is not None:
            theirs = dense.log_probabilities
            tally.add(_DENSE, -theirs.gather(2, reading.predicted[..., None]))
            tally.add(KL, kl_div(ours, theirs, reduction="none", log_target=True).sum(-1))
        if reading.named is not None:
            tally.add(RECALL, reading.named.float())

    def figures(self, tally: Tally, dense: Tally) -> dict[str, float]:
        """The measures of all that was added."""
        means = tally.means()
        loss = means.pop(PERPLEXITY)
        difference = loss - means.pop(_DENSE, loss)
        if KL in means:
            means[KL] = max(means[KL], 0.0)  # rounding can make it negative
        return {PERPLEXITY: _exp(loss), RATIO: _exp(difference), **means}


def _exp(value: float) -> float:
    """math.exp, infinite where that overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
