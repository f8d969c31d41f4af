"""Choosing entries of a row: wrappers and fake kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import check_tensor
from .placements import WRITES, not_sharded, sharded
from .registration import (
    call,
    call_in_place,
    choose,
    not_differentiable,
    without_gradient,
    writes,
)
from .symbolic import larger

__all__ = [
    "compact",
    "eviction_slot",
    "gather_tokens",
    "inverse_transform_sample",
    "replace_token",
    "topk",
    "topk_with_counts",
]

_ops = torch.ops.tokred


def topk(
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    order: str = "score",
    row_k: Tensor | None = None,
    num_sinks: int = 0,
    num_locals: int = 0,
    must_keep: Tensor | None = None,
    top_p: float | None = None,
    min_k: int = 1,
    threshold: float | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """The k best entries of every row, exactly, with forced entries, budgets and padding.

    Entry j of a row takes part where j < length. It is forced where j < num_sinks,
    j >= length - num_locals or must_keep[j]; otherwise it is a candidate where its score is above
    -inf (NaN is not) and above the threshold, if there is one. The order is total: forced entries
    before candidates, then score descending (NaN as -inf, -0 equal to 0), then index ascending.
    The first min(k, row_k) entries are chosen, so forced entries count against k. What is left of
    the k places has index -1 and value -inf.

    With top_p only as many are chosen as it takes for their scores, which are probabilities then
    (clamped to [0, 2^20]; NaN counts as 0), to exceed top_p: the entry that crosses it is chosen,
    and at least min_k are. Rectified SpaAttn (arXiv:2511.19835) selects its blocks so.

    Args:
        scores: [..., N] float32, float16 or bfloat16 with at most three leading dimensions, the
            last dimension contiguous. The tables below may have 1 where scores have more.
        k: places of a row, at least 0; may exceed N.
        lengths: int32 [...], entries of each row that take part; N where None.
        order: "score": as above. "position": the chosen entries by ascending index.
        row_k: int32 [...], the budget of each row, at most k of which count.
        num_sinks, num_locals: first and last entries that are forced.
        must_keep: bool [..., N], True is forced.
        top_p: see above; min_k: the smallest number that it leaves.
        threshold: candidates are above it; not NaN.
        block_size: where positive, every segment of that many columns is a row of its own (the last
            may be shorter, and there is at least one): results are [..., ceil(N / block_size), k].
            Sinks and locals are those of the whole row.

    Returns:
        values float32 [..., k] and indices int32 [..., k], positions in the whole row. Not
        differentiable: they never require grad; gather the scores by the indices for a gradient.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: O(N), one or two reads of the row as a rule, then O(k log k) to put k in order.
    """
    values, indices, _ = choose(
        _ops.topk.default, scores, k, lengths, order, row_k, num_sinks, num_locals, must_keep,
        top_p, min_k, threshold, block_size,
    )  # fmt: skip
    return values, indices


def topk_with_counts(
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    order: str = "score",
    row_k: Tensor | None = None,
    num_sinks: int = 0,
    num_locals: int = 0,
    must_keep: Tensor | None = None,
    top_p: float | None = None,
    min_k: int = 1,
    threshold: float | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`topk`, and how many entries of every row were chosen.

    Args, errors, complexity: as in `topk`.

    Returns:
        values float32 [..., k], indices int32 [..., k] and counts int32 [...] (with a block_size
        [..., ceil(N / block_size)]): the chosen entries, after which the rows are padded.
    """
    return choose(
        _ops.topk.default, scores, k, lengths, order, row_k, num_sinks, num_locals, must_keep,
        top_p, min_k, threshold, block_size,
    )  # fmt: skip


def compact(
    selected: Tensor,
    threshold: float | None = None,
    capacity: int | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The positions at which a row is true, or above a threshold, ascending; of lists the entries.

    Args:
        selected: [..., N] bool, or float32, float16 or bfloat16 beside a threshold, at most three
            leading dimensions, the last dimension contiguous. int32 [..., N] are lists of indices
            with gaps, which are closed: entries from 0 on are written in their order in the place
            of positions.
        threshold: for float rows, and only for them: an entry is selected where it is greater.
        capacity: places of a row; N where None. What comes after the first `capacity` are left out.
        lengths: int32 [...], entries of each row that take part; N where None.

    Returns:
        indices int32 [..., capacity], -1 behind the last, and counts int32 [...], how many were
        written. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: O(N) a row.
    """
    return choose(_ops.compact.default, selected, threshold, capacity, lengths)


def gather_tokens(
    tensors: Sequence[Tensor], indices: Tensor, token_dims: Sequence[int] | None = None
) -> list[Tensor]:
    """The listed tokens of several tensors (hidden states, positions, keys, values) in one call.

    out[b, i] = tensor[b, indices[b, i]], and out[b, h, i] = tensor[b, h, indices[b, h, i]] for
    tensors with heads; zeros where an index lies outside [0, N).

    Args:
        tensors: up to 16, each [B, N, ...] (token dimension 1) or [B, H, N, ...] (2), of any dtype;
            what follows the token dimension contiguous.
        indices: int32 [B, K], one list for all heads, or [B, H, K].
        token_dims: 1 or 2 for each tensor; by default 2 for tensors of four or more dimensions.

    Returns:
        the tensors with K tokens, contiguous.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad; torch.gather is differentiable.

    Complexity: reads and writes K tokens of every tensor.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"tensors must be a sequence of tensors, got {type(tensors).__name__}")
    tensors = list(tensors)
    if token_dims is None:
        for i, tensor in enumerate(tensors):
            check_tensor(f"tensors[{i}]", tensor)
        token_dims = [1 if t.dim() < 4 else 2 for t in tensors]
    elif not isinstance(token_dims, Sequence):
        raise TypeError(f"token_dims must be a sequence, got {type(token_dims).__name__}")
    return call(_ops.gather_tokens.default, tensors, indices, list(token_dims))


def eviction_slot(
    position: Tensor,
    length: int,
    scores: Tensor | None = None,
    logits: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    start: Tensor | None = None,
    newest: Tensor | None = None,
    first: int = 0,
    recent: int = 0,
    shared: bool = False,
    largest: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The key of every head that makes room for the next token, in a cache of a fixed size.

    Keys are ranked by their scores, to which the attention that they receive from a query is added
    where its logits are given: the mean over the query heads of a key's head of
    exp(logits - lse + bias), the logits capped first. Without either the oldest key goes. The key
    of the smallest number goes; of equal ones the first, and NaN before all. Hidden keys, those
    whose bias is not above -inf, go first and receive nothing; a hidden query gives nothing.

    Args:
        position: int32 [B, H, N], the position of every key in the sequence, in any order.
        length: tokens of the sequence so far.
        scores: float32 [B, H, N].
        logits: float32 [B, Hq, N], scaled, of one query; Hq a multiple of H.
        lse: float32 [B, Hq] or [B, Hq, 1], of that query's attention; with logits, and only then.
        bias: float32 [B | 1, H | 1, N], added to the logits: -inf hides a key.
        start: int32 [B], the first token that is no padding; 0 where None.
        newest: int32 [B, H, 1], where the query's own token is; the last key where None.
        first, recent: the first tokens from start on, and the last of the sequence, stay.
        shared: the attention that keys receive is the mean over all heads (TOVA).
        largest: the key of the largest number goes instead.
        softcap: of the logits, softcap * tanh(logits / softcap).

    Returns:
        slot int32 [B, H, 1], the key that goes (-1 where N = 0), and total float32 [B, H, N],
        scores and received attention together, and 0 in slot; [B, H, 0] without logits.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.

    Complexity: O(Hq N), one read.
    Source: H2O (arXiv:2306.14048), TOVA (arXiv:2401.06104), StreamingLLM (arXiv:2309.17453).
    """
    return call(
        _ops.eviction_slot.default, position, length, scores, logits, lse, bias, start, newest,
        first, recent, shared, largest, softcap,
    )  # fmt: skip


def replace_token(
    slot: Tensor,
    keys: Tensor,
    new_keys: Tensor,
    values: Tensor,
    new_values: Tensor,
    position: Tensor | None = None,
    new_position: int = 0,
) -> None:
    """Writes a token's keys and values over those in one slot of every head, in place.

    keys[b, h, slot[b, h]] = new_keys[b, h, 0], the same of values, and
    position[b, h, slot[b, h]] = new_position. A slot outside [0, N) is skipped.

    Args:
        slot: int32 [B, H, 1].
        keys, values: [B, H, N, ...] of any dtype (codes and their parameters too), written; what
            follows the tokens contiguous.
        new_keys, new_values: [B, H, 1, ...] in the dtypes of keys and values.
        position: int32 [B, H, N], written. new_position: the new token's position, -1 to 2^31 - 1.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit, or that
            shares memory with what is written; nothing was written.
        ValueError: an input requires grad.

    Complexity: a token of every head is read and written.
    """
    written = [keys, values] if position is None else [keys, values, position]
    call_in_place(
        _ops.replace_token.default, written, slot, keys, new_keys, values, new_values, position,
        new_position,
    )  # fmt: skip


def inverse_transform_sample(
    scores: Tensor, num_samples: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Samples tokens at even steps of their cumulative score: Adaptive Token Sampling.

    The sampling step of ATS (arXiv:2111.15667): the unmasked scores, ascending, have cumulative
    sums, min-max normalised; sample i of n lies at y0 + i (1 - y0) / (n - 1), with y0 the smallest
    positive one, and picks the token whose sum is nearest (the first of two). A token picked again
    counts once, so fewer than num_samples may be left.

    Args:
        scores: [..., N] float32, float16 or bfloat16, at most three leading dimensions, the last
            contiguous; negative scores and NaN count as 0.
        num_samples: at least 0.
        mask: bool [..., N]; False is never picked.

    Returns:
        indices int32 [..., num_samples], the distinct picks by ascending score (lower index first),
        -1 behind them, and counts int32 [...]. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: a sort of every row, O(N log N), and a search for every sample.
    """
    return choose(_ops.inverse_transform_sample.default, scores, num_samples, mask)


def _check_rows(tensor: Tensor, name: str) -> None:
    torch._check(
        1 <= tensor.dim() <= 4,
        lambda: f"{name} must be [..., N] with at most 3 leading dimensions, got {tensor.dim()}-D",
    )


@torch.library.register_fake("tokred::topk")
def _topk_fake(
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    order: str = "score",
    row_k: Tensor | None = None,
    num_sinks: int = 0,
    num_locals: int = 0,
    must_keep: Tensor | None = None,
    top_p: float | None = None,
    min_k: int = 1,
    threshold: float | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(scores, "scores")
    torch._check(k >= 0, lambda: "k must be at least 0")
    rows = list(scores.shape[:-1])
    if block_size > 0:
        rows.append(larger(1, (scores.shape[-1] + block_size - 1) // block_size))
    values = scores.new_empty((*rows, k), dtype=torch.float32)
    indices = scores.new_empty((*rows, k), dtype=torch.int32)
    return values, indices, scores.new_empty(rows, dtype=torch.int32)


@torch.library.register_fake("tokred::compact")
def _compact_fake(
    selected: Tensor,
    threshold: float | None = None,
    capacity: int | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_rows(selected, "selected")
    rows = selected.shape[:-1]
    places = selected.shape[-1] if capacity is None else capacity
    torch._check(places >= 0, lambda: "capacity must be at least 0")
    indices = selected.new_empty((*rows, places), dtype=torch.int32)
    return indices, selected.new_empty(rows, dtype=torch.int32)


@torch.library.register_fake("tokred::gather_tokens")
def _gather_tokens_fake(
    tensors: list[Tensor], indices: Tensor, token_dims: list[int]
) -> list[Tensor]:
    torch._check(
        len(token_dims) == len(tensors), lambda: "token_dims must have one entry per tensor"
    )
    torch._check(indices.dim() in (2, 3), lambda: "indices must be [B, K] or [B, H, K]")
    count = indices.shape[-1]
    return [
        t.new_empty((*t.shape[:dim], count, *t.shape[dim + 1 :]))
        for t, dim in zip(tensors, token_dims, strict=True)
    ]


@torch.library.register_fake("tokred::eviction_slot")
def _eviction_slot_fake(
    position: Tensor,
    length: int,
    scores: Tensor | None = None,
    logits: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    start: Tensor | None = None,
    newest: Tensor | None = None,
    first: int = 0,
    recent: int = 0,
    shared: bool = False,
    largest: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    torch._check(position.dim() == 3, lambda: f"position must be [B, H, N], got {position.dim()}-D")
    torch._check((logits is None) == (lse is None), lambda: "logits and lse go together")
    batch, heads, keys = position.shape
    slot = position.new_empty((batch, heads, 1))
    total = (batch, heads, 0 if logits is None else keys)
    return slot, position.new_empty(total, dtype=torch.float32)


@torch.library.register_fake("tokred::replace_token")
def _replace_token_fake(
    slot: Tensor,
    keys: Tensor,
    new_keys: Tensor,
    values: Tensor,
    new_values: Tensor,
    position: Tensor | None = None,
    new_position: int = 0,
) -> None:
    torch._check(slot.dim() == 3, lambda: f"slot must be [B, H, 1], got {slot.dim()}-D")


@torch.library.register_fake("tokred::inverse_transform_sample")
def _inverse_transform_sample_fake(
    scores: Tensor, num_samples: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_rows(scores, "scores")
    torch._check(num_samples >= 0, lambda: "num_samples must be at least 0")
    rows = scores.shape[:-1]
    indices = scores.new_empty((*rows, num_samples), dtype=torch.int32)
    return indices, scores.new_empty(rows, dtype=torch.int32)


not_differentiable("topk", "compact", "inverse_transform_sample")
for _name in ("eviction_slot", "gather_tokens", "replace_token"):
    without_gradient(_name)
writes("replace_token")
sharded("topk", "scores *n, lengths *, row_k *, must_keep *n -> *k, *k, *")
sharded("compact", "selected *n, lengths * -> *k, *")
not_sharded(
    "gather_tokens",
    "it takes and returns lists, for which torch has no placements: call "
    "gather_tokens on local tensors, inside torch.distributed.tensor.experimental.local_map",
)
# Over the batch alone, as a key may receive attention from all heads.
sharded(
    "eviction_slot",
    "position bgn, scores bgn, logits bqn, lse bq, bias bgn, start b, newest bgi -> bgi, bgn",
)
not_sharded("replace_token", WRITES)
sharded("inverse_transform_sample", "scores *n, mask *n -> *k, *")
