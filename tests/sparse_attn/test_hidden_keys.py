"""A hidden key contributes exactly nothing, whatever it and its value hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import generator, wide

INF, NAN = math.inf, math.nan
HOW = ("causal", "mask", "head mask", "key mask", "positions", "bias")
SIZES = ((1, 9), (2, 70), (3, 9), (40, 100))  # queries, keys
SPOILT = 5  # the key that holds no numbers


@dataclass(frozen=True)
class Inputs:
    """Attention in which some rows [B, Hq, L] see the spoilt key, by one of the ways of HOW."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    sees: Tensor

    def spoil(self, key: float, value: float) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.k.clone(), self.v.clone()
        k[:, :, SPOILT, ::3] = key
        v[:, :, SPOILT, ::2] = value
        return self.q, k, v


def inputs(how: str, queries: int, keys: int, dtype: torch.dtype = torch.float32) -> Inputs:
    batch, heads, head_dim = 2, 4, 16
    make = generator(3)
    q = torch.randn(batch, heads, queries, head_dim, generator=make).to(dtype)
    k, v = (torch.randn(batch, 2, keys, head_dim, generator=make).to(dtype) for _ in range(2))
    sees = torch.zeros(batch, heads, queries, dtype=torch.bool)
    options: dict[str, Any] = {}
    if how == "causal":
        options["causal"] = True
        sees[:] = torch.arange(queries) + keys - queries >= SPOILT
    elif how in ("mask", "head mask", "key mask"):
        shape = {"mask": (batch, 1, queries, keys), "head mask": (1, heads, queries, keys)}
        mask = torch.rand(shape.get(how, (batch, 1, 1, keys)), generator=make) < 0.7
        if how == "key mask":
            mask[..., SPOILT] = False
        options["mask"] = mask
        sees |= mask[..., SPOILT]
    elif how == "positions":
        options["query_position"] = torch.arange(queries, dtype=torch.int32).view(1, -1, 1)
        options["key_position"] = torch.arange(keys, dtype=torch.int32).view(1, -1, 1)
        sees[:] = torch.arange(queries) >= SPOILT
    else:
        bias = torch.randn(batch, 2, keys, generator=make)
        bias[..., SPOILT] = -INF
        options["key_bias"] = bias
    return Inputs(q, k, v, options, sees)


def assert_same(backend: Backend, actual: Tensor, expected: Tensor, context: str) -> None:
    """Equal bits on the CPU; the device sums rows that it does again in another order."""
    if backend.name.startswith("cpu"):
        return assert_bitwise_equal(actual, expected, context)
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_rows(
    backend: Backend, run: Callable[..., tuple[Tensor, Tensor]], case: Inputs, context: str
) -> None:
    """Rows that do not see the key have their results of before, the others are not finite."""
    out, lse = run(case.q, case.k, case.v)
    for key, value in ((NAN, 1.0), (1.0, INF), (INF, NAN), (1.0, NAN), (-INF, -INF)):
        spoilt_out, spoilt_lse = run(*case.spoil(key, value))
        where = f"{context}, key {key}, value {value}"
        assert_same(backend, spoilt_out[~case.sees], out[~case.sees], where)
        assert_same(backend, spoilt_lse[~case.sees], lse[~case.sees], where)
        # A logit of -inf gives a key no weight, and then its value does not count.
        if not math.isinf(key):
            assert not spoilt_out[case.sees].isfinite().all(-1).any(), where


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("queries", "keys", "dtype"),
    [
        *((*size, torch.float32) for size in SIZES),
        *((*size, torch.bfloat16) for size in SIZES[:3]),
        *wide((*SIZES[3], torch.bfloat16)),
    ],
)
def test_dense(kernels: Backend, how: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    case = inputs(how, queries, keys, dtype)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.run("biased_attention", q, k, v, **case.options)

    check_rows(kernels, run, case, how)


@pytest.mark.parametrize("how", ["causal", "mask", "head mask", "key mask", "bias"])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_lists(kernels: Backend, how: str, queries: int) -> None:
    case = inputs(how, queries, 60)
    block_q = min(queries, 20)
    lists = -(-queries // block_q)
    indices = torch.randint(-2, 62, (2, 1, lists, 30), generator=generator(), dtype=torch.int32)
    indices[..., ::7] = SPOILT
    indices[1, :, -1] = 60  # of no key
    case.sees[1, :, (lists - 1) * block_q :] = False

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options = {"block_q": block_q, **case.options}
        return kernels.run("sparse_attention", q, k, v, indices, **options)

    check_rows(kernels, run, case, how)


@pytest.mark.parametrize("how", ["causal", "mask", "key mask", "bias"])
@pytest.mark.parametrize("block", [3, 16])
def test_blocks(kernels: Backend, how: str, block: int) -> None:
    queries, keys = 50, 60
    case = inputs(how, queries, keys)
    shape = (2, 4, -(-queries // block), -(-keys // block))
    blocks = torch.rand(shape, generator=generator(1)) < 0.6
    case.sees.logical_and_(blocks[..., SPOILT // block].repeat_interleave(block, -1)[..., :queries])

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.run("block_sparse_attention", q, k, v, blocks, block, block, **case.options)

    check_rows(kernels, run, case, how)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_packed_windows(kernels: Backend, queries: int, rotate: bool) -> None:
    """The last tokens lie in windows; under the causal rule only the last queries see them."""
    make = generator(2)
    q = torch.randn(2, 4, queries, 32, generator=make)
    packed = [
        tokred.kv_pack(
            torch.randn(2, 2, 48, 32, generator=make),
            bits=4,
            group_size=16,
            rotate=rotate,
        )
        for _ in range(2)
    ]
    windows = [torch.randn(2, 2, 4, 32, generator=make) for _ in range(2)]
    mask = torch.ones(1, 1, queries, 52, dtype=torch.bool)
    mask[..., 50] = False
    sees = torch.zeros(2, 4, queries, dtype=torch.bool)
    sees[..., -1] = True

    def run(*windows: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.run(
            "packed_attention", q, *packed, residual_k=windows[0], residual_v=windows[1],
            causal=True, mask=mask,
        )  # fmt: skip

    out, lse = run(*windows)
    for row in (2, 3):  # hidden from all, and from all queries but the last
        for value in (NAN, INF):
            spoilt = [window.clone() for window in windows]
            spoilt[0][:, :, row, ::3] = value
            spoilt[1][:, :, row, ::2] = value
            spoilt_out, spoilt_lse = run(*spoilt)
            hidden = ~sees if row == 3 else torch.ones_like(sees)
            assert_same(kernels, spoilt_out[hidden], out[hidden], f"row {row}, {value}")
            assert_same(kernels, spoilt_lse[hidden], lse[hidden], f"row {row}, {value}")
            assert math.isinf(value) or not spoilt_out[~hidden].isfinite().any()


def gradients(backend: Backend, case: Inputs, op: str, extra: tuple, *tensors: Tensor) -> list:
    """The gradients of q, k and v, after a forward pass of the same inputs."""
    q, k, v, grad_out = tensors
    library = torch.ops.tokred_simt if backend.name == "simt" else torch.ops.tokred
    options = {"causal": False, "scale": None, "mask": None, "key_bias": None, "softcap": None}
    options |= case.options
    out, lse = backend.run(op, q, k, v, *extra, **case.options)
    if op == "biased_attention":
        options |= {"query_position": None, "key_position": None} | case.options
    else:
        options["block_q"] = 1
    named = {"grad_out": grad_out, "grad_lse": torch.zeros_like(lse), "q": q, "k": k, "v": v}
    named |= {"out": out, "lse": lse, **options}
    if extra:
        named["indices"] = extra[0]
    function = getattr(library, op + "_backward").default
    args = tuple(named[argument.name] for argument in function._schema.arguments)
    return list(function(*args))[:3]


@pytest.mark.parametrize(
    ("how", "op"),
    [
        *((how, "biased_attention") for how in HOW),
        *((how, "sparse_attention") for how in HOW if how != "positions"),
    ],
)
def test_gradients(kernels: Backend, how: str, op: str) -> None:
    """Those of a key that no query sees are 0; queries that do not see it keep theirs."""
    if kernels.name == "cuda":
        pytest.skip("not offered")
    queries, keys = 20, 30
    case = inputs(how, queries, keys)
    extra = ()
    if op == "sparse_attention":
        indices = torch.arange(keys, dtype=torch.int32).expand(2, 2, queries, keys)
        extra = (indices.contiguous(),)
    grad_out = torch.randn(2, 4, queries, 16, generator=generator(4))
    grad_out[case.sees] = 0
    before = gradients(kernels, case, op, extra, case.q, case.k, case.v, grad_out)
    for key, value in ((NAN, 1.0), (1.0, INF), (INF, NAN)):
        q, k, v = case.spoil(key, value)
        after = gradients(kernels, case, op, extra, q, k, v, grad_out)
        context = f"{how}, key {key}, value {value}"
        assert_same(kernels, after[0][~case.sees], before[0][~case.sees], context)
        if not case.sees.any():
            for mine, theirs in zip(after[1:], before[1:], strict=True):
                assert_same(kernels, mine, theirs, context)
                assert not mine[:, :, SPOILT].any()


@pytest.mark.parametrize("op", ["biased_attention", "sparse_attention"])
def test_gradients_of_rows_that_do_not_see(kernels: Backend, op: str) -> None:
    """A row whose gradient is NaN spoils the keys that it sees, and no others."""
    if kernels.name == "cuda":
        pytest.skip("not offered")
    queries, keys, seen = 20, 30, 11
    case = inputs("mask", queries, keys)
    case.options["mask"][:, :, 7] = torch.arange(keys) < seen
    extra = ()
    if op == "sparse_attention":
        indices = torch.arange(keys, dtype=torch.int32).expand(2, 2, queries, keys)
        extra = (indices.contiguous(),)
    grad_out = torch.randn(2, 4, queries, 16, generator=generator(4))
    grad_out[:, :, 7] = 0
    before = gradients(kernels, case, op, extra, case.q, case.k, case.v, grad_out)
    grad_out[:, :, 7] = NAN
    after = gradients(kernels, case, op, extra, case.q, case.k, case.v, grad_out)
    for mine, theirs in zip(after[1:], before[1:], strict=True):
        assert_same(kernels, mine[:, :, seen:], theirs[:, :, seen:], op)
        assert mine[:, :, :seen].isnan().all()


@pytest.mark.parametrize("value", [INF, NAN])
def test_threads_change_nothing(
    on_every_cpu: Callable[[Callable[[], Any]], dict[str, Any]], value: float
) -> None:
    """How rows are shared out must not decide which of them a hidden value reaches."""
    make = generator(6)
    q, k, v = (torch.randn(1, 1, 200, 16, generator=make) for _ in range(3))
    v[0, 0, 150] = value
    k[0, 0, 170] = value
    results = on_every_cpu(lambda: tokred.biased_attention(q, k, v, causal=True))
    assert_one_result(results)
    out, lse = next(iter(results.values()))
    assert out[0, 0, :150].isfinite().all() and lse[0, 0, :170].isfinite().all()
    assert not out[0, 0, 150:].isfinite().any()


def test_column_statistics(kernels: Backend) -> None:
    """A query whose weight or lse is no number counts for the keys that it sees alone."""
    make = generator(8)
    q, k = torch.randn(1, 1, 40, 16, generator=make), torch.randn(1, 1, 40, 16, generator=make)
    lse = torch.randn(1, 1, 40, generator=make) + 5
    weight = torch.rand(1, 1, 40, generator=make)
    for reduce in ("sum", "mean", "max", "variance"):
        for spoilt in (0, 1):
            before = kernels.run(
                "attention_columns", q, k, lse, reduce=reduce, weight=weight, causal=True
            )
            tables = [lse.clone(), weight.clone()]
            tables[spoilt][..., 20] = NAN
            after = kernels.run(
                "attention_columns", q, k, tables[0], reduce=reduce, weight=tables[1], causal=True
            )
            assert_bitwise_equal(after[..., 21:], before[..., 21:], reduce)


def spoilt(t: Tensor, hidden: Tensor, value: float) -> Tensor:
    """The numbers of t with some at its hidden rows that must not matter."""
    return torch.where(hidden, torch.tensor(value, dtype=t.dtype), t)


HIDDEN = torch.arange(30).remainder(3).eq(1).expand(2, 30)
ROWS = torch.randn(2, 30, 16, generator=generator(9))
HEADS = torch.randn(2, 2, 30, 16, generator=generator(9))
QUERY = torch.randn(2, 4, 3, 16, generator=generator(10))
LSE = torch.randn(2, 4, 3, generator=generator(10)) + 5
MAP = torch.randint(0, 5, (2, 30), generator=generator(11), dtype=torch.int32)
OTHER_OPS: dict[str, tuple[str, Callable[[float], tuple], dict[str, Any]]] = {
    "match": (
        "match", lambda x: (spoilt(ROWS, HIDDEN[..., None], x),) * 2,
        {"mask_a": ~HIDDEN, "mask_b": ~HIDDEN},
    ),
    "bipartite": (
        "bipartite_soft_matching", lambda x: (spoilt(ROWS, HIDDEN[..., None], x), 6),
        {"mask": ~HIDDEN},
    ),
    "threshold": (
        "threshold_matching", lambda x: (spoilt(ROWS, HIDDEN[..., None], x), 0.2),
        {"mask": ~HIDDEN},
    ),
    "similarities": (
        "similarity_stats", lambda x: (spoilt(ROWS, HIDDEN[..., None], x),) * 2,
        {"mask_a": ~HIDDEN, "mask_b": ~HIDDEN, "energy": "elu", "exclude_self": True},
    ),
    "partners": (
        "similarity_stats",
        lambda x: (ROWS, spoilt(ROWS, torch.arange(30)[:, None] % 16 == 5, x)),
        {"mask_b": torch.arange(30).expand(2, 30) % 16 != 5, "block_size": 8},
    ),
    "merged": (
        "merge", lambda x: (spoilt(ROWS, HIDDEN[..., None], x), MAP.where(~HIDDEN, -1), 5),
        {"mode": "maxnorm"},
    ),
    "pooled": (
        "block_pool", lambda x: (spoilt(HEADS, HIDDEN[:, None, :, None], x),),
        {"block_size": 7, "statistic": "mean_deviation", "mask": ~HIDDEN},
    ),
    "lengths": (
        "block_pool", lambda x: (spoilt(HEADS, torch.arange(30)[:, None] >= 11, x),),
        {"block_size": 7, "statistic": "min_max",
         "lengths": torch.tensor([11, 4], dtype=torch.int32)},
    ),
    "blocks": (
        "block_score",
        lambda x: (QUERY, spoilt(HEADS[:, :, :, None], HIDDEN[:, None, :, None, None], x)),
        {"counts": (~HIDDEN).int(), "reduce": "softmax_vote"},
    ),
    "scores": (
        "qk_score", lambda x: (QUERY, spoilt(HEADS, HIDDEN[:, None, :, None], x)),
        {"mask": ~HIDDEN, "reduce": "softmax_vote"},
    ),
    "rows": (
        "attention_rows", lambda x: (QUERY, spoilt(HEADS, HIDDEN[:, None, :, None], x)),
        {"mask": (~HIDDEN)[:, None, None]},
    ),
    "columns": (
        "attention_columns", lambda x: (QUERY, spoilt(HEADS, HIDDEN[:, None, :, None], x), LSE),
        {"mask": (~HIDDEN)[:, None, None]},
    ),
    "chosen": (
        "topk", lambda x: (spoilt(ROWS[..., 0], torch.arange(30) >= 20, x), 8),
        {"lengths": torch.tensor([20, 7], dtype=torch.int32), "top_p": 0.4},
    ),
    "samples": (
        "inverse_transform_sample", lambda x: (spoilt(ROWS[..., 0].abs(), HIDDEN, x), 8),
        {"mask": ~HIDDEN},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_OPS)
def test_other_hidden_tokens(kernels: Backend, name: str) -> None:
    op, args, options = OTHER_OPS[name]

    def run(value: float) -> Any:
        result = kernels.run(op, *args(value), **options)
        return list(vars(result).values()) if dataclasses.is_dataclass(result) else result

    expected = run(0.0)
    for value in (NAN, INF, -INF, 3.0e38):
        assert_bitwise_equal(run(value), expected, f"{value}")
