"""One small valid call of every op, from sizes that tests vary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INT = torch.int32


def op_names() -> list[str]:
    """Every op of the library, as the dispatcher knows them."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("tokred::") for name in names if name.startswith("tokred::"))


@dataclass(frozen=True)
class Sizes:
    """Batch, heads of queries and keys, queries, keys, head sizes, slots, channels, list length."""

    b: int = 2
    hq: int = 4
    hk: int = 2
    q: int = 3
    n: int = 8
    d: int = 16
    dv: int = 16
    m: int = 4
    c: int = 8
    k: int = 2


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _whole(high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, max(high, 1), shape, generator=generator, dtype=INT)


def _qkv(s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    q = _random(s.b, s.hq, s.q, s.d)
    return q, _random(s.b, s.hk, s.n, s.d), _random(s.b, s.hk, s.n, s.dv)


def _attended(s: Sizes) -> tuple[Tensor, Tensor]:
    return _random(s.b, s.hq, s.q, s.dv), _random(s.b, s.hq, s.q)


FORMAT = (4, 16, "channel", "asymmetric", False)


def _packed(s: Sizes, dim: int) -> tuple[Tensor, Tensor]:
    codes = _whole(256, s.b, s.hk, s.n, dim // 2).to(torch.uint8)
    return codes, _random(s.b, s.hk, s.n, dim // 16 * 2).half()


def _blocks(s: Sizes) -> Tensor:
    return torch.ones(s.b, s.hq, -(-s.q // 2), -(-s.n // 4), dtype=torch.bool)


def _lists(s: Sizes) -> Tensor:
    return _whole(s.n, s.b, s.hk, s.q, s.k)


def _merge(s: Sizes) -> tuple[Tensor, Tensor]:
    return _random(s.b, s.n, s.c), _whole(s.m, s.b, s.n)


def _sizes(s: Sizes) -> tuple[Tensor, Tensor]:
    return _random(s.b, s.n).abs(), _random(s.b, s.n).abs()


CALLS: dict[str, Callable[[Sizes], tuple]] = {
    "topk": lambda s: (
        _random(s.b, s.n), s.k, _whole(s.n, s.b), "position", _whole(s.k, s.b), 1, 1,
        _whole(2, s.b, s.n).bool(), 0.5, 1, 0.0, 0,
    ),
    "compact": lambda s: (_random(s.b, s.n), 0.0, s.k, _whole(s.n, s.b)),
    "gather_tokens": lambda s: (
        [_random(s.b, s.n, s.c), _random(s.b, s.hk, s.n, s.d)], _whole(s.n, s.b, s.k), [1, 2],
    ),
    "inverse_transform_sample": lambda s: (
        _random(s.b, s.n).abs(), s.k, torch.ones(s.b, s.n, dtype=torch.bool),
    ),
    "qk_score": lambda s: (
        *_qkv(s)[:2], "head_mean", None, 0.5, _whole(s.n, s.b),
        torch.ones(s.b, s.n, dtype=torch.bool), None,
    ),
    "block_pool": lambda s: (
        _random(s.b, s.hk, s.n, s.d), 3, "mean_deviation", None, _whole(s.n, s.b),
        torch.ones(s.b, s.n, dtype=torch.bool),
    ),
    "block_score": lambda s: (
        _random(s.b, s.hq, s.q, s.d), _random(s.b, s.hk, s.m, 1, s.d), _whole(9, s.b, s.m), "dot",
        "group_max", 0.5,
    ),
    "attention_rows": lambda s: (
        *_qkv(s)[:2], True, 0, s.n, True, 0.5, torch.ones(s.b, 1, s.q, s.n, dtype=torch.bool),
    ),
    "attention_columns": lambda s: (
        *_qkv(s)[:2], _attended(s)[1], "variance", _random(s.b, s.hq, s.q), True, 0.5, None,
    ),
    "pagerank": lambda s: (
        _random(s.b, s.hq, s.n, s.d), _random(s.b, s.hk, s.n, s.d), _random(s.b, s.hq, s.n), 2, 0.1,
        _random(s.b, s.hq, s.n), False, None, None,
    ),
    "similarity_stats": lambda s: (
        _random(s.b, s.n, s.c), _random(s.b, s.m, s.c), "cosine", 0.1, "elu", 0.2, True, 0,
        torch.ones(s.b, s.n, dtype=torch.bool), torch.ones(s.b, s.m, dtype=torch.bool),
    ),
    "transition_stats": lambda s: (_random(s.b, s.n, s.c), _random(s.b, s.n, s.c) + 1),
    "match": lambda s: (
        _random(s.b, s.n, s.c), _random(s.b, s.m, s.c), torch.ones(s.b, s.n, dtype=torch.bool),
        torch.ones(s.b, s.m, dtype=torch.bool), _random(s.b, s.n).abs(), _random(s.b, s.m).abs(),
        "dot", 2,
    ),
    "bipartite_soft_matching": lambda s: (
        _random(s.b, s.n, s.c), s.k, 1, torch.ones(s.b, s.n, dtype=torch.bool), "position", None,
        None,
    ),
    "threshold_matching": lambda s: (
        _random(s.b, s.n, s.c), 0.1, 1, torch.ones(s.b, s.n, dtype=torch.bool), "tome", None, None,
    ),
    "merge": lambda s: (*_merge(s), s.m, *_sizes(s), "mean"),
    "merge_out": lambda s: (
        *_merge(s), *_sizes(s), "maxnorm", torch.zeros(s.b, s.m, s.c), torch.zeros(s.b, s.m),
    ),
    "merge_backward": lambda s: (
        _random(s.b, s.m, s.c), _random(s.b, s.m), *_merge(s), *_sizes(s), "mean",
    ),
    "unmerge": lambda s: (_random(s.b, s.m, s.c), _whole(s.m, s.b, s.n)),
    "compose": lambda s: (_whole(s.k, s.b, s.m), _whole(s.m, s.b, s.n)),
    "biased_attention": lambda s: (*_qkv(s), _random(s.b, s.hk, s.n), True, 0.5, None, None, None),
    "biased_attention_backward": lambda s: (
        *_attended(s), *_qkv(s), _random(s.b, s.hk, s.n), *_attended(s), True, 0.5, None, None,
        None,
    ),
    "sparse_attention": lambda s: (*_qkv(s), _lists(s), 0.5, None, True, None, 1, None, None),
    "sparse_attention_backward": lambda s: (
        *_attended(s), *_qkv(s), _lists(s), *_attended(s), 0.5, None, True, None, 1,
    ),
    "block_sparse_attention": lambda s: (*_qkv(s), _blocks(s), 2, 4, True, 0.5, None, None),
    "block_sparse_attention_backward": lambda s: (
        *_attended(s), *_qkv(s), _blocks(s), 2, 4, *_attended(s), True, 0.5, None, None,
    ),
    "combine_states": lambda s: (*_attended(s), *_attended(s)),
    "kv_pack": lambda s: (_random(s.b, s.hk, s.n, s.d), *FORMAT),
    "kv_unpack": lambda s: (*_packed(s, s.d), *FORMAT, "float32"),
    "kv_unpack_into": lambda s: (
        *_packed(s, s.d), *FORMAT, torch.zeros(s.b, s.hk, s.n, s.d),
    ),
    "kv_append": lambda s: (
        _random(s.b, s.hk, s.q, s.d), *_packed(s, s.d), torch.zeros(s.b, s.hk, 4, s.d), 2, *FORMAT,
        _whole(3, s.b), None,
    ),
    "packed_attention": lambda s: (
        _qkv(s)[0], *_packed(s, s.d), *FORMAT, *_packed(s, s.dv), *FORMAT, None, None, 0.5, None,
        None, _random(s.b, s.hk, s.n), True, s.n, _whole(s.n, s.b), None,
    ),
    "packed_qk_score": lambda s: (
        _qkv(s)[0], *_packed(s, s.d), *FORMAT, None, "head_mean", 0.5, s.n, _whole(s.n, s.b),
        torch.ones(s.b, s.n, dtype=torch.bool), None,
    ),
}  # fmt: skip


def call(library: Any, op: str, args: tuple) -> list[Tensor]:
    """The tensors that the op of torch.ops.tokred, or of the emulated device, returns or writes."""
    result = getattr(library, op).default(*args)
    if result is None:
        return [args[-1]] if op == "kv_unpack_into" else [a for a in args if isinstance(a, Tensor)]
    return [result] if isinstance(result, Tensor) else list(result)
