"""Every launch plan of the CUDA kernels stays within the limits of the hardware."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

_C = pytest.importorskip("tokred._C", reason="tokred._C is not built for this Python")

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024
# Of a block: RTX 30, 40 and 50; A100; H100, H200 and B200.
SHARED_LIMITS = (99 * 1024, 163 * 1024, 227 * 1024)

BATCHES = (1, 7, 64, 4096, 1_000_000)
COUNTS = (1, 31, 64, 289, 577, 1024, 1025, 16384, 131072)
MAX_TOKENS = 2**33  # batch * tokens that could lie in a GPU's memory


def shapes(*axes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Combinations (batch, count, ...) of which a tensor could exist."""
    for shape in itertools.product(BATCHES, COUNTS, *axes):
        if shape[0] * shape[1] <= MAX_TOKENS:
            yield shape


def check(
    plans: dict,
    covered: dict[str, int],
    shared_limit: int = SHARED_LIMITS[0],
    too_large: tuple[str, ...] = (),
) -> None:
    """`covered` says how many blocks a plan must have at least. Those of `too_large` may ask for
    more than the device has, which is refused by name."""
    assert covered.keys() <= plans.keys()
    for name, plan in plans.items():
        for size, limit in zip(plan["grid"], MAX_GRID, strict=True):
            assert 1 <= size <= limit, (name, plan)
        assert 32 <= plan["block"] <= MAX_THREADS and plan["block"] % 32 == 0, (name, plan)
        most = SHARED_LIMITS[-1] if name in too_large else shared_limit
        assert 0 <= plan["shared_bytes"] <= most, (name, plan)
        assert plan["kernel"] or plan["shared_bytes"] <= 48 * 1024, (name, plan)
        assert plan["grid"][0] >= covered.get(name, 1), (name, plan)


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("general", [False, True])
def test_match(is_float: bool, aligned: bool, general: bool) -> None:
    for batch, tokens in shapes():
        for rows in {1, (tokens + 1) // 2, tokens}:
            plans = _C.plan_match(batch, rows, tokens, is_float, aligned, general)
            # No block of 64 or 128 rows may be missing, unless blocks loop.
            blocks = min(batch * -(-rows // 128), 2**30)
            covered = {"match": blocks, "bipartite": batch}
            if aligned and not (is_float or general):
                covered |= {
                    "match_short": blocks,
                    "column_terms": min(batch * -(-tokens // 64), 2**30),
                }
            check(plans, covered, SHARED_LIMITS[-1])


def test_wide_tiles_only_where_blocks_abound() -> None:
    narrow, wide = (_C.plan_match(64, rows, 2 * rows)["match"] for rows in (289, 8192))
    assert narrow["grid"] == (64 * 5, 1, 1)
    assert wide["grid"] == (64 * 64, 1, 1)


def test_connected_components() -> None:
    for batch, tokens in shapes():
        edges = min(-(-batch * tokens // 8), 2**30)
        check(_C.plan_connected_components(batch, tokens), {"edges": edges, "labels": batch})


def test_kmeans() -> None:
    for batch, tokens in shapes():
        for clusters in {1, 256, tokens}:
            blocks = {"round": batch, "nearest": batch * -(-tokens // 128)}
            blocks["distances"] = batch * -(-tokens // 64)
            blocks |= {"clusters": batch * clusters // 8, "tokens": batch * tokens // 8}
            check(
                _C.plan_kmeans(batch, tokens, clusters),
                {name: max(1, min(count, 2**30)) for name, count in blocks.items()},
            )


def test_linear_assignment() -> None:
    for batch, columns in shapes():
        for rows in (1, 31, 1000, columns):
            check(_C.plan_linear_assignment(batch, rows, columns), {"assignment": batch})


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_dpc_knn(is_float: bool, aligned: bool) -> None:
    for batch, tokens in shapes():
        blocks = min(batch * -(-tokens // 64), 2**30)
        plans = _C.plan_dpc_knn(batch, tokens, 100, is_float, aligned)
        check(plans, {"pairs": blocks, "place": batch * -(-tokens // 256), "clear": batch // 3})


def test_greedy_select() -> None:
    for batch, tokens, channels in shapes((1, 64, 1152)):
        plans = _C.plan_greedy_select(batch, tokens, channels)
        covered = {"prepare": -(-batch * tokens // 64), "pairs": batch * tokens, "select": batch}
        check(plans, {name: min(blocks, 2**30) for name, blocks in covered.items()})
        parts = plans["select"]["grid"][0] // batch
        assert parts == 1 if tokens * channels <= 2**17 else parts <= 256


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_sinkhorn(is_float: bool, aligned: bool) -> None:
    for batch, sources, anchors, channels in shapes((1, 126), (1, 64, 1152)):
        most = {"costs": batch * -(-sources // 64), "steps": batch}
        most["aggregation"] = batch * -(-anchors // 32) * -(-channels // 64)
        most["norms"] = -(-batch * (sources + anchors) // 8)
        most["weights"] = batch * -(-sources // 64) * -(-anchors // 32)
        most["sources"] = batch * -(-sources // 32) * -(-channels // 64)
        most["anchors"] = most["aggregation"]
        plans = _C.plan_sinkhorn(batch, sources, anchors, channels, is_float, aligned)
        check(plans, {name: min(blocks, 2**30) for name, blocks in most.items()})


def test_merge() -> None:
    for batch, tokens in shapes():
        for num_out in {1, (tokens + 1) // 2, tokens}:
            plans = _C.plan_merge(batch, tokens, num_out)
            assert ("list_members" in plans) == (tokens > 1024)
            check(plans, {"merge": batch, "unmerge": 1, "compose": 1, "items": batch})


def test_ema_scan() -> None:
    for batch, channels in shapes():
        check(_C.plan_ema_scan(batch, channels), {"ema_scan": batch * -(-channels // 32)})


def test_unmerged_attention() -> None:
    for batch, positions in shapes():
        for dim in (1, 64, 128, 256):
            plans = _C.plan_unmerged_attention(batch, 7, positions, 100, dim)
            rows = batch * 7 * -(-positions // 32)
            check(plans, {"rows": rows, "list_queries": batch, "mean": batch * 7 * 100 // 8})
            assert plans["rows"]["shared_bytes"] <= 99 * 1024


def test_linear_attention() -> None:
    for batch, heads in shapes():
        for dim in (1, 64, 128, 129, 256):
            plans = _C.plan_linear_attention(batch, heads, dim, dim)
            parts = batch * heads * -(-dim // 32)
            check(plans, dict.fromkeys(("chunks", "step"), min(parts, 2**30)))
            assert plans["chunks"]["shared_bytes"] <= 99 * 1024


@pytest.mark.parametrize("is_float", [False, True])
def test_attention(is_float: bool) -> None:
    heads = ((1, 1), (9, 3), (32, 1), (8, 8))
    dims = ((1, 1), (64, 64), (80, 80), (96, 32), (128, 128), (32, 256), (256, 256))
    for batch, queries, (heads_q, heads_kv), (dim, value_dim) in shapes(heads, dims):
        if batch * queries * heads_q > MAX_TOKENS:
            continue
        for keys in (1, 1370):
            plans = _C.plan_attention(
                batch, heads_q, heads_kv, queries, keys, dim, value_dim, is_float
            )
            covered = dict.fromkeys(("forward", "grad_query", "grad_key"), batch * heads_kv)
            check(plans, covered, SHARED_LIMITS[-1])
            by_wgmma = not is_float and dim == value_dim and dim in (64, 128)
            assert ("wgmma" in plans) == by_wgmma
            if by_wgmma:
                blocks = batch * heads_kv * -(-queries * (heads_q // heads_kv) // 128)
                assert plans["wgmma"]["grid"] == (blocks, 1, 1)


@pytest.mark.parametrize("is_float", [False, True])
def test_attention_over_lists(is_float: bool) -> None:
    heads = ((1, 1), (9, 3), (32, 1), (8, 8))
    dims = ((1, 1), (64, 64), (96, 32), (128, 128), (256, 256), (576, 512))
    for batch, queries, (heads_q, heads_kv), (dim, value_dim) in shapes(heads, dims):
        if batch * queries * heads_q > MAX_TOKENS:
            continue
        for list_heads, length, block_q in itertools.product(
            {heads_kv, heads_q}, (0, 1, 2048, 131072), (1, 16, 1000)
        ):
            lists = -(-queries // block_q)
            if batch * list_heads * lists * length > 2 * MAX_TOKENS:
                continue
            plan = _C.plan_decode(
                *(batch, heads_q, heads_kv, queries, 1370, dim, value_dim, is_float),
                *(list_heads, length, block_q),
            )
            blocks = batch * list_heads * lists
            covered = {"grad_query": min(blocks, 2**30)}
            if "forward" in plan["plans"]:
                covered["forward"] = blocks
            check(plan["plans"], covered, SHARED_LIMITS[-1])
            if "decode" in plan["plans"]:
                # Either one launch does, or what its splits leave is kept within bounds.
                at_once = plan["plans"]["decode"]["grid"][0]
                assert at_once == plan["items"] or plan["workspace_bytes"] <= 64 << 20


def test_splits_of_decode() -> None:
    """One long sequence fills a large device, and nothing but the keys decides."""
    shape = (32, 8, 1)
    for keys, smallest in ((2048, 64), (131072, 264)):
        dense = _C.plan_decode(1, *shape, keys, 128, 128)
        listed = _C.plan_decode(1, *shape, 10**6, 128, 128, list_heads=8, length=keys)
        assert dense["plans"]["decode"] == listed["plans"]["decode"]
        items, splits, _ = dense["plans"]["decode"]["grid"]
        assert items * splits >= smallest
        for batch, heads in ((1, (9, 3, 1)), (64, shape), (5, (8, 8, 8))):
            other = _C.plan_decode(batch, *heads, keys, 64, 64)
            assert other["plans"]["decode"]["grid"][1] == splits
    for keys in (0, 1, 127, 128, 129, 10**5, 2**31 - 1):
        plan = _C.plan_decode(1, *shape, keys, 128, 128)
        splits = plan["plans"]["decode"]["grid"][1]
        assert (splits - 1) * plan["split_length"] < max(keys, 1) <= splits * plan["split_length"]
        assert ("combine" in plan["plans"]) == (splits > 1)
        items = plan["plans"]["decode"]["grid"][0]
        assert items == 8 or plan["workspace_bytes"] * 2 > 64 << 20
        assert plan["workspace_bytes"] == (items * splits * 4 * 130 * 4 if splits > 1 else 0)


@pytest.mark.parametrize("is_float", [False, True])
def test_score(is_float: bool) -> None:
    for batch, tokens, (heads_q, heads_kv), dim in shapes(
        ((1, 1), (9, 3), (32, 1), (8, 8)), (1, 64, 80, 128, 256)
    ):
        if batch * tokens * heads_q > MAX_TOKENS:
            continue
        for queries, keys in {(1, tokens), (tokens, 1), (32, tokens), (tokens, 577)}:
            if batch * queries * heads_q > MAX_TOKENS or batch * keys * heads_q > MAX_TOKENS:
                continue
            heads = batch * heads_kv
            blocks, rows = -(-keys // 64), queries * (heads_q // heads_kv)
            covered = {
                # No chunk of keys or tile of rows may be missing.
                "qk_score": heads * -(-keys // 512),
                "qk_score_dims": heads * -(-keys // 256),
                "qk_score_mean": batch * -(-keys // 512),
                "reduce_heads": -(-heads * queries * blocks // 256),
                "softmax": min(batch * heads_q * queries, 2**30),
                "block_pool": -(-heads * blocks // 8),
                "block_score": heads * -(-rows // 64) * -(-blocks // 128),
                "attention_rows": heads * -(-rows // 128) * -(-keys // 512),
                "attention_columns": batch * heads_q * -(-keys // 128),
                "similarity_stats": batch * -(-queries // 64),
                "transition_stats": -(-batch * queries // 8),
            }
            check(_C.plan_score(batch, heads_q, heads_kv, queries, keys, dim, is_float), covered)


def test_few_keys_get_short_chunks() -> None:
    """So that one sequence fills the device; many long ones need fewer blocks."""
    for keys, batch, blocks in ((4096, 1, 512), (32768, 1, 1024), (32768, 8, 8192)):
        assert _C.plan_score(batch, 32, 8, 1, keys, 128)["qk_score"]["grid"] == (blocks, 1, 1)


def test_long_blocks_are_shared_by_warps() -> None:
    plans = _C.plan_score(8, 8, 8, 1, 32768, 128)
    assert plans["block_pool"]["grid"] == (8 * 8 * 512 // 8, 1, 1)
    assert plans["block_pool_whole"]["grid"] == (8 * 8, 1, 1)


@pytest.mark.parametrize("k", [1, 64, 256, 257, 512, 513, 2048, 4096, 4097, 131072])
@pytest.mark.parametrize("has_top_p", [False, True])
def test_topk(k: int, has_top_p: bool) -> None:
    for lists, columns in shapes():
        plans = _C.plan_topk(lists, columns, k, has_top_p)
        chunks, most = -(-columns // 4096), min(k, columns)
        runs = -(-columns // 8192)  # of two chunks each, cut to what is wanted
        # No list, no chunk and no run may be missing, unless blocks loop.
        covered = {
            "warps": -(-lists // 8), "small": lists, "wide": lists, "parts": lists,
            "finish": lists, "write": lists, "sort": lists * chunks,
            "merge": lists * runs * -(-min(8192, most) // 2048),
        }  # fmt: skip
        check(plans, {name: min(covered[name], 2**30) for name in plans})


def test_topk_takes_the_path_of_its_size() -> None:
    for (lists, columns, k, has_top_p), path, blocks in (
        ((18432, 289, 64, False), "warps", 2304),
        ((18432, 289, 64, True), "small", 18432),
        ((256, 131072, 2048, False), "wide", 256),
        ((8, 131072, 2048, False), "parts", 128),
        ((1, 1 << 20, 2048, False), "parts", 128),
        ((4, 131072, 16384, False), "sort", 128),
        ((4, 4096, 8192, False), "wide", 4),
    ):
        plans = _C.plan_topk(lists, columns, k, has_top_p)
        assert plans[path]["grid"] == (blocks, 1, 1)


def test_rows() -> None:
    for rows, columns in shapes():
        plans = _C.plan_rows(rows, columns)
        groups = 256 // min(32, max(2, columns))
        check(plans, {"compact": rows, "sample": rows, "gather": -(-rows // groups)})


def test_packing() -> None:
    for heads, tokens, dim, (along_tokens, group) in shapes(
        (16, 64, 80, 128, 256), ((False, 16), (True, 1), (True, 32), (True, 1024))
    ):
        if (along_tokens and tokens % group) or heads * tokens * dim > 64 * MAX_TOKENS:
            continue
        rows = 256 // (8 if dim <= 64 else 16 if dim <= 128 else 32)
        unit = group if along_tokens else rows
        covered = {
            # No row and no group may be missing.
            "pack": heads * -(-tokens // unit),
            "append": heads * -(-tokens // unit),
            "unpack": -(-heads * tokens // rows),
        }
        if max(covered.values()) > MAX_GRID[0]:
            continue
        check(_C.plan_packing(heads, tokens, dim, group, along_tokens), covered)
        window = 4 * group if along_tokens else 128
        plans = _C.plan_packing(heads, tokens, dim, group, along_tokens, window)
        covered["window"] = -(-heads * min(tokens, window) // rows)
        check(plans, covered)


def test_appending_a_token_is_small() -> None:
    """No more blocks than groups of the window, which may have become full."""
    plans = _C.plan_packing(8, 1, 128, 32, along_tokens=True, window=128)
    assert plans["append"]["grid"] == (8 * 4, 1, 1) and plans["window"]["grid"] == (1, 1, 1)
    plans = _C.plan_packing(8, 1, 128, 32, window=128)
    assert plans["append"]["grid"] == (8, 1, 1)


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_packed_attention(bits: int, is_float: bool) -> None:
    heads = ((1, 1), (9, 3), (32, 1), (8, 8))
    for batch, tokens, (heads_q, heads_kv), dim in shapes(heads, (16, 64, 80, 128, 256)):
        for queries in {1, 512}:
            if batch * queries * heads_q > MAX_TOKENS or batch * tokens * heads_q > MAX_TOKENS:
                continue
            plan = _C.plan_packed_attention(
                batch, heads_q, heads_kv, queries, tokens, dim, bits, 16, is_float
            )
            blocks = batch * heads_kv * -(-tokens // 512)
            check(plan["plans"], {"score": blocks}, SHARED_LIMITS[-1])
            assert ("rotate_out" in plan["plans"]) == (is_float and dim == 256)
            at_once = plan["plans"]["decode"]["grid"][0]
            rows = queries * heads_q // heads_kv
            assert plan["items"] == batch * heads_kv * -(-rows // 16)
            assert at_once == plan["items"] or plan["workspace_bytes"] <= 64 << 20


@pytest.mark.parametrize("shared_limit", SHARED_LIMITS)
@pytest.mark.parametrize("is_float", [False, True])
def test_tiles_fit_the_device(is_float: bool, shared_limit: int) -> None:
    """What is too large is in docs/limits.md, and refused by the name of the kernel."""
    small, limit = shared_limit < SHARED_LIMITS[1], {"shared_limit": shared_limit}
    for dim in (32, 64, 96, 128, 256, 576):
        shape = (1, 8, 2, 100, 1000, dim, dim, is_float)
        gradients = ("grad_query", "grad_key") if is_float and dim > 128 and small else ()
        if dim <= 256:
            # Only devices of 227 KB have wgmma.
            check(_C.plan_attention(*shape, **limit), {}, shared_limit, ("wgmma", *gradients))
            listed = _C.plan_decode(*shape, list_heads=8, length=64, block_q=50, **limit)["plans"]
            check(listed, {"forward": 1}, shared_limit, gradients)
        few = _C.plan_decode(1, 8, 2, 1, *shape[4:], **limit)["plans"]
        decode = ("decode",) if is_float and dim > 256 and small else ()
        check(few, {"decode": 1}, shared_limit, (*decode, "grad_query", "grad_key"))
    for dim, bits in itertools.product((64, 128, 256), (1, 4, 8)):
        plans = _C.plan_packed_attention(1, 8, 2, 1, 1000, dim, bits, is_float=is_float, **limit)[
            "plans"
        ]
        check(plans, {"decode": 1}, shared_limit)
    for dim, bits in itertools.product((272, 576), (1, 8)):
        plans = _C.plan_packed_attention(1, 128, 1, 1, 32768, dim, bits, is_float=is_float, **limit)
        check(plans["plans"], {"decode": 8}, shared_limit)
        check(_C.plan_packing(1, 1000, dim, 16), {"pack": 125, "unpack": 125}, shared_limit)
    for rows, aligned in itertools.product((8, 500), (False, True)):
        check(_C.plan_match(9, rows, 1000, is_float, aligned, **limit), {}, shared_limit)


def test_a_device_with_more_has_more_stages() -> None:
    """So many tiles are under way in a block, of warps and stages."""
    shared = [
        _C.plan_decode(1, 32, 8, 1, 131072, dim, dim, shared_limit=limit)["plans"]["decode"]
        for dim, limit in itertools.product((128, 256), SHARED_LIMITS)
    ]
    assert [plan["block"] for plan in shared] == [128, 128, 128, 64, 128, 128]
    kilobytes = [plan["shared_bytes"] // 1024 for plan in shared]
    assert kilobytes == [74, 108, 108, 75, 142, 142]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_attention_on_codes_fits_every_device(bits: int) -> None:
    """Three blocks of 4 bits on an H200, and one where a block may have 99 KB."""
    for group in (16, 32, 128):
        plans = _C.plan_packed_attention(1, 32, 8, 1, 131072, 128, bits, group)["plans"]
        assert plans["codes"]["grid"] == plans["decode"]["grid"]
        assert plans["codes"]["shared_bytes"] <= 75 << 10
        assert plans["score_codes"]["grid"] == (8 * 256, 1, 1)  # chunks of 512 keys
        assert plans["score_codes"]["shared_bytes"] <= 48 << 10
    assert plans["codes"]["shared_bytes"] <= 227 * 1024 // 3
    few = _C.plan_packed_attention(1, 64, 4, 1, 131072, 128, bits, 32)["plans"]
    assert "codes" not in few  # sixteen query rows a key head
