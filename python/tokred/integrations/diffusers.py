"""diffusers: models made of BasicTransformerBlock, such as UNet2DConditionModel."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from torch import nn

import tokred
from tokred.grid import grid_of
from tokred.patching import LatentCall, Overrides, Settings, TokenReducer
from tokred.patching.recomputation import (
    PerThread,
    StorageTable,
    backward_task,
    refuse_late_backward,
)
from tokred.patching.reduction_call import as_token_map
from tokred.patching.token_state import refuse_copy

# The models of diffusers whose tokens are those of a latent [B, C, H, W] in rows. Others add a time
# axis, or tokens of text.
_IMAGE_MODELS = {
    "UNet2DConditionModel",
    "AudioLDM2UNet2DConditionModel",
    "ControlNetModel",
    "UNetControlNetXSModel",
    "Transformer2DModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
}

# (token_map i32 [B, N], tokens after the merge), or None where a block merges nothing.
BlockPlan: TypeAlias = tuple[torch.Tensor, int] | None


class BlockReducer(TokenReducer, Protocol):
    """A TokenReducer for blocks, whose `plan` gets a LatentCall.

    merge_attn, merge_crossattn, merge_mlp: the parts of a block that run on fewer tokens.
    """

    merge_attn: bool
    merge_crossattn: bool
    merge_mlp: bool


@dataclass(frozen=True)
class Latent:
    """The state of a forward pass before one of its blocks; never changed, only replaced.

    size is the height and width of the latent, finest the downsampling of the finest block so far.
    merged has the name of every block that has run, its tokens, and how many its parts ran on.
    carried is what the method's blocks have left for later ones, see ReductionCall. grad: the pass
    began with gradients. checkpointed: a block ran without, as in a reentrant checkpoint.
    """

    size: tuple[int, int]
    finest: int | None = None
    merged: tuple[tuple[str, int, int], ...] = ()
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    grad: bool = False
    checkpointed: bool = False


@dataclass
class _ThreadState:
    """The forward pass that runs in a thread, its latest complete one, and the running block."""

    current: Latent | None = None
    latest: Latent | None = None
    in_block: bool = False
    plan: BlockPlan = None


class LatentState:
    """The blocks of one model, and its forward passes: one in each thread.

    A block that runs again in the backward pass (torch.utils.checkpoint) finds its pass by the
    storage of its tokens.
    """

    def __init__(self, method: BlockReducer, num_blocks: int) -> None:
        self.method = method
        self.num_blocks = num_blocks
        self.blocks = frozenset(method.layers(num_blocks))
        self.seed = torch.initial_seed()
        self.threads = PerThread(_ThreadState)
        self.passes: StorageTable[Latent] = StorageTable()
        self.latest: Latent | None = None
        self.warned = False

    @property
    def thread(self) -> _ThreadState:
        """The state of the calling thread."""
        return self.threads.own

    @property
    def merged(self) -> dict[str, tuple[int, int]]:
        """Each block's number of tokens, and on how many of them its parts ran, by its name.

        It shows the pass that the calling thread has completed last; in a thread that has run none,
        the one completed last by any thread.
        """
        shown = self.thread.latest or self.latest
        if shown is None:
            raise RuntimeError("no forward pass has run inside the patch yet")
        return {name: (tokens, merged) for name, tokens, merged in shown.merged}

    def begin(self, size: tuple[int, int]) -> Latent | None:
        """Starts a forward pass; returns the one that it interrupts, for `end`."""
        self.passes.purge()
        outer = self.thread.current
        self.thread.current = Latent(size, grad=torch.is_grad_enabled())
        return outer

    def complete(self) -> None:
        """Shows the thread's pass, and warns once if no pass has merged anything."""
        done = self.thread.current
        if backward_task() != -1:
            return
        self.thread.latest = self.latest = done
        if torch.compiler.is_compiling() or self.warned or not self.blocks:
            return
        if all(tokens == merged for _, tokens, merged in done.merged):
            self.warned = True
            counts = sorted({tokens for _, tokens, _ in done.merged}, reverse=True)
            warnings.warn(
                f"tomesd merged nothing: with a latent of {done.size[0]} x {done.size[1]} the "
                f"blocks have {counts} tokens, of which {self.method} leaves every one",
                RuntimeWarning,
                stacklevel=2,
            )

    def plan_block(self, x: torch.Tensor, name: str, index: int) -> BlockPlan:
        """How block `index` merges its tokens x [B, N, C].

        Raises:
            RuntimeError: the block runs outside of its model.
        """
        now = self.thread.current
        if backward_task() != -1:
            now = self.passes.find(x, index) or now
        if now is None:
            raise RuntimeError(
                f"block {name} was run outside of its model's forward, so the latent's size is not "
                "known: call the model; checkpoint whole blocks, with their tokens as the first "
                "argument, or the whole model"
            )
        downsample = grid_of(x.shape[1], now.size)[0]
        finest = downsample if now.finest is None else min(downsample, now.finest)
        self.passes.add(x, index, replace(now, finest=finest))
        plan, carried = None, now.carried
        if index in self.blocks:
            call = LatentCall(
                x,
                index,
                self.num_blocks,
                carried=dict(carried),
                latent_size=now.size,
                finest=finest,
                seed=self.seed,
            )
            reduction = self.method.plan(call)
            carried = call.carried
            plan = None if reduction is None else as_token_map(reduction, x.shape[1])
        record = (name, x.shape[1], x.shape[1] if plan is None else plan[1])
        if self.thread.current is not None:
            merged = (*now.merged, record)
            rerun = now.checkpointed or (now.grad and not torch.is_grad_enabled())
            self.thread.current = replace(
                now, finest=finest, merged=merged, carried=carried, checkpointed=rerun
            )
        return plan

    def plan_of(self, block: nn.Module) -> BlockPlan:
        """The plan for a part of the block: None where another, inner patch runs it.

        Raises:
            RuntimeError: the part is run again without its block.
        """
        if self.thread.in_block:
            return self.thread.plan
        if backward_task() != -1 and self in getattr(block.forward, "args", ()):
            raise RuntimeError(
                "a part of a block was run again, and what it merged is not known: checkpoint "
                "whole blocks, with their tokens as the first argument, or the whole model"
            )
        return None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


@dataclass(frozen=True)
class Stack:
    """The model whose forward gets the latent, and its blocks by name."""

    model: nn.Module
    blocks: dict[str, nn.Module]

    def install(
        self, method: BlockReducer, settings: Settings, overrides: Overrides
    ) -> LatentState:
        """Puts the method into the blocks; returns their state."""
        state = LatentState(method, len(self.blocks))
        _, latent, *_ = *inspect.signature(type(self.model).forward).parameters, ""
        overrides.replace(self.model, "forward", _model_forward, state, latent, self.model)
        for index, (name, block) in enumerate(self.blocks.items()):
            overrides.replace(block, "forward", _block_forward, state, name, index)
            for part in _parts(block, method):
                overrides.pre_hook(part, partial(_merge_input, state, block))
                overrides.hook(part, partial(_unmerge_output, state, block))
        return state


def _parts(block: nn.Module, method: BlockReducer) -> list[nn.Module]:
    """What runs on merged tokens; attn2 is None in blocks without cross-attention."""
    parts = (
        (block.attn1, method.merge_attn),
        (block.attn2, method.merge_crossattn),
        (block.ff, method.merge_mlp),
    )
    return [part for part, merges in parts if merges and part is not None]


def stacks(model: nn.Module, method: BlockReducer, settings: Settings) -> Iterator[Stack]:
    """Every model with blocks in it: the outermost ones of diffusers, or else `model` itself.

    Raises:
        ValueError: a model of diffusers whose tokens are not those of an image.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    for name, block in model.named_modules():
        if type(block).__name__ == "BasicTransformerBlock" and _parts(block, method):
            root = _root(model, name)
            found.setdefault(root, {})[name.removeprefix(f"{root}.")] = block
    for root, blocks in found.items():
        root_module = model.get_submodule(root)
        kinds = _diffusers_kinds(root_module)
        if kinds and _IMAGE_MODELS.isdisjoint(kinds):
            raise ValueError(
                f"{kinds[0]} is not supported, as its tokens are not those of one image in rows; "
                f"supported are {', '.join(sorted(_IMAGE_MODELS))}"
            )
        yield Stack(root_module, blocks)


def _root(model: nn.Module, name: str) -> str:
    """The outermost module around `name` that is a model of diffusers, or "" for `model`."""
    parts = name.split(".")
    for length in range(len(parts)):
        root = ".".join(parts[:length])
        if "ModelMixin" in _diffusers_kinds(model.get_submodule(root)):
            return root
    return ""


def _diffusers_kinds(module: nn.Module) -> list[str]:
    kinds = type(module).__mro__
    return [kind.__name__ for kind in kinds if kind.__module__.startswith("diffusers.models.")]


def _model_forward(
    state: LatentState,
    name: str,
    model: nn.Module,
    original: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    latent = args[0] if args else kwargs.get(name)
    if not isinstance(latent, torch.Tensor) or latent.ndim != 4:
        got = getattr(latent, "shape", type(latent).__name__)
        raise ValueError(f"{name or 'the first argument'} must be a latent [B, C, H, W], got {got}")
    outer = state.begin((latent.shape[2], latent.shape[3]))
    try:
        output = original(*args, **kwargs)
        state.complete()
        if state.thread.current.checkpointed:
            refuse_late_backward(output, model)
    finally:
        state.thread.current = outer
    return output


def _block_forward(
    state: LatentState,
    name: str,
    index: int,
    original: Callable,
    hidden_states: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    state.thread.plan = state.plan_block(hidden_states, name, index)
    state.thread.in_block = True
    try:
        return original(hidden_states, *args, **kwargs)
    finally:
        state.thread.in_block = False


def _merge_input(
    state: LatentState, block: nn.Module, part: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    plan = state.plan_of(block)
    if plan is None:
        return None
    if kwargs.get("attention_mask") is not None and kwargs.get("encoder_hidden_states") is None:
        raise ValueError(
            "attention_mask hides tokens of the latent, some of which are merged: leave it out, or "
            "the patch"
        )
    tokens, *others = args
    merged, _ = tokred.merge(tokens.contiguous(), *plan)
    return (merged, *others), kwargs


def _unmerge_output(
    state: LatentState, block: nn.Module, part: nn.Module, args: tuple, output: torch.Tensor
) -> torch.Tensor | None:
    plan = state.plan_of(block)
    return None if plan is None else tokred.unmerge(output, plan[0])
