"""Attention of a batch of vLLM's requests to packed pages: its tables as calls of tokred's ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tokred
from tokred.ops.kv_pack import PackedKV, Records
from tokred.selection import choose

from .options import Options


@dataclass(frozen=True)
class Decoding:
    """The requests with older tokens and one new one, R of them.

    tokens: int64 [R], their rows in the step. slots: int32 [R, longest], of their tokens in the
    pool. lengths: int32 [R], tokens with the new one. longest: their maximum.
    middle: bool [R, longest], the tokens that are voted on; None where all tokens are read.
    """

    tokens: Tensor
    slots: Tensor
    lengths: Tensor
    longest: int
    middle: Tensor | None


@dataclass(frozen=True)
class Prompt:
    """A request with rows start .. stop - 1 of the step, behind `older` tokens in the pages.

    slots: int32 [1, older], or None where there are no older tokens.
    """

    start: int
    stop: int
    older: int
    slots: Tensor | None


@dataclass(frozen=True)
class Batch:
    """One step's requests; the same for every layer."""

    decoding: Decoding | None
    prompts: tuple[Prompt, ...]


def sort_requests(
    starts: Sequence[int],
    lengths: Sequence[int],
    block_table: Tensor,
    block_size: int,
    options: Options,
) -> Batch:
    """Sorts requests by what they read.

    Args:
        starts: R + 1 rows of the step, where each request's new tokens begin and the last one's
            end; requests without new tokens are padding.
        lengths: tokens of each of R requests, the new ones included.
        block_table: int32 [R, blocks], pages of block_size tokens.
    """
    decoding: list[int] = []
    prompts = []
    for row, length in enumerate(lengths):
        start, stop = starts[row], starts[row + 1]
        older = length - (stop - start)
        if stop - start == 1 and older > 0:
            decoding.append(row)
        elif stop > start:
            slots = _slots(block_table[row : row + 1], older, block_size) if older else None
            prompts.append(Prompt(start, stop, older, slots))
    if not decoding:
        return Batch(None, tuple(prompts))
    held = torch.tensor([lengths[row] for row in decoding], dtype=torch.int32)
    longest = int(held.max())
    rows = torch.tensor(decoding)
    slots = _slots(block_table[rows], longest, block_size)
    middle = None
    if options.top_k is not None and options.n_init + options.top_k + options.n_local < longest:
        number = torch.arange(longest)
        middle = (number >= options.n_init) & (number < held[:, None] - options.n_local)
    tokens = torch.tensor([starts[row] for row in decoding])
    return Batch(Decoding(tokens, slots, held, longest, middle), tuple(prompts))


def _slots(blocks: Tensor, tokens: int, block_size: int) -> Tensor:
    """int32 [R, tokens]: where the first tokens of requests are, by int32 [R, blocks]."""
    blocks = blocks[:, : -(-tokens // block_size), None]
    inside = torch.arange(block_size, dtype=torch.int32)
    return (blocks * block_size + inside).flatten(1)[:, :tokens].contiguous()


def pool(cache: Tensor, records: Records) -> tuple[PackedKV, PackedKV]:
    """The keys and values [1, Hkv, pages * N, D] of a layer's pages, views.

    Args:
        cache: uint8 [pages, Hkv, N, bytes], as vLLM allocates it.

    Raises:
        ValueError: there is something between the pages, so that slots are not one step apart.
    """
    pages, heads, tokens, nbytes = cache.shape
    try:
        rows = cache.transpose(0, 1).view(1, heads, pages * tokens, nbytes)
    except RuntimeError:
        raise ValueError(
            f"pages must lie without gaps, got {pages} pages of {tokens} tokens with strides "
            f"{cache.stride()}: layers of several kinds share this cache, unset TOKRED_VLLM_BITS"
        ) from None
    return records.views(rows)


def append(k: Tensor, v: Tensor, pages: tuple[PackedKV, PackedKV], slots: Tensor) -> None:
    """Packs new tokens [T, Hkv, D] into slots int32 [T]; a slot below 0 takes none."""
    for x, packed in zip((k, v), pages, strict=True):
        tokred.kv_append(x[:, :, None], packed, 0, slots=slots[:, None])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: tuple[PackedKV, PackedKV],
    batch: Batch,
    options: Options,
    out: Tensor,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Causal attention of one layer, after `append`.

    A request that decodes reads its pages, the new token included. Several new tokens of a request
    attend to one another in full precision, and to older ones in its pages, as in a PackedCache.

    Args:
        q, out: [T, Hq, D], of which out is written where requests have tokens. k, v: [T, Hkv, D].
    """
    for prompt in batch.prompts:
        rows = slice(prompt.start, prompt.stop)
        queries, keys, values = (x[None, rows].transpose(1, 2) for x in (q, k, v))
        states = tokred.biased_attention(
            queries, keys, values, causal=True, scale=scale, softcap=softcap
        )
        if prompt.slots is not None:
            older = tokred.packed_attention(
                queries,
                *pages,
                scale=scale,
                length=prompt.older,
                slots=prompt.slots,
                softcap=softcap,
            )
            states = tokred.combine_states(*older, *states)
        out[rows] = states[0][0].transpose(0, 1)
    if (decoding := batch.decoding) is None:
        return
    queries = q[decoding.tokens, :, None]
    where = {"length": decoding.longest, "lengths": decoding.lengths, "slots": decoding.slots}
    indices = _chosen(queries, pages[0], decoding, options)
    found, _ = tokred.packed_attention(
        queries, *pages, scale=scale, indices=indices, softcap=softcap, **where
    )
    out[decoding.tokens] = found[:, :, 0]


def _chosen(q: Tensor, keys: PackedKV, decoding: Decoding, options: Options) -> Tensor | None:
    """int32 [R, 1, 1, n_init + top_k + n_local]: the tokens read, by the votes of all heads."""
    if decoding.middle is None or options.top_k is None:
        return None
    votes = tokred.packed_qk_score(
        q,
        keys,
        reduce="softmax_vote",
        scale=1.0,
        length=decoding.longest,
        lengths=decoding.lengths,
        mask=decoding.middle,
        slots=decoding.slots,
    )
    indices, _ = choose(
        votes, options.top_k, options.n_init, options.n_local, lengths=decoding.lengths[:, None]
    )
    return indices[:, :, None]
