"""kvpress's presses on tokred's attention: decoding reads the keys that a press leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.patching import EvictionCall, Patch, Settings

from .kept_keys import KeptKeysLayer


class PressAdapter:
    """A press of kvpress, put into a model by tokred.

        with PressAdapter(press)(model):
            model.generate(**inputs)

    The press is called as kvpress calls it, once for every full-attention layer, after the
    attention of the first forward pass: `compress(module, hidden_states, keys, values, attentions,
    kwargs)`, with attentions None, as tokred's attention has no weights to show. Attention, the
    cache and generate are those of methods that evict: positions count on from the length of the
    text. A press does not say which keys it has left, so `position` of a layer is -1 throughout.

    kvpress 0.5 asks for transformers below 5.3 and tokred for 5.17, so no installation has what
    both declare. Of kvpress 0.5.5, put beside transformers 5.24 by hand, these ran: KnormPress,
    SnapKVPress, TOVAPress, StreamingLLMPress, ExpectedAttentionPress, KeyDiffPress, LagKVPress,
    RandomPress, PyramidKVPress, SimLayerKVPress, LeverageScorePress, CURPress.

    Args:
        press: an object with kvpress's `compress`, and `post_init_from_model` where it has it.

    Raises:
        TypeError: it has no `compress`.
        ValueError: a press that is more than `compress`: one with hooks of its own (presses that
            decode, or combine others), or that hides keys inside kvpress's own attention.
    """

    adapters = ("causal_lm_cache",)
    prompts_only = True

    def __init__(self, press: Any) -> None:
        if not callable(getattr(press, "compress", None)):
            raise TypeError(f"press must have compress(), got {type(press).__name__}")
        for name in ("forward_hook", "__call__"):
            owner = next((each for each in type(press).__mro__ if name in vars(each)), None)
            if owner is not None and owner.__name__ != "BasePress":
                raise ValueError(
                    f"{type(press).__name__} has a {name} of its own, and only presses that are "
                    "all in compress() run on tokred's attention: use kvpress itself for it"
                )
        self.press = press

    def __call__(self, model: nn.Module) -> Patch:
        """The patch of a model, to be entered."""
        if hasattr(self.press, "post_init_from_model"):
            self.press.post_init_from_model(model)
        return Patch(model, self, Settings())

    def evict(self, call: EvictionCall) -> None:
        """Evicts nothing: the press comes after the attention, in `attended`."""

    def attended(
        self, module: nn.Module, layer: KeptKeysLayer, attentions: Any, given: dict[str, Any],
        rotary: nn.Module | None,
    ) -> None:  # fmt: skip
        """Lets the press compress the keys and values of a layer after the first forward pass.

        Args:
            module: the attention. layer: its cache. attentions: the weights, always None.
            given: the arguments that the module was called with.
            rotary: the decoder's rotary embedding, which presses look for in the module.

        Raises:
            ValueError: padding; a press that hides keys instead of dropping them, or returns other
                shapes than [B, Hkv, K, D].
        """
        hidden_states: Tensor = given["hidden_states"]
        tokens = hidden_states.shape[1]
        if layer.get_seq_length() != tokens:
            return
        name = type(self.press).__name__
        if given.get("attention_mask") is not None:
            raise ValueError(
                f"{name} knows of no padding, and the attention_mask hides some tokens: pass rows "
                "of one length, or one at a time"
            )
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        place = torch.arange(tokens, device=keys.device)
        kwargs = {**given, "cache_position": place}
        lends = rotary is not None and not hasattr(module, "rotary_emb")
        if lends:
            vars(module)["rotary_emb"] = rotary  # an attribute, and no module of this one
        try:
            pressed = self.press.compress(module, hidden_states, keys, values, attentions, kwargs)
        finally:
            if lends:
                del vars(module)["rotary_emb"]
        if getattr(module, "masked_key_indices", None) is not None:
            del module.masked_key_indices
            raise ValueError(
                f"{name} hides keys of some heads inside kvpress's own attention instead of "
                "dropping them: for heads of different budgets use tokred.patch(model, 'ada_kv')"
            )
        shapes = [[*x.shape] for x in pressed]
        fits = [
            [*x.shape[:2], pressed[0].shape[2], x.shape[3]] for x in (keys, values)
        ] == shapes and shapes[0][2] <= tokens
        if not fits:
            raise ValueError(
                f"{name} must return keys and values [B, Hkv, K, D] of K <= {tokens} tokens, got "
                f"{shapes[0]} and {shapes[1]}"
            )
        layer.replace(*pressed)
