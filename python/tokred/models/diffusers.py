"""diffusers: models made of BasicTransformerBlock, such as UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tokred
from tokred.methods.tomesd import ToMeSD, compute_merge
from tokred.patching import Overrides, Settings


class LatentState:
    """The latent's size in this step, and the plan of the block that is running."""

    def __init__(self, options: ToMeSD) -> None:
        self.options = options
        self.latent_size: tuple[int, int] | None = None
        self.plan: tuple[torch.Tensor, int] | None = None
        self._generator: torch.Generator | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        """The source of random destinations, seeded from torch's own where no seed was given."""
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
            seed = self.options.seed
            self._generator.manual_seed(torch.initial_seed() if seed is None else seed)
        return self._generator


@dataclass(frozen=True)
class Stack:
    """The model whose forward gets the latent, and all its blocks."""

    model: nn.Module
    blocks: list[nn.Module]

    def install(self, method: ToMeSD, settings: Settings, overrides: Overrides) -> LatentState:
        state = LatentState(method)
        overrides.replace(self.model, "forward", _model_forward, state)
        for block in self.blocks:
            overrides.replace(block, "forward", _block_forward, state)
            parts = (
                (block.attn1, method.merge_attn),
                (block.attn2, method.merge_crossattn),
                (block.ff, method.merge_mlp),
            )
            for part, merges in parts:
                if merges and part is not None:
                    overrides.replace(part, "forward", _merged_forward, state)
        return state


def stacks(model: nn.Module, method: Any, settings: Settings) -> Iterator[Stack]:
    """The model with its blocks, if it has any."""
    kind = "BasicTransformerBlock"
    blocks = [module for module in model.modules() if type(module).__name__ == kind]
    if blocks:
        yield Stack(model, blocks)


def _model_forward(state: LatentState, original: Callable, *args: Any, **kwargs: Any) -> Any:
    inputs = (*args, *kwargs.values())
    latent = next((x for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4), None)
    if latent is None:
        raise ValueError("the model was called without a latent of shape [B, C, H, W]")
    state.latent_size = (latent.shape[2], latent.shape[3])
    return original(*args, **kwargs)


def _block_forward(
    state: LatentState, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    generator = state.generator(hidden_states.device) if state.options.use_rand else None
    # Tokens that come straight from an image are channel-first; the ops want rows.
    metric = hidden_states.contiguous()
    state.plan = compute_merge(metric, state.latent_size, state.options, generator)
    return original(hidden_states, *args, **kwargs)


def _merged_forward(
    state: LatentState, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if state.plan is None:
        return original(hidden_states, *args, **kwargs)
    token_map, num_out = state.plan
    merged, _ = tokred.merge(hidden_states.contiguous(), token_map, num_out)
    return tokred.unmerge(original(merged, *args, **kwargs), token_map)
