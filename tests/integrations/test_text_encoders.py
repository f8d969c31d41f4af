"""Encoders of text: padded rows are reduced as if they were alone, and heads see what they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import attributes, reducers, transformers

SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
TEXT = dict(SIZES, vocab_size=97, max_position_embeddings=64, **SPECIAL)
WINDOWED = dict(TEXT, local_attention=8, global_attn_every_n_layers=2)
FAMILIES = {"Bert": TEXT, "Roberta": TEXT, "ModernBert": WINDOWED}
LENGTHS = (14, 7, 9, 3)


def tiny(name: str, head: str = "Model", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name], **options)
    model = getattr(transformers, f"{name}{head}")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def sentences(left: bool = False) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of LENGTHS."""
    ids = torch.randint(4, 97, (4, 14), generator=torch.Generator().manual_seed(1))
    place = torch.arange(14).flip(0) if left else torch.arange(14)
    mask = (place < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


def states(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, **options).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_row_is_reduced_as_if_alone(name: str, prop_attn: bool) -> None:
    model, (ids, mask) = tiny(name), sentences()
    methods = reducers() if name == "Bert" else {m: reducers()[m] for m in ("tome", "ats")}
    methods.pop("hiprune", None)  # its patches are a square
    for method, options in methods.items():
        with tokred.patch(model, method, prop_attn=prop_attn, **options) as handle:
            together, size = states(model, ids, mask), handle.size
            assert len(handle.counts) > 1 and handle.counts[-1] < 14, method
            assert (handle.token_map[mask == 0] == -1).all()
            for row, length in enumerate(LENGTHS):
                alone = states(model, ids[row, None, :length])
                torch.testing.assert_close(together[row, None, :length], alone)
                assert torch.equal(size[row, : handle.counts[-1]], handle.size[0])
                assert not size[row, handle.counts[-1] :].any()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_merged_is_bitwise_the_model(name: str, implementation: str) -> None:
    model, (ids, mask) = tiny(name), sentences()
    model.set_attn_implementation(implementation)
    before, expected = attributes(model), states(model, ids, mask)
    with tokred.patch(model, "tome", r=0):
        assert torch.equal(states(model, ids, mask), expected)
    with tokred.patch(model, "tome", r=[0, 0, 3]):
        merged = states(model, ids, mask, output_hidden_states=False)
        assert merged.shape == expected.shape and not torch.equal(merged, expected)
    with pytest.raises(KeyError), tokred.patch(model, "tome", r=3):
        raise KeyError
    assert attributes(model) == before
    assert torch.equal(states(model, ids, mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_padding_on_the_left(name: str) -> None:
    """Positions given, padding may be anywhere; where each original token was, its state is."""
    model, (ids, mask) = tiny(name), sentences(left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with tokred.patch(model, "tome", r=3):
        together = states(model, ids, mask, position_ids=positions)
        for row, length in enumerate(LENGTHS):
            alone = states(model, ids[row, None, -length:])
            torch.testing.assert_close(together[row, None, -length:], alone)


@torch.no_grad()
def test_restored_tokens_are_those_of_their_groups() -> None:
    """Restored tokens of both kinds; a mean over the attention mask is then weighted by size."""
    model, (ids, mask) = tiny("Bert"), sentences()
    with tokred.patch(model, "tome", r=3) as handle:
        restored = states(model, ids, mask)
        hidden = model(ids, mask, output_hidden_states=True).hidden_states
        assert all(layer.shape == restored.shape for layer in hidden)
    with tokred.patch(model, "tome", r=3, restore_tokens=False, trace_source=True) as handle:
        merged = states(model, ids, mask)
        assert merged.shape[1] == handle.counts[-1] == 5
        torch.testing.assert_close(handle.unmerge(merged), restored)
        weight = handle.size[..., None]
        by_size = (merged * weight).sum(1) / weight.sum(1)
    mean = (restored * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(mean, by_size)


@torch.no_grad()
def test_heads() -> None:
    """Heads that read every token need restore_tokens; those that read the first one do not."""
    ids, mask = sentences()
    heads = ("TokenClassification", "MaskedLM", "QuestionAnswering", "SequenceClassification")
    for name, head in [("Bert", head) for head in heads] + [("ModernBert", heads[3])]:
        options = dict(classifier_pooling="mean") if name == "ModernBert" else {}
        model = tiny(name, f"For{head}", **options)
        plain = model(ids, attention_mask=mask).to_tuple()[0]
        with tokred.patch(model, "tome", r=3):
            output = model(ids, attention_mask=mask).to_tuple()[0]
            assert output.shape == plain.shape and output.isfinite().all()
            alone = model(ids[1:2, :7]).to_tuple()[0]
        longest = slice(None) if head == heads[3] else slice(7)
        torch.testing.assert_close(output[1:2, longest], alone)
        if (name, head) == ("Bert", heads[3]):
            with tokred.patch(model, "tome", r=3, restore_tokens=False):
                torch.testing.assert_close(model(ids, attention_mask=mask).logits, output)
        else:
            with pytest.raises(ValueError, match="needs every token"):
                tokred.patch(model, "tome", r=3, restore_tokens=False)


def test_gradients_and_checkpoints() -> None:
    """A padded batch has the gradients of its rows alone, with the library's checkpoints too."""
    model, (ids, mask) = (
        tiny("Bert", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
        sentences(),
    )
    weight = model.encoder.layer[0].attention.self.query.weight
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))

    def gradient(loss: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        loss().backward()
        return weight.grad.clone()

    def together() -> Tensor:
        return ((states(model, ids, mask) @ direction).square() * mask).sum()

    with tokred.patch(model.train(), "tome", r=3):
        alone = gradient(
            lambda: sum(
                (states(model, ids[row, None, :length]) @ direction).square().sum()
                for row, length in enumerate(LENGTHS)
            )
        )
        torch.testing.assert_close(gradient(together), alone, rtol=1e-3, atol=1e-3)
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(gradient(together), alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_refusals() -> None:
    model, (ids, mask) = tiny("Bert"), sentences()
    blocks = torch.ones(1, 1, 14, 14, dtype=torch.bool).tril()
    bias = torch.linspace(-1, 0, 14).expand(4, 1, 14, 14)
    with tokred.patch(model, "tome", r=3):
        with pytest.raises(ValueError, match="hides other tokens from some queries"):
            states(model, ids, blocks)
        with pytest.raises(ValueError, match="adds a bias to the logits"):
            states(model, ids, bias)
        with pytest.raises(ValueError, match="output_attentions"):
            states(model, ids, mask, output_attentions=True)
        nothing = states(model, ids, torch.zeros_like(mask))
        assert nothing.isfinite().all()
    decoder = tiny("Bert", is_decoder=True)
    with pytest.raises(ValueError, match="has no layer"):
        tokred.patch(decoder, "tome")
    with pytest.raises(ValueError, match="runs 3 times on 1 layers"):
        tokred.patch(transformers.AlbertModel(transformers.AlbertConfig(**TEXT)), "tome")
    with torch.device("meta"), pytest.raises(ValueError, match="has no weights yet"):
        tokred.patch(transformers.BertModel(transformers.BertConfig(**TEXT)), "tome")
