"""The state of one forward pass through layers that merge tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

import tokred

from .protocols import TokenReducer
from .recomputation import PerThread, StorageTable, backward_task
from .reduction_call import LayerAttention, Reduced, Reduction, ReductionCall, as_token_map
from .settings import Settings


@dataclass(frozen=True)
class Pass:
    """The state of a forward pass before one of its layers; never changed, only replaced.

    layer is the next to run, and counts the tokens before the first layer and after each reduction.
    ones [B, N0] are the sizes before any merge; size f32 [B, N] is None as long as nothing has
    merged, and token_map i32 [B, N0] as long as all tokens are left. task is the id of the backward
    pass that recomputes the layers, -1 for none. carried is what the method's layers have left for
    later ones, see ReductionCall.
    """

    layer: int
    task: int
    counts: tuple[int, ...]
    ones: torch.Tensor
    size: torch.Tensor | None = None
    token_map: torch.Tensor | None = None
    carried: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class _ThreadState:
    """The pass that runs in a thread, its latest complete one, and the running layer's attention.

    attention is None outside of layers that reduce their tokens.
    """

    current: Pass | None = None
    latest: Pass | None = None
    attention: LayerAttention | None = None


class TokenState:
    """One stack of layers: the method that reduces their tokens, and its forward passes.

    Every thread has a pass of its own, which the first layer starts. A layer that runs again in
    the backward pass (torch.utils.checkpoint) finds the pass it belongs to by the storage of its
    tokens. torch.compile sees only attributes that are written before they are read.

    The properties show the pass that the calling thread has completed last; in a thread that has
    run none, the one completed last by any thread.
    """

    def __init__(
        self, method: TokenReducer, num_layers: int, num_prefix: int, settings: Settings
    ) -> None:
        self.method = method
        self.num_layers = num_layers
        self.layers = frozenset(method.layers(num_layers))
        self.num_prefix = num_prefix
        self.prop_attn = settings.prop_attn
        self.trace_source = settings.trace_source
        self._threads = PerThread(_ThreadState)
        self._latest: Pass | None = None
        self._passes: StorageTable[Pass] = StorageTable()

    @property
    def _thread(self) -> _ThreadState:
        return self._threads.own

    @property
    def ran(self) -> bool:
        """Whether a forward pass has run through all layers."""
        return (self._thread.latest or self._latest) is not None

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens before the first layer, then after each merge."""
        return self._shown().counts

    @property
    def size(self) -> torch.Tensor:
        """f32 [B, N]: how many original tokens each final token stands for."""
        shown = self._shown()
        return shown.ones[:, : shown.counts[-1]] if shown.size is None else shown.size

    @property
    def token_map(self) -> torch.Tensor:
        """i32 [B, N0]: the final token that each original token went to. Needs trace_source."""
        shown = self._shown()
        if not self.trace_source:
            raise RuntimeError("the token map is only kept with tokred.patch(trace_source=True)")
        if shown.token_map is None:
            batch, tokens = shown.ones.shape
            identity = torch.arange(tokens, dtype=torch.int32, device=shown.ones.device)
            return identity.repeat(batch, 1)
        return shown.token_map

    def unmerge(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] of final tokens -> [B, N0, C]: every original token gets its group's."""
        return tokred.unmerge(tokens, self.token_map)

    @property
    def _running(self) -> Pass:
        """The calling thread's pass, inside a layer."""
        now = self._thread.current
        assert now is not None  # enter() has made it
        return now

    def _shown(self) -> Pass:
        shown = self._thread.latest or self._latest
        if shown is None:
            raise RuntimeError("no forward pass has run inside the patch yet")
        return shown

    def reduces(self, layer: int) -> bool:
        """Whether the layer may give up tokens."""
        return layer in self.layers

    def enter(self, x: torch.Tensor, layer: int) -> None:
        """Before a layer runs on x [B, N, C]: makes the pass it belongs to the thread's own.

        Raises:
            RuntimeError: the layer runs out of order, so that the tokens' sizes are not known.
        """
        task = backward_task()
        self._thread.attention = LayerAttention() if layer in self.layers else None
        if layer == 0:
            self._passes.purge()
            # One element, so that a pass which merges nothing costs nothing.
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            ones = torch.ones(1, 1, dtype=wide, device=x.device).expand(x.shape[0], x.shape[1])
            self._thread.current = Pass(0, task, (x.shape[1],), ones)
            return
        found = self._passes.find(x, layer)
        if found is None and task == -1:
            found = self._thread.current
        if found is None or found.layer != layer or found.counts[-1] != x.shape[1]:
            raise RuntimeError(
                f"layer {layer} was run out of order, so the sizes of its tokens are not known: "
                "run the patched layers one after the other, and checkpoint whole layers or the "
                "whole model, with the tokens as their first argument"
            )
        self._thread.current = replace(found, task=task)
        self._passes.add(x, layer, self._thread.current)

    def leave(self, x: torch.Tensor, layer: int) -> None:
        """After a layer has returned x [B, N, C]."""
        done = replace(self._running, layer=layer + 1)
        self._thread.current = done
        self._passes.add(x, layer + 1, done)
        if layer + 1 == self.num_layers and backward_task() == -1:
            self._thread.latest = self._latest = done

    def keep_projection(
        self, name: str, output: torch.Tensor, in_heads: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Keeps what the running layer's attention projected, see LayerAttention."""
        if self._thread.attention is not None:
            self._thread.attention.projections[name] = output, in_heads

    def keep_lse(self, lse: torch.Tensor) -> None:
        """Keeps the lse f32 [B, H, N] of the running layer's proportional attention."""
        if self._thread.attention is not None:
            self._thread.attention.lse = lse

    def key_bias(self) -> torch.Tensor | None:
        """log(size) f32 [B, 1, N] of the running layer, or None where attention needs no bias.

        Raises:
            RuntimeError: the attention is run again without its layer.
        """
        now, task = self._thread.current, backward_task()
        if not self.prop_attn or not self.layers or (now is None and task == -1):
            return None
        if now is None or now.task != task:
            raise RuntimeError(
                "attention was run again apart from its layer, so the sizes of its tokens are not "
                "known: checkpoint whole layers or the whole model"
            )
        return None if now.size is None else now.size.log().unsqueeze(1)

    def final_size(self, x: torch.Tensor) -> torch.Tensor | None:
        """The sizes [B, N] of what the last layer returned, of which x [B, n <= N, C] is the end.

        None where nothing has merged.

        Raises:
            RuntimeError: x does not come from the calling thread's pass.
        """
        now = self._thread.current
        if now is None or now.layer != self.num_layers or now.task != backward_task():
            raise RuntimeError(
                "pooling was run apart from the layers, so the sizes of its tokens are not known: "
                "checkpoint whole layers or the whole model"
            )
        return now.size

    def reduce(self, x: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """Reduces x [B, N, C] as the method plans it.

        Args:
            scale: of the logits of the layer's attention.

        Raises:
            RuntimeError: the layer ran without its patched attention.
        """
        reduction = self._plan(x, layer, scale)
        if reduction is None:
            return x
        now = self._running
        if isinstance(reduction, Reduced):
            token_map, num_out = reduction.token_map, reduction.tokens.shape[1]
            x = reduction.tokens
            size: torch.Tensor | None = reduction.size
        else:
            token_map, num_out = as_token_map(reduction, x.shape[1])
            # SigLIP's tokens come channel-first out of the patch convolution; the ops want rows.
            x = x.contiguous()
            if isinstance(reduction, torch.Tensor) and now.size is None:
                # Each stands for itself still: later layers attend as the model itself does.
                x, size = tokred.unmerge(x, reduction), None
            else:
                x, size = tokred.merge(x, token_map, num_out, now.size)
        source = None
        if self.trace_source:
            earlier = now.token_map
            source = token_map if earlier is None else tokred.compose(token_map, earlier)
        self._thread.current = replace(
            now, counts=(*now.counts, num_out), size=size, token_map=source
        )
        return x

    def _plan(self, x: torch.Tensor, layer: int, scale: float) -> Reduction:
        """What the method does with the tokens; keeps what it leaves for later layers."""
        attention, self._thread.attention = self._thread.attention, None
        if attention is None or not attention.projections:
            raise RuntimeError(
                "a layer ran without its patched attention: call backward() inside the patch that "
                "the forward pass ran in, where checkpoints recompute its layers"
            )
        now = self._running
        call = ReductionCall(
            x,
            layer,
            self.num_layers,
            self.num_prefix,
            now.size,
            attention,
            scale,
            dict(now.carried),
        )
        reduction = self.method.plan(call)
        if call.carried:
            self._thread.current = replace(now, carried=call.carried)
        return reduction

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


def refuse_copy() -> NoReturn:
    """For the state of a patch: a copy of it would stay patched for good.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "a patched model cannot be copied or pickled: leave the patch first, then patch the copy"
    )
