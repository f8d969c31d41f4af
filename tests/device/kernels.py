"""One small call for every CUDA kernel: what the sanitizers watch, and the profiler looks for.

Those of newer ops lie beside it in kernels_<op>.py: `CALLS`, as here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from case import namespace
from launches import Call, draw, whole
from torch import Tensor

import tokred


def _qkv(
    device: str, queries: int, keys: int = 70, dim: int = 64, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    sizes = ((4, queries), (2, keys), (2, keys))
    return [draw((2, heads, count, dim), device, dtype) for heads, count in sizes]


def _attention_gradients(device: str, dtype: torch.dtype) -> Any:
    inputs = _qkv(device, 40, dtype=dtype)
    out, lse = tokred.biased_attention(*inputs)
    backward = namespace().biased_attention_backward.default
    return backward(out, lse, *inputs, None, out, lse, False, None, None, None, None)[:3]


def _mask_gradients(device: str, shape: tuple[int, ...]) -> Any:
    inputs, mask = _qkv(device, 40), draw(shape, device)
    out, lse = tokred.biased_attention(*inputs, mask=mask)
    backward = namespace().biased_attention_mask_backward.default
    return backward(out, lse, *inputs, None, out, lse, False, None, mask, None, None)


def _hidden(device: str, queries: int) -> list[Tensor]:
    """Queries, keys and values, the last of which no query but the last one sees."""
    q, k, v = _qkv(device, queries)
    v[:, :, -1] = torch.inf
    return [q, k, v]


def _hidden_gradients(device: str) -> Any:
    inputs = _hidden(device, 40)
    out, lse = tokred.biased_attention(*inputs, causal=True)
    out = out.nan_to_num(0, 0, 0)
    backward = namespace().biased_attention_backward.default
    return backward(out, lse, *inputs, None, out, lse, True, None, None, None, None)[:1]


def _list_gradients(device: str) -> Any:
    inputs, lists = _qkv(device, 10), _list_of(device, 10)
    out, lse = tokred.sparse_attention(*inputs, lists)
    backward = namespace().sparse_attention_backward.default
    return backward(out, lse, *inputs, lists, out, lse, None, None, False, None, 1)[:3]


def _merge_gradients(device: str, mode: str) -> Any:
    x, token_map = draw((2, 40, 24), device), whole(12, (2, 40), device) - 1
    y, size = tokred.merge(x, token_map, 10, mode=mode)
    return namespace().merge_backward.default(y, size, x, token_map, None, None, mode)[:1]


def _packed(device: str, axis: str, rotate: bool = False) -> list[tokred.PackedKV]:
    return [
        tokred.kv_pack(draw((2, 2, 64, 64), device) + i, 4, 32, axis, rotate=rotate)
        for i in range(2)
    ]


def _appended(device: str) -> list[Tensor]:
    cache = tokred.PackFormat(4, 16, "token").empty(2, 2, 64, 32, device)
    window = torch.zeros(2, 2, 32, 32, device=device)
    for step, count in enumerate((40, 1, 1)):
        x = draw((2, 2, count, 32), device) + step
        tokred.kv_append(x, cache, (0, 40, 41)[step], window)
    return [cache.codes.float(), cache.params, window]


def _latents(device: str) -> Any:
    rows = tokred.kv_pack(draw((2, 1, 200, 576), device), 4, 64)
    q = draw((2, 16, 1, 576), device, torch.bfloat16)
    return tokred.packed_attention(q, rows, rows)


def _appended_latents(device: str) -> list[Tensor]:
    packed = tokred.PackFormat(4, 16, "token").empty(2, 1, 32, 576, device)
    window = torch.zeros(2, 1, 16, 576, device=device)
    tokred.kv_append(draw((2, 1, 40, 576), device), packed, 0, window)
    return [packed.codes, packed.params, window, tokred.kv_unpack(packed)]


def _attention(name: str, queries: int, kernels: tuple[str, ...], **how: Any) -> Call:
    return Call(name, kernels, lambda d: tokred.biased_attention(*_qkv(d, queries, **how)))


def _list_of(device: str, queries: int) -> Tensor:
    return whole(75, (2, 2, queries, 24), device)


CALLS = (
    Call("topk, a warp a row", ("warp_kernel",), lambda d: tokred.topk(draw((3, 200), d), 17)),
    Call("topk, a block a row", ("block_kernel",), lambda d: tokred.topk(draw((3, 3000), d), 300)),
    Call("topk, a row split", ("collect_parts_kernel", "finish_parts_kernel"),
         lambda d: tokred.topk(draw((1, 20000), d), 50)),
    Call("topk, a row sorted", ("sort_chunks_kernel", "merge_runs_kernel", "write_sorted_kernel"),
         lambda d: tokred.topk(draw((1, 9000), d), 5000)),
    Call("compact", ("compact_kernel",), lambda d: tokred.compact(draw((3, 5000), d) > 0)),
    Call("compact of lists", ("compact_kernel",), lambda d: tokred.compact(whole(45, (2, 20), d))),
    Call("compact by threshold", ("compact_kernel",),
         lambda d: tokred.compact(draw((3, 300), d), 0.5)),
    Call("gather_tokens", ("gather_kernel",),
         lambda d: tokred.gather_tokens([draw((2, 40, 7), d), draw((2, 3, 40, 8), d)],
                                        whole(45, (2, 20), d))),
    Call("inverse_transform_sample", ("sample_kernel",),
         lambda d: tokred.inverse_transform_sample(draw((3, 300), d).abs(), 40)),
    Call("match, fp32", ("match_kernel",),
         lambda d: tokred.match(draw((2, 70, 40), d), draw((2, 90, 40), d))),
    Call("match, bf16", ("match_kernel",),
         lambda d: tokred.match(*(draw((2, n, 128), d, torch.bfloat16) for n in (70, 90)))),
    Call("match, bf16, few channels", ("column_terms_kernel", "match_short_kernel"),
         lambda d: tokred.match(*(draw((2, n, 64), d, torch.bfloat16) for n in (70, 90)))),
    Call("bipartite_soft_matching", ("small_item_kernel",),
         lambda d: tokred.bipartite_soft_matching(draw((2, 90, 40), d), 20)),
    Call("bipartite_soft_matching, many tokens", ("token_map_kernel",),
         lambda d: tokred.bipartite_soft_matching(draw((1, 2300, 16), d), 500)),
    Call("threshold_matching", ("small_item_kernel",),
         lambda d: tokred.threshold_matching(draw((2, 90, 40), d), 0.3)),
    *(Call(f"merge, {mode}", ("merge_kernel",),
           lambda d, mode=mode: tokred.merge(draw((2, 70, 24), d), whole(22, (2, 70), d) - 1, 20,
                                             mode=mode))
      for mode in ("mean", "amax", "maxnorm", "prune", "halving")),
    Call("merge, many tokens", ("list_members_kernel", "merge_kernel"),
         lambda d: tokred.merge(draw((1, 1500, 8), d), whole(700, (1, 1500), d), 700)),
    *(Call(f"merge_backward, {mode}", ("merge_backward_kernel", "zero_skipped_kernel"),
           lambda d, mode=mode: _merge_gradients(d, mode))
      for mode in ("mean", "amax", "maxnorm", "halving")),
    Call("unmerge", ("unmerge_kernel",),
         lambda d: tokred.unmerge(draw((2, 20, 24), d), whole(22, (2, 70), d) - 1)),
    Call("compose", ("compose_kernel",),
         lambda d: tokred.compose(whole(9, (2, 20), d), whole(22, (2, 70), d) - 1)),
    _attention("prefill, bf16", 90, ("biased_attention_kernel",)),
    _attention("prefill, fp32", 90, ("biased_attention_kernel",), dtype=torch.float32),
    _attention("prefill, 128 channels", 90, ("biased_attention_kernel",), dim=128),
    _attention("decode, bf16", 1, ("decode_kernel", "combine_splits_kernel"), keys=700),
    _attention("decode, fp32", 1, ("decode_kernel",), keys=90, dtype=torch.float32),
    Call("prefill by wgmma", ("wgmma_attention_kernel",),
         lambda d: tokred.biased_attention(*_qkv(d, 150, 290, 128), causal=True), wgmma=True),
    Call("block_sparse_attention", ("biased_attention_kernel",),
         lambda d: tokred.block_sparse_attention(*_qkv(d, 90), whole(2, (2, 4, 6, 5), d).bool(),
                                                 16, 16)),
    Call("block_sparse_attention by wgmma", ("wgmma_attention_kernel",),
         lambda d: tokred.block_sparse_attention(*_qkv(d, 150, 290),
                                                 whole(2, (2, 4, 3, 5), d).bool(), 64, 64),
         wgmma=True),
    Call("sparse_attention, decode", ("decode_kernel",),
         lambda d: tokred.sparse_attention(*_qkv(d, 1), _list_of(d, 1))),
    Call("sparse_attention, lists", ("list_attention_kernel",),
         lambda d: tokred.sparse_attention(*_qkv(d, 90), _list_of(d, 2), block_q=64)),
    Call("attention backward, bf16",
         ("attention_delta_kernel", "attention_grad_query_kernel", "attention_grad_key_kernel"),
         lambda d: _attention_gradients(d, torch.bfloat16)),
    Call("attention backward, fp32", ("attention_grad_query_kernel", "attention_grad_key_kernel"),
         lambda d: _attention_gradients(d, torch.float32)),
    Call("the gradient of a mask", ("attention_delta_kernel", "attention_grad_mask_kernel"),
         lambda d: _mask_gradients(d, (1, 4, 40, 70))),
    Call("the gradient of a mask, one row", ("attention_grad_mask_kernel",),
         lambda d: _mask_gradients(d, (2, 1, 1, 70))),
    Call("a hidden infinity", ("recompute_rows_kernel",),
         lambda d: tokred.biased_attention(*_hidden(d, 90), causal=True)[0][:, :, :-1]),
    Call("a hidden infinity, backward",
         ("recompute_grad_query_kernel", "recompute_grad_key_kernel"),
         lambda d: [g[:, :, :-1] for g in _hidden_gradients(d)]),
    Call("list backward", ("list_grad_query_kernel", "list_grad_key_kernel"),
         _list_gradients),
    Call("combine_states", ("combine_states_kernel",),
         lambda d: tokred.combine_states(*(draw((2, 3, 20, *tail), d) + i for i in range(2)
                                           for tail in ((32,), ())))),
    Call("qk_score", ("qk_score_kernel",), lambda d: tokred.qk_score(*_qkv(d, 1)[:2])),
    Call("qk_score of several queries, voted",
         ("mean_query_kernel", "qk_score_kernel", "softmax_rows_kernel", "reduce_heads_kernel"),
         lambda d: tokred.qk_score(*_qkv(d, 5)[:2], reduce="softmax_vote")),
    Call("block_pool", ("block_pool_kernel",),
         lambda d: tokred.block_pool(draw((2, 2, 90, 32), d), 16, "mean_deviation")),
    *(Call(f"block_score, {rule}", ("block_score_kernel",),
           lambda d, rule=rule: tokred.block_score(
               draw((2, 4, 3, 2, 32) if rule == "deviation" else (2, 4, 3, 32), d),
               draw((2, 2, 9, 1 if rule == "dot" else 2, 32), d).sort(3).values.contiguous(),
               rule=rule, reduce="group_mean")) for rule in ("dot", "bounds", "deviation")),
    Call("attention_rows", ("attention_rows_kernel", "softmax_in_place_kernel"),
         lambda d: tokred.attention_rows(*_qkv(d, 5)[:2])),
    Call("attention_columns", ("attention_columns_kernel",),
         lambda d: tokred.attention_columns(*_qkv(d, 40)[:2])),
    Call("pagerank", ("attention_columns_kernel",),
         lambda d: tokred.pagerank(*_qkv(d, 70)[:2], iterations=2)),
    Call("similarity_stats", ("similarity_stats_kernel",),
         lambda d: tokred.similarity_stats(draw((2, 70, 40), d), energy="elu")),
    Call("transition_stats", ("transition_kernel",),
         lambda d: tokred.transition_stats(draw((2, 70, 40), d), draw((2, 70, 41), d)[..., :40])),
    Call("kv_pack", ("pack_runs_kernel",),
         lambda d: [p.codes.float() for p in _packed(d, "channel")]),
    Call("kv_unpack", ("pack_kernel", "unpack_kernel"),
         lambda d: [tokred.kv_unpack(p) for p in _packed(d, "token", rotate=True)]),
    Call("kv_append", ("pack_kernel", "write_window_kernel"), _appended),
    Call("packed_attention", ("packed_decode_kernel",),
         lambda d: tokred.packed_attention(draw((2, 4, 1, 64), d, torch.bfloat16),
                                           *_packed(d, "token"))),
    Call("packed_attention on codes", ("code_decode_kernel",),
         lambda d: tokred.packed_attention(draw((2, 4, 1, 64), d, torch.bfloat16),
                                           *_packed(d, "channel"))),
    Call("packed_attention on codes, rotated", ("code_decode_kernel",),
         lambda d: tokred.packed_attention(draw((2, 4, 1, 64), d, torch.bfloat16),
                                           *_packed(d, "channel", True))),
    Call("packed_attention, rotated", ("packed_decode_kernel", "rotate_out_kernel"),
         lambda d: tokred.packed_attention(draw((2, 4, 1, 64), d), *_packed(d, "channel", True))),
    Call("packed_attention of latents", ("pack_wide_kernel", "wide_decode_kernel"), _latents),
    Call("kv_append and kv_unpack of latents",
         ("pack_wide_kernel", "write_wide_window_kernel", "unpack_wide_kernel"), _appended_latents),
    Call("packed_qk_score on codes", ("code_score_kernel",),
         lambda d: tokred.packed_qk_score(draw((2, 4, 1, 64), d, torch.bfloat16),
                                          _packed(d, "channel")[0])),
    Call("packed_qk_score", ("rotate_queries_kernel", "packed_score_kernel"),
         lambda d: tokred.packed_qk_score(draw((2, 4, 1, 64), d), _packed(d, "channel", True)[0])),
)  # fmt: skip
for _path in sorted(Path(__file__).parent.glob("kernels_*.py")):
    CALLS += importlib.import_module(_path.stem).CALLS


@contextmanager
def wgmma(on: bool) -> Iterator[None]:
    """Whether prefill on Hopper may take the wgmma kernel, which reads this at every call."""
    before = os.environ.pop("TOKRED_WGMMA", None)
    if on:
        os.environ["TOKRED_WGMMA"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TOKRED_WGMMA", None)
        if before is not None:
            os.environ["TOKRED_WGMMA"] = before
