"""tokred.patch and tokred.apply: what they change in a model is always taken back."""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import left_padded, tiny_lm
from tokred.compat import cache_keyword
from tokred.methods import METHODS
from tokred.patching import Overrides
from tokred.patching.protocols import name_of

pytestmark = pytest.mark.usefixtures("one_thread")

CHOICE = dict(k=2, n_init=1, n_local=2)


@pytest.fixture
def llama() -> nn.Module:
    model = tiny_lm("Llama")
    model.set_attn_implementation("eager")
    return model


def logits(model: nn.Module) -> Tensor:
    """The logits of one token after a prompt, where the methods choose."""
    with torch.no_grad():
        ids = left_padded()[0]
        cache = model(ids, use_cache=True).past_key_values
        return model(ids[:, :1], **{cache_keyword(): cache}).logits


def attributes(model: nn.Module) -> list[Any]:
    """Everything that a patch may set in the model."""
    modules = [(id(m), m.__dict__.get("forward"), len(m._forward_hooks)) for m in model.modules()]
    return [*modules, dict(vars(model.config))]


class Counted:
    """A callable in the place of a module's forward, as other libraries put there."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def test_apply_and_remove(llama: nn.Module) -> None:
    before, dense = attributes(llama), logits(llama)
    with tokred.patch(llama, "token_select", **CHOICE):
        sparse = logits(llama)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    handle = tokred.apply(llama, "token_select", **CHOICE)
    assert torch.equal(logits(llama), sparse) and len(handle.states) == 1
    for _ in range(2):
        handle.remove()
        assert attributes(llama) == before and torch.equal(logits(llama), dense)
    with handle:
        assert torch.equal(logits(llama), sparse)
        handle.remove()
        assert attributes(llama) == before
    assert attributes(llama) == before


def test_a_patch_that_was_never_entered_says_so(llama: nn.Module) -> None:
    with pytest.warns(RuntimeWarning, match="did nothing") as caught:
        tokred.patch(llama, "token_select", **CHOICE)
        gc.collect()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = tokred.patch(llama, "token_select", **CHOICE)
        with handle:
            pass
        del handle
        tokred.apply(llama, "token_select", **CHOICE).remove()
        with pytest.raises(TypeError, match="no option ratio"):
            tokred.patch(llama, "token_select", ratio=0.5)
        gc.collect()


def test_patches_can_be_left_in_any_order(llama: nn.Module) -> None:
    before, dense = attributes(llama), logits(llama)
    alone = {}
    for k in (1, 4):
        with tokred.patch(llama, "top_k_attention", k=k):
            alone[k] = logits(llama)
    handles = [tokred.apply(llama, "top_k_attention", k=k) for k in (1, 4, 1)]
    assert torch.equal(logits(llama), alone[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handles[1].remove()
        assert torch.equal(logits(llama), alone[1])
        handles[2].remove()
        assert torch.equal(logits(llama), alone[1])
        again = tokred.apply(llama, "top_k_attention", k=4)
        handles[0].remove()
        assert torch.equal(logits(llama), alone[4])
        again.remove()
    assert attributes(llama) == before and torch.equal(logits(llama), dense)


def test_what_others_changed_meanwhile_is_restored_with_a_warning(llama: nn.Module) -> None:
    before, dense = attributes(llama), logits(llama)
    attention = llama.model.layers[0].self_attn
    noticed = pytest.warns(RuntimeWarning, match="LlamaAttention.forward changed while")
    with noticed, tokred.patch(llama, "token_select", **CHOICE):
        counted = attention.forward = Counted(attention.forward)
        logits(llama)
    assert counted.calls == 2
    assert attributes(llama) == before and torch.equal(logits(llama), dense)
    # What was there before stays there, and runs.
    counted = attention.forward = Counted(attention.forward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tokred.patch(llama, "token_select", **CHOICE):
            logits(llama)
    assert attention.forward is counted and counted.calls == 2


def test_an_exception_in_flight_stays_and_gets_a_note(llama: nn.Module) -> None:
    before = attributes(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failure = pytest.raises(KeyError, match="the user's")
        with failure as caught, tokred.patch(llama, "token_select", **CHOICE):
            llama.set_attn_implementation("sdpa")
            raise KeyError("the user's")
    assert attributes(llama) == before
    notes = getattr(caught.value, "__notes__", None)
    assert notes is None or "_attn_implementation_internal changed" in notes[0]


def test_a_failure_while_entering_leaves_nothing_behind(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace = attributes(llama), Overrides.replace
    calls = []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        replace(*args)

    monkeypatch.setattr(Overrides, "replace", failing)
    with pytest.raises(MemoryError), tokred.patch(llama, "token_select", **CHOICE):
        pass
    assert len(calls) == 2 and attributes(llama) == before


def test_signatures_stay(llama: nn.Module) -> None:
    import inspect

    attention = llama.model.layers[0].self_attn
    before = inspect.signature(attention.forward)
    with tokred.patch(llama, "tidal_decode", k=2, sparse_layer_start=0):
        assert inspect.signature(attention.forward) == before
        assert "use_cache" in inspect.signature(llama.model.forward).parameters


def test_pipelines_in_the_place_of_models(llama: nn.Module) -> None:
    before = attributes(llama)
    for name in ("model", "unet", "transformer"):
        with tokred.patch(SimpleNamespace(**{name: llama}), "token_select", **CHOICE) as handle:
            assert handle.model is llama and attributes(llama) != before
        assert attributes(llama) == before
    pipeline = SimpleNamespace(transformer=llama, transformer_2=tiny_lm("Llama"))
    with pytest.raises(ValueError, match="several models, transformer, transformer_2"):
        tokred.patch(pipeline, "token_select", **CHOICE)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, .* got dict"):
        tokred.patch({"model": llama}, "token_select", **CHOICE)


def test_errors_name_methods_as_users_do() -> None:
    for method in METHODS.values():
        if method.options is not None:
            assert name_of(object.__new__(method.options)) == method.name
    assert name_of(SimpleNamespace()) == "SimpleNamespace"
