"""Bad input of the ops on packed keys and values: every error names the argument."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tokred
from cases.bad_input import names_the_argument
from tokred import PackedKV, PackFormat

pack, unpack, append = tokred.kv_pack, tokred.kv_unpack, tokred.kv_append
attention, score = tokred.packed_attention, tokred.packed_qk_score

X = torch.zeros(2, 2, 24, 32)
PACK = [
    (pack, (X[0], 4, 16), {}, "x must have 4 dimensions"),
    (pack, (X.double(), 4, 16), {}, "x must be float32, float16 or bfloat16"),
    (pack, (X.int(), 4, 16), {}, "x must be float32, float16 or bfloat16"),
    (pack, (X[..., ::2], 4, 16), {}, "x must be contiguous in its last dimension"),
    (pack, (X[..., :24], 4, 24), {}, "head dimension of a packed tensor must be a multiple of 16"),
    (pack, (torch.zeros(1, 1, 2, 592), 4, 16), {}, "up to 576, got 592"),
    (pack, (X, 5, 16), {}, "bits must be 1, 2, 3, 4 or 8, got 5"),
    (pack, (X, 0, 16), {}, "bits must be"),
    (pack, (X, -4, 16), {}, "bits must be"),
    (pack, (X, 1, 16), {"scheme": "symmetric"}, "scheme 'symmetric' needs at least 2 bits"),
    (pack, (X, 4, 16), {"scheme": "fp8"}, "scheme 'fp8' needs bits = 8"),
    (pack, (X, 4, 16), {"scheme": "linear"}, "scheme must be one of"),
    (pack, (X, 8, 16), {"scheme": "codebook"}, "'codebook' has at most 16 levels.*got bits = 8"),
    (pack, (X, 4, 8), {"scheme": "codebook", "axis": "token"}, "needs groups along channels"),
    (
        pack,
        (X, 2, 16),
        {"levels": torch.zeros(1, 4).char()},
        "levels are those of scheme 'codebook'",
    ),
    *(
        (pack, (X, 2, 16), {"scheme": "codebook", "levels": levels}, message)
        for levels, message in (
            (torch.zeros(1, 4), "levels must be int8, got float32"),
            (torch.zeros(4).char(), "levels must have 2 dimensions"),
            (torch.zeros(1, 3).char(), "levels must be .* with size 4 in dimension 1"),
            (torch.zeros(3, 4).char(), "levels must be those of the 2 heads or of 1"),
            (torch.zeros(0, 4).char(), "levels must be those of the 2 heads or of 1"),
            (torch.zeros(1, 8).char()[:, ::2], "levels must be contiguous in its last dimension"),
        )
    ),
    (pack, (X, 4, 16), {"axis": "head"}, "axis must be one of"),
    (pack, (X, 4, 0), {}, "group_size must be at least 1"),
    (pack, (X, 4, -16), {"axis": "token"}, "group_size must be at least 1"),
    (pack, (X, 4, 8), {}, "group_size along channels must be a multiple of 16"),
    (pack, (X, 4, 64), {}, "divides the head dimension 32, got 64"),
    (pack, (X, 4, 16), {"axis": "token"}, "group_size along tokens must divide the 24 tokens"),
]

FORMAT = PackFormat(4, 16)
PACKED = FORMAT.empty(2, 2, 24, 32)
ALONG_TOKENS = PackFormat(4, 8, "token").empty(2, 2, 24, 32)


def changed(codes: torch.Tensor | None = None, params: torch.Tensor | None = None) -> PackedKV:
    """PACKED with other tensors."""
    return replace(
        PACKED,
        codes=PACKED.codes if codes is None else codes,
        params=PACKED.params if params is None else params,
    )


def as_format(**fields: object) -> PackedKV:
    """The tensors of PACKED, said to be in another format."""
    return replace(PACKED, format=replace(FORMAT, **fields))


CODEBOOK = PackFormat(4, 16, scheme="codebook").empty(2, 2, 24, 32)
CODES, PARAMS = PACKED.codes, PACKED.params
BROKEN = [
    (changed(CODES[0]), "codes must have 4 dimensions"),
    (changed(CODES.int()), "codes must be uint8"),
    (changed(CODES[..., ::2]), "codes must be contiguous in its last dimension"),
    (changed(CODES[..., :15]), "head dimension of a packed tensor|codes has rows of 15 bytes"),
    (changed(params=PARAMS[0]), "params must"),
    (changed(params=PARAMS.float()), "params must be float16"),
    (changed(params=PARAMS[..., :3]), "params must"),
    (changed(params=PARAMS[:, :, :23]), "params must"),
    (changed(params=PARAMS[:, :1]), "params must"),
    (changed(params=PARAMS.repeat(1, 1, 1, 2)[..., ::2]), "params must be contiguous"),
    (as_format(bits=6), "bits must be 1, 2, 3, 4 or 8"),
    (as_format(axis="row"), "axis must be one of"),
    (as_format(scheme="log"), "scheme must be one of"),
    (as_format(scheme="symmetric"), "params must"),
    (as_format(group_size=32), "params must"),
    (as_format(group_size=12), "group_size along channels must be"),
    (as_format(axis="token", group_size=7), "group_size along tokens must divide the 24"),
    (as_format(axis="token", group_size=8), "params must"),
    (as_format(scheme="codebook"), "params must"),
    (replace(PACKED, levels=torch.zeros(1, 16).char()), "levels are those of scheme 'codebook'"),
    (replace(CODEBOOK, levels=torch.zeros(1, 8).char()), "levels must be .* with size 16"),
    (replace(CODEBOOK, levels=torch.zeros(5, 16).char()), "levels must be those of the 2 heads"),
]
OUT = torch.zeros(2, 2, 24, 32)
UNPACK = [(unpack, (packed,), {}, message) for packed, message in BROKEN]
UNPACK += [
    (unpack, (PACKED,), {"out": out}, message)
    for out, message in (
        (OUT[0], "out must have 4 dimensions"),
        (OUT[:, :, :23], "out must be .* with size 24 in dimension 2"),
        (OUT[..., :16], "out must be .* with size 32 in dimension 3"),
        (OUT.double(), "out must be float32, float16 or bfloat16"),
        (torch.zeros(2, 2, 24, 64)[..., ::2], "out must be contiguous in its last dimension"),
        (torch.zeros(2, 24, 2, 32).transpose(1, 2), "out must have the tokens of a head without"),
        (OUT[:, :1].expand(2, 2, 24, 32), "out must not overlap itself"),
        (OUT[:1].expand(2, 2, 24, 32), "out must not overlap itself"),
        (torch.zeros(2000).as_strided((2, 2, 24, 32), (32, 900, 32, 1)), "must not overlap itself"),
    )
]

NEW = torch.zeros(2, 2, 3, 32)
WINDOW = torch.zeros(2, 2, 8, 32)
LENGTHS = torch.zeros(2, dtype=torch.int32)
SLOTS = torch.zeros(2, 24, dtype=torch.int32)
POOL = FORMAT.empty(1, 2, 24, 32)
APPEND = [
    *((append, (NEW, packed, 0), {}, message) for packed, message in BROKEN),
    (append, (NEW[0], PACKED, 0), {}, "x must have 4 dimensions"),
    (append, (NEW.double(), PACKED, 0), {}, "x must be float32, float16 or bfloat16"),
    (append, (NEW[..., ::2], PACKED, 0), {}, "x must be contiguous in its last dimension"),
    (append, (NEW[..., :16], PACKED, 0), {}, "x must be"),
    (append, (NEW[:, :1], PACKED, 0), {}, "x must be"),
    (append, (NEW[:1], PACKED, 0), {}, "codes must have the batch size 1"),
    (append, (NEW, PACKED, -1), {}, "length must be at least 0, got -1"),
    (append, (NEW, PACKED, 22), {}, "room for 24 packed tokens.*nothing was appended"),
    (append, (NEW, ALONG_TOKENS, 30), {"window": WINDOW}, "room for 24 packed tokens"),
    (append, (NEW, PACKED, 0), {"window": WINDOW[0]}, "window must"),
    (append, (NEW, PACKED, 0), {"window": WINDOW[:1]}, "window must"),
    (append, (NEW, PACKED, 0), {"window": WINDOW[..., :16]}, "window must"),
    (append, (NEW, PACKED, 0), {"window": WINDOW.half()}, "window must have the dtype of x"),
    (append, (NEW, PACKED, 0), {"window": WINDOW.mT.contiguous().mT}, "window must be contiguous"),
    (append, (NEW, ALONG_TOKENS, 0), {}, "window must hold a multiple of the 8 tokens"),
    (append, (NEW, ALONG_TOKENS, 0), {"window": WINDOW[:, :, :5]}, "window must hold a multiple"),
    (append, (NEW, PACKED, 0), {"lengths": LENGTHS.short()}, "lengths must be int32"),
    (append, (NEW, PACKED, 0), {"lengths": LENGTHS[:1]}, "lengths must be"),
    (append, (NEW, PACKED, 0), {"slots": SLOTS}, "codes must have the batch size 1 of a pool"),
    (append, (NEW, POOL, 0), {"slots": SLOTS.short()}, "slots must be int32"),
    (append, (NEW, POOL, 0), {"slots": SLOTS[:1]}, "slots must be"),
    (append, (NEW, POOL, 0), {"slots": SLOTS[0]}, "slots must"),
    (append, (NEW, POOL, 0), {"slots": SLOTS[:, ::2]}, "slots must be contiguous"),
    (append, (NEW, POOL, 22), {"slots": SLOTS}, "room for 24 packed tokens"),
]

Q = torch.zeros(2, 4, 5, 32)
BIAS, MASK = torch.zeros(2, 2, 24), torch.ones(2, 4, 5, 24, dtype=torch.bool)
LISTS = torch.zeros(2, 2, 5, 3, dtype=torch.int32)


def attends(message: str, packed: tuple = (PACKED, PACKED), q: torch.Tensor = Q, **kwargs) -> tuple:
    return attention, (q, *packed), kwargs, message


ATTENTION = [
    *(attends(f"k_({message})", (packed, PACKED)) for packed, message in BROKEN[1:3]),
    *(attends(f"v_({message})", (PACKED, packed)) for packed, message in BROKEN[:3]),
    *(attends(message, (packed, PACKED)) for packed, message in BROKEN),
    *(attends(message, (PACKED, packed)) for packed, message in BROKEN),
    attends("q must have 4 dimensions", q=Q[0]),
    attends("q must be float32, float16 or bfloat16", q=Q.double()),
    attends("q must be contiguous in its last dimension", q=Q[..., ::2]),
    attends("q must have the head dimension 32", q=Q[..., :16]),
    attends("the heads of q must be a multiple", q=Q[:, :3]),
    attends("k_codes must have the batch size 1", q=Q[:1]),
    attends("v_codes must have the 2 heads of k_codes", (PACKED, FORMAT.empty(2, 1, 24, 32))),
    attends("v_codes must have the batch size 2", (PACKED, FORMAT.empty(1, 2, 24, 32))),
    attends("as many tokens, got 24 and 23", (PACKED, FORMAT.empty(2, 2, 23, 32))),
    attends("as many tokens, got 32 and 24", residual_k=WINDOW),
    attends("residual_k must", residual_k=WINDOW[0], residual_v=WINDOW),
    attends("residual_v must", residual_k=WINDOW, residual_v=WINDOW[..., :16]),
    attends("residual_k must", residual_k=WINDOW[:, :1], residual_v=WINDOW),
    attends("residual_k must have the dtype of q", residual_k=WINDOW.half(), residual_v=WINDOW),
    attends("residual_v must have the dtype of q", residual_k=WINDOW, residual_v=WINDOW.half()),
    attends("scale must be finite", scale=float("nan")),
    attends("indices must be int32", indices=LISTS.short()),
    attends("indices must have 4 dimensions", indices=LISTS[0]),
    attends("indices must be", indices=LISTS[:1]),
    attends("indices must be", indices=LISTS[:, :, :4]),
    attends("indices must be", indices=LISTS.repeat(1, 2, 1, 1)[:, :3]),
    attends("indices must be contiguous", indices=LISTS[..., ::2]),
    attends("mask must be bool", mask=MASK.int()),
    attends("mask must be", mask=MASK[..., :23]),
    attends("mask must", mask=MASK[0]),
    attends("key_bias must be float32", key_bias=BIAS.half()),
    attends("key_bias must be", key_bias=BIAS[..., :23]),
    attends("key_bias must", key_bias=BIAS[:, None]),
    attends("length must be at least 0, got -1", length=-1),
    attends("k_codes has room for 24", length=25),
    attends("v_codes has room for 16", (PACKED, FORMAT.empty(2, 2, 16, 32)), length=20),
    attends("mask must be", length=20, mask=MASK),
    attends("residual_k must hold a multiple of the 8", (ALONG_TOKENS, PACKED), length=9,
            residual_k=WINDOW[:, :, :5]),
    attends("lengths needs length", lengths=LENGTHS),
    attends("lengths must be int32", length=9, lengths=LENGTHS.short()),
    attends("lengths must be", length=9, lengths=LENGTHS[:1]),
    attends("k_codes must have the batch size 1 of a pool", slots=SLOTS),
    attends("v_codes must have the batch size 1 of a pool", (POOL, PACKED), slots=SLOTS),
    attends("slots must be int32", (POOL, POOL), slots=SLOTS.short()),
    attends("slots must be", (POOL, POOL), slots=SLOTS[:1]),
    attends("slots must be contiguous", (POOL, POOL), slots=SLOTS[:, ::2]),
    attends("room for 24", (POOL, POOL), slots=SLOTS, length=25),
]  # fmt: skip

TOKENS = torch.ones(2, 24, dtype=torch.bool)
SCORE = [
    *((score, (Q, packed), {}, message) for packed, message in BROKEN),
    (score, (Q[0, 0], PACKED), {}, "q must have 4 dimensions"),
    (score, (Q.int(), PACKED), {}, "q must be float32, float16 or bfloat16"),
    (score, (Q[..., :16], PACKED), {}, "q must have the head dimension 32"),
    (score, (Q[:, :3], PACKED), {}, "the heads of q must be a multiple"),
    (score, (Q[:1], PACKED), {}, "codes must have the batch size 1"),
    (score, (Q, PACKED), {"reduce": "median"}, "reduce must be one of"),
    (score, (Q, PACKED), {"scale": float("inf")}, "scale must be finite"),
    (score, (Q, PACKED, WINDOW[:1]), {}, "residual must"),
    (score, (Q, PACKED, WINDOW.half()), {}, "residual must have the dtype of q"),
    (score, (Q, ALONG_TOKENS, WINDOW[:, :, :5]), {"length": 3}, "residual must hold a multiple"),
    (score, (Q, PACKED), {"length": -1}, "length must be at least 0"),
    (score, (Q, PACKED), {"length": 25}, "codes has room for 24"),
    (score, (Q, PACKED), {"lengths": LENGTHS}, "lengths needs length"),
    (score, (Q, PACKED), {"length": 24, "lengths": LENGTHS.float()}, "lengths must be int32"),
    (score, (Q, PACKED), {"mask": TOKENS.float()}, "mask must be bool"),
    (score, (Q, PACKED), {"mask": TOKENS[:, :23]}, "mask must be"),
    (score, (Q, PACKED), {"slots": SLOTS}, "codes must have the batch size 1 of a pool"),
    (score, (Q, POOL), {"slots": SLOTS.short()}, "slots must be int32"),
]

test_bad_input_names_the_argument = names_the_argument(
    [*PACK, *UNPACK, *APPEND, *ATTENTION, *SCORE]
)


def test_unpacks_to_the_dtype_of_a_buffer() -> None:
    with pytest.raises(ValueError, match=r"dtype must be that of out, torch.float32, or None"):
        unpack(PACKED, torch.float16, OUT)
    with pytest.raises(ValueError, match="out"):
        unpack(PACKED, out=OUT.clone().requires_grad_())


def test_unpacks_to_floats_only() -> None:
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16"):
            unpack(PACKED, dtype)


def test_keys_and_values_may_differ_in_everything_but_tokens() -> None:
    values = PackFormat(2, 8, "token", "symmetric", True).empty(2, 2, 24, 80)
    out, lse = attention(Q, PACKED, values)
    assert out.shape == (2, 4, 5, 80) and lse.shape == (2, 4, 5)


@pytest.mark.parametrize("length", [22, 2**40])
def test_a_full_cache_is_unchanged(length: int) -> None:
    cache = FORMAT.empty(2, 2, 24, 32)
    with pytest.raises(RuntimeError, match="nothing was appended"):
        append(torch.ones(2, 2, 3, 32), cache, length)
    assert not cache.codes.any() and not cache.params.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mixed_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="codes must be on the device of x"):
        append(NEW.cuda(), PACKED, 0)
    with pytest.raises(RuntimeError, match="k_codes must be on the device of q"):
        attention(Q.cuda(), PACKED, PACKED)
    with pytest.raises(RuntimeError, match="codes must be on the device of q"):
        score(Q.cuda(), PACKED)
