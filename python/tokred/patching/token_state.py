"""The state of one forward pass through layers that merge tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch.nn.utils.rnn import pad_sequence

import tokred

from .padding import Padding
from .protocols import TokenReducer
from .recomputation import PerThread, StorageTable, backward_task
from .reduction_call import LayerAttention, Reduced, Reduction, ReductionCall, as_token_map
from .settings import Settings


@dataclass(frozen=True)
class Pass:
    """The state of a pass of N0 tokens before one of its layers; only replaced, never changed.

    layer: the next to run.
    task: the id of the backward pass that recomputes the layers, -1 for none.
    counts: the tokens before the first layer and after each reduction.
    ones: [B, N0], the sizes before any merge.
    size: f32 [B, N], how many tokens each stands for; None as long as nothing has merged.
    token_map: i32 [B, N0], the token that each original one went to; None as long as all are left.
    carried: what the method's layers have left for later ones, see ReductionCall.
    first: i64 [B, N], the first original token of each, where the state needs it.
    mask: bool [B, N0], False for padding; None where there is none.
    padding: which of the tokens that are left are padding, once something has merged.
    carried_rows: `carried` of each row of a padded batch.
    """

    layer: int
    task: int
    counts: tuple[int, ...]
    ones: torch.Tensor
    size: torch.Tensor | None = None
    token_map: torch.Tensor | None = None
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    first: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    padding: Padding | None = None
    carried_rows: tuple[dict[str, torch.Tensor], ...] = ()


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

    follow_positions: layers read `first`, as their tokens have positions that go with them.
    """

    def __init__(
        self,
        method: TokenReducer,
        num_layers: int,
        num_prefix: int,
        settings: Settings,
        follow_positions: bool = False,
    ) -> None:
        self.method = method
        self.num_layers = num_layers
        self.layers = frozenset(method.layers(num_layers))
        self.num_prefix = num_prefix
        self.prop_attn = settings.prop_attn
        self.trace_source = settings.trace_source
        self.restores = bool(settings.restore_tokens)
        self.follows_positions = follow_positions
        self._needs_first = self.restores or follow_positions
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
        if shown.size is not None:
            return shown.size
        ones = shown.ones[:, : shown.counts[-1]]
        return ones if shown.mask is None else shown.mask.to(ones.dtype)

    @property
    def token_map(self) -> torch.Tensor:
        """i32 [B, N0]: the final token that each original token went to. Needs trace_source."""
        shown = self._shown()
        if not (self.trace_source or self.restores):
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

    def enter(self, x: torch.Tensor, layer: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Before a layer runs on x [B, N, C]: makes the pass it belongs to the thread's own.

        Args:
            x: with restore_tokens all N0 original tokens.
            mask: bool [B, N], True is no padding; read in layer 0.

        Returns:
            the tokens that the layer shall run on.

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
            self._thread.current = Pass(0, task, (x.shape[1],), ones, mask=mask)
            return x
        found = self._passes.find(x, layer)
        if found is None and task == -1:
            found = self._thread.current
        end = 0 if self.restores else -1
        if found is None or found.layer != layer or found.counts[end] != x.shape[1]:
            raise RuntimeError(
                f"layer {layer} was run out of order, so the sizes of its tokens are not known: "
                "run the patched layers one after the other, and checkpoint whole layers or the "
                "whole model, with the tokens as their first argument"
            )
        self._thread.current = replace(found, task=task)
        self._passes.add(x, layer, self._thread.current)
        if self.restores and found.first is not None:
            return x.gather(1, found.first[..., None].expand(-1, -1, x.shape[2]))
        return x

    def leave(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """After a layer has run on its tokens, x [B, N, C]: what it shall return."""
        done = replace(self._running, layer=layer + 1)
        if self.restores and done.token_map is not None:
            x = tokred.unmerge(x, done.token_map)
        self._thread.current = done
        self._passes.add(x, layer + 1, done)
        if layer + 1 == self.num_layers and backward_task() == -1:
            self._thread.latest = self._latest = done
        return x

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

    def hides(self) -> torch.Tensor | None:
        """`key_bias` with prop_attn=False: 0, and -inf where a row has fewer tokens than others;
        None where all have as many, or nothing has merged."""
        now = self._thread.current
        if now is None or now.padding is None or now.size is None:
            return None
        return now.size.clamp(max=1).log().unsqueeze(1)

    def first(self) -> torch.Tensor | None:
        """i64 [B, N]: the first original token of each that the running layer sees; None as long as
        these are all tokens. Of a row with fewer than others, any one."""
        now = self._thread.current
        return None if now is None else now.first

    @property
    def counts_of_pass(self) -> tuple[int, ...]:
        """`counts` of the pass that runs in the calling thread."""
        return self._running.counts

    def has_reduced(self) -> bool:
        """Whether the running layer sees other tokens than the first one."""
        now = self._thread.current
        return now is not None and len(now.counts) > 1

    def final_weight(self, x: torch.Tensor) -> torch.Tensor | None:
        """[B, N]: what attention to what the last layer returned adds to its logits, the log of the
        sizes, or with prop_attn=False -inf behind rows with fewer tokens; see final_size."""
        size = self.final_size(x)
        if size is None or self.prop_attn:
            return None if size is None else size.log()
        return None if self._running.padding is None else size.clamp(max=1).log()

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
        attention, self._thread.attention = self._thread.attention, None
        if attention is None or not attention.projections:
            raise RuntimeError(
                "a layer ran without its patched attention: call backward() inside the patch that "
                "the forward pass ran in, where checkpoints recompute its layers"
            )
        now = self._running
        if now.mask is not None and x.shape[0]:
            return self._reduce_rows(x, layer, scale, attention)
        call = self._call(x, layer, now.size, attention, scale, now.carried)
        reduced = self._reduced(call)
        now = replace(now, carried=call.carried)
        if reduced is not None:
            x, size, token_map = reduced
            now = self._after(now, x.shape[1], size, token_map)
        self._thread.current = now
        return x

    def _reduce_rows(
        self, x: torch.Tensor, layer: int, scale: float, attention: LayerAttention
    ) -> torch.Tensor:
        """`reduce` of a padded batch, each row as if it were alone."""
        now = self._running
        assert now.mask is not None
        padding = Padding.of(now.mask) if now.padding is None else now.padding
        batch, tokens, _ = x.shape
        carried = now.carried_rows or ({},) * batch
        calls, rows, changes = [], [], False
        for row, length in enumerate(padding.lengths):
            size = None if now.size is None else padding.row(now.size, row, 1)
            call = self._call(
                padding.row(x, row, 1), layer, size, padding.attention(attention, row), scale,
                carried[row],
            )  # fmt: skip
            reduced = self._reduced(call) if length > self.num_prefix + 1 else None
            changes = changes or reduced is not None
            calls.append(call)
            rows.append(reduced)
        carried = tuple(call.carried for call in calls)
        if not changes:
            self._thread.current = replace(now, padding=now.padding, carried_rows=carried)
            return x
        whole = [
            self._whole(call) if reduced is None else reduced
            for call, reduced in zip(calls, rows, strict=True)
        ]
        sizes = [
            now.ones[:1, :1].expand(1, y.shape[1]) if size is None else size for y, size, _ in whole
        ]
        token_map = padding.token_map([token_map for _, _, token_map in whole], tokens)
        x = pad_sequence([y[0] for y, _, _ in whole], batch_first=True)
        size = pad_sequence([size[0] for size in sizes], batch_first=True)
        lengths = tuple(y.shape[1] for y, _, _ in whole)
        now = replace(now, padding=Padding(lengths), carried_rows=carried)
        self._thread.current = self._after(now, x.shape[1], size, token_map)
        return x

    def _call(
        self,
        x: torch.Tensor,
        layer: int,
        size: torch.Tensor | None,
        attention: LayerAttention,
        scale: float,
        carried: dict[str, torch.Tensor],
    ) -> ReductionCall:
        return ReductionCall(
            x, layer, self.num_layers, self.num_prefix, size, attention, scale, dict(carried)
        )

    def _reduced(
        self, call: ReductionCall
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None:
        """The tokens as the method plans it, their sizes (None: all 1) and the token map."""
        reduction: Reduction = self.method.plan(call)
        if reduction is None:
            return None
        if isinstance(reduction, Reduced):
            return reduction.tokens, reduction.size, reduction.token_map
        token_map, num_out = as_token_map(reduction, call.tokens.shape[1])
        # SigLIP's tokens come channel-first out of the patch convolution; the ops want rows.
        x = call.tokens.contiguous()
        if isinstance(reduction, torch.Tensor) and call.size is None:
            # Each stands for itself still: later layers attend as the model itself does.
            return tokred.unmerge(x, reduction), None, token_map
        x, size = tokred.merge(x, token_map, num_out, call.size)
        return x, size, token_map

    def _whole(self, call: ReductionCall) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """As `_reduced`, of a row that keeps all its tokens."""
        x = call.tokens
        slots = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        return x, call.size, slots[None]

    def _after(
        self, now: Pass, num_out: int, size: torch.Tensor | None, token_map: torch.Tensor
    ) -> Pass:
        """The pass after a reduction to num_out tokens."""
        source, first = None, None
        if self.trace_source or self._needs_first:
            source = (
                token_map if now.token_map is None else tokred.compose(token_map, now.token_map)
            )
        if self._needs_first:
            assert source is not None
            first = _first_members(source, num_out)
        return replace(now, counts=(*now.counts, num_out), size=size, token_map=source, first=first)

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


def _first_members(token_map: torch.Tensor, num_out: int) -> torch.Tensor:
    """i64 [B, num_out]: the first token of each slot of an i32 map [B, N]; of an empty one, any."""
    batch, tokens = token_map.shape
    number = torch.arange(tokens, device=token_map.device).expand(batch, -1)
    slots = torch.where(token_map < 0, num_out, token_map).long()
    first = number.new_full((batch, num_out + 1), tokens - 1)
    return first.scatter_reduce(1, slots, number, "amin")[:, :num_out]
