"""One small valid call of every op, from sizes that tests vary.

The calls of newer ops lie in cases/calls/<op>.py: `CALLS`, as here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import calls
from .sizes import Sizes, random, whole


def op_names() -> list[str]:
    """Every op of the library, as the dispatcher knows them."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("tokred::") for name in names if name.startswith("tokred::"))


def _qkv(s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    q = random(s.b, s.hq, s.q, s.d)
    return q, random(s.b, s.hk, s.n, s.d), random(s.b, s.hk, s.n, s.dv)


def _attended(s: Sizes) -> tuple[Tensor, Tensor]:
    return random(s.b, s.hq, s.q, s.dv), random(s.b, s.hq, s.q)


FORMAT = (4, 16, "channel", "asymmetric", False)


def _packed(s: Sizes, dim: int) -> tuple[Tensor, Tensor]:
    codes = whole(256, s.b, s.hk, s.n, dim // 2).to(torch.uint8)
    return codes, random(s.b, s.hk, s.n, dim // 16 * 2).half()


def _blocks(s: Sizes) -> Tensor:
    return torch.ones(s.b, s.hq, -(-s.q // 2), -(-s.n // 4), dtype=torch.bool)


def _lists(s: Sizes) -> Tensor:
    return whole(s.n, s.b, s.hk, s.q, s.k)


def _merge(s: Sizes) -> tuple[Tensor, Tensor]:
    return random(s.b, s.n, s.c), whole(s.m, s.b, s.n)


def _sizes(s: Sizes) -> tuple[Tensor, Tensor]:
    return random(s.b, s.n).abs(), random(s.b, s.n).abs()


CALLS: dict[str, Callable[[Sizes], tuple]] = {
    "topk": lambda s: (
        random(s.b, s.n), s.k, whole(s.n, s.b), "position", whole(s.k, s.b), 1, 1,
        whole(2, s.b, s.n).bool(), 0.5, 1, 0.0, 0,
    ),
    "compact": lambda s: (random(s.b, s.n), 0.0, s.k, whole(s.n, s.b)),
    "gather_tokens": lambda s: (
        [random(s.b, s.n, s.c), random(s.b, s.hk, s.n, s.d)], whole(s.n, s.b, s.k), [1, 2],
    ),
    "inverse_transform_sample": lambda s: (
        random(s.b, s.n).abs(), s.k, torch.ones(s.b, s.n, dtype=torch.bool),
    ),
    "qk_score": lambda s: (
        *_qkv(s)[:2], "head_mean", None, 0.5, whole(s.n, s.b),
        torch.ones(s.b, s.n, dtype=torch.bool), None,
    ),
    "block_pool": lambda s: (
        random(s.b, s.hk, s.n, s.d), 3, "mean_deviation", None, whole(s.n, s.b),
        torch.ones(s.b, s.n, dtype=torch.bool),
    ),
    "block_score": lambda s: (
        random(s.b, s.hq, s.q, s.d), random(s.b, s.hk, s.m, 1, s.d), whole(9, s.b, s.m), "dot",
        "group_max", 0.5,
    ),
    "attention_rows": lambda s: (
        *_qkv(s)[:2], True, 0, s.n, True, 0.5, torch.ones(s.b, 1, s.q, s.n, dtype=torch.bool),
    ),
    "attention_columns": lambda s: (
        *_qkv(s)[:2], _attended(s)[1], "variance", random(s.b, s.hq, s.q), True, 0.5, None,
    ),
    "pagerank": lambda s: (
        random(s.b, s.hq, s.n, s.d), random(s.b, s.hk, s.n, s.d), random(s.b, s.hq, s.n), 2, 0.1,
        random(s.b, s.hq, s.n), False, None, None,
    ),
    "similarity_stats": lambda s: (
        random(s.b, s.n, s.c), random(s.b, s.m, s.c), "cosine", 0.1, "elu", 0.2, True, 0,
        torch.ones(s.b, s.n, dtype=torch.bool), torch.ones(s.b, s.m, dtype=torch.bool),
    ),
    "transition_stats": lambda s: (random(s.b, s.n, s.c), random(s.b, s.n, s.c) + 1),
    "match": lambda s: (
        random(s.b, s.n, s.c), random(s.b, s.m, s.c), torch.ones(s.b, s.n, dtype=torch.bool),
        torch.ones(s.b, s.m, dtype=torch.bool), random(s.b, s.n).abs(), random(s.b, s.m).abs(),
        "dot", 2,
    ),
    "bipartite_soft_matching": lambda s: (
        random(s.b, s.n, s.c), s.k, 1, torch.ones(s.b, s.n, dtype=torch.bool), "position", None,
        None,
    ),
    "threshold_matching": lambda s: (
        random(s.b, s.n, s.c), 0.1, 1, torch.ones(s.b, s.n, dtype=torch.bool), "tome", None, None,
    ),
    "merge": lambda s: (*_merge(s), s.m, *_sizes(s), "mean"),
    "merge_out": lambda s: (
        *_merge(s), *_sizes(s), "maxnorm", torch.zeros(s.b, s.m, s.c), torch.zeros(s.b, s.m),
    ),
    "merge_backward": lambda s: (
        random(s.b, s.m, s.c), random(s.b, s.m), *_merge(s), *_sizes(s), "mean",
    ),
    "unmerge": lambda s: (random(s.b, s.m, s.c), whole(s.m, s.b, s.n)),
    "compose": lambda s: (whole(s.k, s.b, s.m), whole(s.m, s.b, s.n)),
    "biased_attention": lambda s: (*_qkv(s), random(s.b, s.hk, s.n), True, 0.5, None, None, None),
    "biased_attention_backward": lambda s: (
        *_attended(s), *_qkv(s), random(s.b, s.hk, s.n), *_attended(s), True, 0.5, None, None,
        None,
    ),
    "biased_attention_mask_backward": lambda s: (
        *_attended(s), *_qkv(s), None, *_attended(s), True, 0.5, random(1, s.hq, s.q, s.n), None,
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
    "kv_pack": lambda s: (random(s.b, s.hk, s.n, s.d), *FORMAT),
    "kv_unpack": lambda s: (*_packed(s, s.d), *FORMAT, "float32"),
    "kv_unpack_into": lambda s: (
        *_packed(s, s.d), *FORMAT, torch.zeros(s.b, s.hk, s.n, s.d),
    ),
    "kv_append": lambda s: (
        random(s.b, s.hk, s.q, s.d), *_packed(s, s.d), torch.zeros(s.b, s.hk, 4, s.d), 2, *FORMAT,
        whole(3, s.b), None,
    ),
    "packed_attention": lambda s: (
        _qkv(s)[0], *_packed(s, s.d), *FORMAT, *_packed(s, s.dv), *FORMAT, None, None, 0.5, None,
        None, random(s.b, s.hk, s.n), True, s.n, whole(s.n, s.b), None,
    ),
    "packed_qk_score": lambda s: (
        _qkv(s)[0], *_packed(s, s.d), *FORMAT, None, "head_mean", 0.5, s.n, whole(s.n, s.b),
        torch.ones(s.b, s.n, dtype=torch.bool), None,
    ),
}  # fmt: skip
for _module in pkgutil.iter_modules(calls.__path__):
    CALLS |= importlib.import_module(f"{calls.__name__}.{_module.name}").CALLS


def call(library: Any, op: str, args: tuple) -> list[Tensor]:
    """The tensors that the op of torch.ops.tokred, or of the emulated device, returns or writes."""
    result = getattr(library, op).default(*args)
    if result is None:
        return [args[-1]] if op == "kv_unpack_into" else [a for a in args if isinstance(a, Tensor)]
    return [result] if isinstance(result, Tensor) else list(result)
