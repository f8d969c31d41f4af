"""The decoders of transformers that choose keys, or keep them in few bits, or say why not."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tokred
from tokred.compat import cache_keyword

from .model_families import Family, Section
from .tiny_decoders import families, tiny_decoder

EXACT = "exact"
OPTIONS: dict[str, dict[str, Any]] = {
    "token_select": {"k": 99},
    "top_k_attention": {"k": 99},
    "tidal_decode": {"k": 99, "sparse_layer_start": 0},
}


def prompt() -> tuple[Tensor, Tensor]:
    """(ids, mask) [2, 13], the second row begins with padding."""
    ids = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def logits(model: nn.Module) -> Tensor:
    """Logits of tokens that are no padding; an encoder-decoder's two sides read the same tokens."""
    ids, mask = prompt()
    options = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids
        mask = torch.ones_like(mask)
    return model(**options).logits[mask.bool()]


def text(model: nn.Module, **options: Any) -> Tensor:
    """Four tokens of greedy decoding."""
    ids, mask = prompt()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


@torch.no_grad()
def examine(family: Family) -> tuple[str, str]:
    """The cells for methods that choose keys, and for packed caches.

    Raises:
        AssertionError: the model is accepted, and something is not as it has to be.
    """
    model = family.build()
    model.set_attn_implementation("eager")
    expected, written = logits(model), text(model)
    return _choosing(model, expected, written), _packed(model, written)


def attributes(model: nn.Module) -> list[Any]:
    """Everything that a patch may set in the model."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    return [*forwards, *(dict(vars(config)) for config in configs.values())]


def _choosing(model: nn.Module, expected: Tensor, written: Tensor) -> str:
    before = attributes(model)
    try:
        with tokred.patch(model, "token_select", k=99):
            pass
    except ValueError as error:
        assert attributes(model) == before
        return _reason(str(error))
    model.set_attn_implementation("tokred")
    dense = logits(model)
    torch.testing.assert_close(dense, expected, rtol=1e-3, atol=5e-4 * float(expected.abs().max()))
    for name, options in OPTIONS.items():
        with tokred.patch(model, name, **options):
            assert torch.equal(logits(model), dense), name
    model.set_attn_implementation("eager")
    with tokred.patch(model, "token_select", k=99):
        assert torch.equal(text(model), written), "the text"
    assert attributes(model) == before
    return EXACT


def _packed(model: nn.Module, written: Tensor) -> str:
    """A cache that has all tokens in its window, where nothing is rounded."""
    try:
        cache: Any = tokred.PackedCache(model, 8, window=64, rotate=False)
    except ValueError as error:
        return _reason(str(error))
    if model.config.is_encoder_decoder:
        cross = transformers.DynamicCache(config=model.config)
        cache = transformers.EncoderDecoderCache(cache, cross)
    model.set_attn_implementation("tokred")
    try:
        packed = text(model, **{cache_keyword(): cache})
    except (AttributeError, TypeError) as error:
        assert "only tokred's attention reads them" in str(error)
        return "computes with cached keys in its own code, as the second token shows"
    except ValueError as error:
        assert "cache of its own" in str(error)
        return "has a cache of its own"
    assert torch.equal(packed, written), "a packed cache"
    return EXACT


def _reason(message: str) -> str:
    """Why, without what the page says once for all."""
    found = re.search(r"that this method can be put into \((.*)\); supported", message)
    message = found.group(1) if found else message
    message = re.split(
        r": use a transformers|, which (?:tokred's attention|methods)|: no method", message
    )[0]
    for words, short in _SHORTER:
        message = re.sub(words, short, message)
    return message


_SHORTER = (
    (r"^PackedCache packs layers of full attention, and \w+ has none$", "no full attention"),
    (r"^PackedCache serves .* has none \((.*)\)$", r"\1"),
    (r"^PackedCache packs tokens of text, and \w+ ", ""),
    (r", and packed ones are read through transformers' attention interface$", ""),
)

SECTION = Section(
    title="Decoders",
    text="""\
With `tokred.patch(model, "token_select", ...)`, as with every other method that chooses keys, and
with `tokred.PackedCache(model)`. "Exact": where every key is chosen, the logits are those of
tokred's dense attention bit for bit, and those of eager attention to rounding; and so is the text,
as it is with a packed cache that has all tokens in its window; rows of a batch are padded on the
left. Encoder-decoders choose in their decoder, vision-language models in their language model.
Methods that count layers count those of full attention, from 0. Models with multi-head latent
attention (`deepseek_v2`, `deepseek_v3` and others) store expanded heads in a DynamicCache;
`PackedCache(model)` and `DenseCache(model, absorb=True)` store latents, from which no method
chooses.""",
    columns=("methods that choose keys", "packed cache"),
    families=tuple(
        Family(kind, name, partial(tiny_decoder, name, kind), logits)
        for name, kind in families().items()
    ),
    examine=examine,
)
