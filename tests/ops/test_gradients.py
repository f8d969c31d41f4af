"""Every op and every float argument: a right gradient, a refusal, or a result that has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

import tokred
from cases.compare import assert_bitwise_equal, flat
from cases.inputs import generator
from cases.op_calls import CALLS, Sizes
from cases.oracle import reference
from tokred import PackFormat

OPS = torch.ops.tokred
FORMAT = PackFormat(4, 16)
WIDE = torch.float64


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(sum(shape)), dtype=dtype)


def whole(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


MAP = whole([0, 1, -1, 2, 0, 2], [2, 1, 0, 9, 0, 1])


CHOICES = (
    "linear_assignment", "forest_roots", "connected_components", "dpc_knn", "greedy_select",
    "kmeans", "kmedoids", "local_soft_kmeans",
)  # fmt: skip


def differentiable_calls() -> dict[str, tuple]:
    """Calls in float64, with every argument that has a gradient."""
    x, size, weight = (floats(*s, dtype=WIDE) for s in ((2, 6, 3), (2, 6), (2, 6)))
    size, weight = size.abs() + 0.5, weight.abs() + 0.5
    q, k, v = (floats(*s, dtype=WIDE) for s in ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3)))
    bias = floats(2, 2, 5, dtype=WIDE)
    blocks = torch.rand(2, 4, 2, 3, generator=generator()) < 0.7
    lists = whole([0, 3, 1], [4, -1, 2]).view(2, 1, 1, 3)
    return {
        "merge": (x, MAP, 3, size, weight, "mean"),
        "unmerge": (x[:, :3].clone(), MAP),
        "biased_attention": (q, k, v, bias, True, None, floats(1, 4, 3, 5, dtype=WIDE)),
        "sparse_attention": (q, k, v, lists, None, bias, True, None, 3),
        "block_sparse_attention": (q, k, v, blocks, 2, 2, True, None, bias),
        "linear_attention": (
            q, k[:, :, :3].clone(), v[:, :, :3].clone(), floats(2, dtype=WIDE).abs(),
            floats(2, 2, 4, 3, dtype=WIDE), 0.5, torch.tensor([[True, False, True]]),
        ),
        "segment_weights": (MAP, 3, "softmax", weight),
        "ema_scan": (x, floats(2, 6, dtype=WIDE).sigmoid(), x[:, 0].clone()),
    }  # fmt: skip


def refused_calls() -> dict[str, tuple]:
    x, q, k = floats(2, 6, 8), floats(2, 4, 3, 8), floats(2, 2, 5, 8)
    lse, wide = floats(2, 4, 3), floats(2, 2, 8, 16)
    packed = reference.kv_pack(wide, *astuple(FORMAT)).arguments()
    query, window, bias = floats(2, 4, 3, 16), floats(2, 2, 4, 16), floats(2, 2, 12)
    return {
        "merge_out": (x, MAP, x[..., 0].abs(), x[..., 1].abs(), "sum", floats(2, 3, 8), lse[:, 0]),
        "combine_states": (q, lse, q.flip(0), lse.flip(0)),
        "unmerged_attention": (
            q, k, floats(2, 2, 5, 3), MAP, floats(1, 6, 4).cos(), floats(1, 6, 4).sin(),
        ),
        "gather_tokens": ([x, x[..., 0].contiguous()], MAP, [1, 1]),
        "qk_score": (q, k),
        "block_pool": (k, 2),
        "block_score": (q, k[:, :, :, None].contiguous()),
        "attention_rows": (q, k),
        "attention_columns": (q, k, lse, "sum", floats(2, 4, 3)),
        "pagerank": (floats(2, 4, 5, 8), k, floats(2, 4, 5), 2, 0.1, floats(2, 4, 5).abs()),
        "similarity_stats": (x, x[:, :4].contiguous()),
        "transition_stats": (x, x + 1),
        "kv_pack": (wide, *astuple(FORMAT)),
        "kv_unpack": (*packed, "float32"),
        "kv_unpack_into": (*packed, floats(2, 2, 8, 16)),
        "kv_append": (window, *packed[:2], floats(2, 2, 4, 16), 2, *packed[2:]),
        "packed_attention": (query, *packed, *packed, window, window, None, None, None, bias),
        "packed_qk_score": (query, *packed, window),
        **{name: CALLS[name](Sizes()) for name in (
            "adjacent_runs", "eviction_slot", "replace_token",
        )},
    }  # fmt: skip


# Differentiable ops whose kernels have no float64: the arguments that have a gradient.
NARROW = {"knn_reconstruct": ("deep",), "sinkhorn": ("x", "anchors")}


def choosing_calls() -> dict[str, tuple]:
    x, scores = floats(2, 6, 8), floats(2, 3, 7)
    weight = x[..., 0].abs()
    return {
        "match": (x, x.flip(1), None, None, weight, weight),
        "bipartite_soft_matching": (x, 2),
        "threshold_matching": (x, 0.1),
        "compose": (MAP, MAP),
        "topk": (scores, 3),
        "compact": (scores, 0.1),
        "inverse_transform_sample": (scores.abs(), 3),
        **{op: CALLS[op](Sizes()) for op in CHOICES},
    }


def backward_calls() -> dict[str, tuple]:
    """What the differentiable ops call, in float64 where they have it."""
    calls = differentiable_calls()
    x, token_map, slots, size, weight, mode = calls["merge"]
    grad_y, grad_size = floats(2, slots, 3, dtype=WIDE), floats(2, slots, dtype=WIDE)
    result = {"merge_backward": (grad_y, grad_size, x, token_map, size, weight, mode)}
    q, k, v, bias, *_ = calls["biased_attention"]
    out, lse = OPS.biased_attention(q, k, v, bias)
    grads = (floats(*out.shape, dtype=WIDE), floats(*lse.shape, dtype=WIDE))
    state = (out, lse)
    result["biased_attention_backward"] = (
        (*grads, q, k, v, bias, *state, False, None, None, None, None)
    )  # fmt: skip
    mask = calls["biased_attention"][6]
    result["biased_attention_mask_backward"] = (
        (*grads, q, k, v, bias, *state, False, None, mask, None, None)
    )  # fmt: skip
    lists, blocks = calls["sparse_attention"][3], calls["block_sparse_attention"][3]
    result["sparse_attention_backward"] = (
        (*grads, q, k, v, lists, *state, None, bias, False, None, 3)
    )  # fmt: skip
    result["block_sparse_attention_backward"] = (
        (*grads, q, k, v, blocks, 2, 2, *state, False, None, bias, None)
    )  # fmt: skip
    linear = calls["linear_attention"]
    result["linear_attention_backward"] = (
        floats(2, 4, 3, 3, dtype=WIDE), floats(2, 2, 4, 3, dtype=WIDE), *linear
    )  # fmt: skip
    token_map, segments, mode, weight = calls["segment_weights"]
    weights = OPS.segment_weights(token_map, segments, mode, weight)
    result["segment_weights_backward"] = (
        floats(2, 6, dtype=WIDE), weights, token_map, segments, mode, weight, None, None
    )  # fmt: skip
    c, p, before = calls["ema_scan"]
    z, _ = OPS.ema_scan(c, p, before)
    result["ema_scan_backward"] = (floats(2, 6, 3, dtype=WIDE), before, c, p, before, None, z)
    result |= {f"{op}_backward": CALLS[f"{op}_backward"](Sizes()) for op in NARROW}
    return result


DIFFERENTIABLE, REFUSED = differentiable_calls(), refused_calls()
CHOOSING, BACKWARD = choosing_calls(), backward_calls()
CONSTANT = {("linear_attention", 3)}  # the decay: an argument of such an op without a gradient


def float_arguments(calls: dict[str, tuple]) -> list[tuple[str, int, int | None]]:
    """(op, place of the argument, place in its list) of every float tensor."""
    found = []
    for name, args in calls.items():
        for i, value in enumerate(args):
            items = enumerate(value) if isinstance(value, list) else [(None, value)]
            for j, item in items:
                if isinstance(item, Tensor) and item.is_floating_point():
                    found.append((name, i, j))
    return found


def needing(args: tuple, place: int, item: int | None) -> list[Any]:
    """Copies of the arguments, one of which requires grad."""
    copies = list(tree_map_only(Tensor, torch.clone, args))
    target = copies[place] if item is None else copies[place][item]
    target.requires_grad_()
    return copies


def argument(name: str, place: int) -> str:
    return getattr(OPS, name).default._schema.arguments[place].name


def test_every_op_is_listed() -> None:
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if "tokred::" in n}
    assert names == {*DIFFERENTIABLE, *NARROW, *REFUSED, *CHOOSING, *BACKWARD}


@pytest.mark.parametrize(
    ("name", "place", "item"),
    [found for found in float_arguments(DIFFERENTIABLE) if found[:2] not in CONSTANT],
)
def test_gradients_are_right(name: str, place: int, item: int | None) -> None:
    args = needing(DIFFERENTIABLE[name], place, item)

    def function(t: Tensor) -> Any:
        results = getattr(OPS, name)(*args[:place], t, *args[place + 1 :])
        return tuple(r for r in flat(results) if r.requires_grad)

    assert torch.autograd.gradcheck(function, (args[place],))


@pytest.mark.parametrize(
    ("name", "place", "item"), float_arguments({op: CALLS[op](Sizes()) for op in NARROW})
)
def test_gradients_without_float64(name: str, place: int, item: int | None) -> None:
    call, label = CALLS[name](Sizes()), argument(name, place)
    args = needing(call, place, item)
    if label not in NARROW[name]:
        with pytest.raises(ValueError, match=f"gradients in .* alone, but {label} requires grad"):
            getattr(OPS, name)(*args)
        return
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in call]
    wide[place].requires_grad_()
    found = [r for r in flat(getattr(OPS, name)(*args)) if r.requires_grad]
    expected = flat(getattr(reference, name)(*wide))[: len(found)]
    weights = [floats(*r.shape) for r in found]
    losses = [
        sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True))
        for results in (found, expected)
    ]
    actual, exact = (torch.autograd.grad(loss, given[place])[0] for loss, given in
                     zip(losses, (args, wide), strict=True))  # fmt: skip
    assert actual.abs().sum() > 0
    torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "place", "item"), float_arguments(REFUSED))
def test_inputs_without_a_gradient_are_refused(name: str, place: int, item: int | None) -> None:
    args = needing(REFUSED[name], place, item)
    label = argument(name, place) + ("" if item is None else f"[{item}]")
    with pytest.raises(ValueError, match="no gradient, but " + label.replace("[", r"\[")):
        getattr(OPS, name)(*args)
    for actual, before in zip(args, REFUSED[name], strict=True):
        if isinstance(before, Tensor):
            assert torch.equal(actual, before)
    plain = needing(REFUSED[name], place, item)
    with torch.no_grad():
        expected = getattr(OPS, name)(*plain)
    results = [] if expected is None else flat(expected)
    assert not any(t.requires_grad for t in results)
    with torch.inference_mode():
        again = getattr(OPS, name)(*needing(REFUSED[name], place, item))
    if results:
        assert_bitwise_equal(again, expected)


@pytest.mark.parametrize(("name", "place", "item"), float_arguments(CHOOSING))
def test_choices_never_require_grad(name: str, place: int, item: int | None) -> None:
    results = getattr(OPS, name)(*needing(CHOOSING[name], place, item))
    assert_bitwise_equal(results, getattr(OPS, name)(*CHOOSING[name]))
    assert not any(t.requires_grad for t in flat(results))


def test_the_public_functions_refuse_too() -> None:
    x, k = floats(2, 2, 8, 16), floats(2, 2, 8, 16).requires_grad_()
    packed = tokred.kv_pack(x, 4, 16)
    params = tokred.PackedKV(packed.codes, packed.params.clone().requires_grad_(), packed.format)
    q, bias = floats(2, 4, 3, 16), floats(2, 8).requires_grad_()
    lists, angles = torch.zeros(2, 1, 3, 2, dtype=torch.int32), floats(2, 8).requires_grad_()
    out, lse = tokred.biased_attention(q, k, x)
    room = FORMAT.empty(2, 2, 8, 16)
    for call, name in (
        (lambda: tokred.packed_attention(q, packed, packed, key_bias=bias), "key_bias"),
        (lambda: tokred.packed_attention(q, params, packed), "k_params"),
        (lambda: tokred.packed_attention(q, packed, params), "v_params"),
        (lambda: tokred.packed_qk_score(q, params), "params"),
        (lambda: tokred.kv_unpack(params), "params"),
        (lambda: tokred.kv_unpack(params, out=x.clone()), "params"),
        (lambda: tokred.kv_unpack(packed, out=x.clone().requires_grad_()), "out"),
        (lambda: tokred.kv_append(k, room, 0), "x"),
        (lambda: tokred.attention_columns(q, x, lse), "lse"),
        (lambda: tokred.combine_states(out, lse.detach(), out, lse), "out_a"),
        (lambda: tokred.sparse_attention(q, x, x, lists, rope_cos=angles, rope_sin=angles), "rope"),
    ):
        with pytest.raises(ValueError, match=f"but {name}.* requires grad"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.parametrize("compiled", [False, True])
def test_refusals_under_compile(compiled: bool) -> None:
    def function(q: Tensor, k: Tensor) -> Tensor:
        return tokred.qk_score(q * 2, k)

    run = torch.compile(function, backend="aot_eager") if compiled else function
    q, k = floats(2, 4, 3, 8), floats(2, 2, 5, 8)
    with pytest.raises((ValueError, RuntimeError), match="qk_score has no gradient, but q"):
        run(q.clone().requires_grad_(), k)
    with torch.no_grad():
        assert_bitwise_equal(run(q.clone().requires_grad_(), k), function(q, k))


@pytest.mark.parametrize("mode", ["sum", "mean", "plain_mean", "prune", "halving"])
def test_second_derivatives_of_linear_merges(mode: str) -> None:
    x, token_map, slots, size, weight, _ = DIFFERENTIABLE["merge"]
    leaf = x.clone().requires_grad_()

    def second(merge: Callable, t: Tensor) -> Tensor:
        y, _ = merge(t, token_map, slots, size, weight, mode)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), t, create_graph=True)
        return gradient

    actual, expected = (
        torch.autograd.grad(second(merge, leaf).square().sum(), leaf)[0]
        for merge in (tokred.merge, reference.merge)
    )
    torch.testing.assert_close(actual, expected)
    assert actual.abs().sum() > 0
    assert torch.autograd.gradgradcheck(
        lambda t: tokred.merge(t, token_map, slots, size, weight, mode)[0], leaf
    )


def test_second_derivatives_of_unmerge() -> None:
    y = DIFFERENTIABLE["unmerge"][0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: tokred.unmerge(t.pow(2), MAP), y)


def second_derivatives() -> dict[str, tuple[Callable, list[Tensor]]]:
    x, token_map, slots, size, weight, _ = DIFFERENTIABLE["merge"]
    calls: dict[str, tuple[Callable, list[Tensor]]] = {}
    for mode in ("amax", "amin", "maxnorm"):
        calls[f"merge {mode}"] = (
            lambda t, mode=mode: tokred.merge(t, token_map, slots, mode=mode)[0],
            [x],
        )
    calls["merge size"] = (lambda t, s: tokred.merge(t, token_map, slots, s)[0], [x, size])
    calls["merge weight"] = (
        lambda t, w: tokred.merge(t, token_map, slots, None, w, "sum")[0],
        [x, weight],
    )
    q, k, v, bias, *_ = DIFFERENTIABLE["biased_attention"]
    lists, blocks = (
        DIFFERENTIABLE["sparse_attention"][3],
        DIFFERENTIABLE["block_sparse_attention"][3],
    )
    calls["biased_attention"] = (lambda *t: tokred.biased_attention(*t)[0], [q, k, v, bias])
    calls["sparse_attention"] = (
        lambda q, k, v: tokred.sparse_attention(q, k, v, lists)[1],
        [q, k, v],
    )
    calls["block_sparse_attention"] = (
        lambda q, k, v: tokred.block_sparse_attention(q, k, v, blocks, 2, 2)[0],
        [q, k, v],
    )
    return calls


SECOND = second_derivatives()


@pytest.mark.parametrize("case", SECOND)
def test_second_derivatives_that_do_not_exist_are_refused(case: str) -> None:
    function, tensors = SECOND[case]
    leaves = [t.clone().requires_grad_() for t in tensors]
    # The graph of the first derivative may exist; only its own derivative may not.
    grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    for actual, once in zip(grads, expected, strict=True):
        assert torch.equal(actual.detach(), once)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_ops_are_differentiable_once(name: str) -> None:
    places = [i for n, i, _ in float_arguments({name: BACKWARD[name]}) if n == name]
    for place in places:
        results = getattr(OPS, name)(*needing(BACKWARD[name], place, None))
        with pytest.raises(RuntimeError, match="second derivative"):
            sum(r.sum() for r in results).backward()


def test_forward_mode_is_refused() -> None:
    x, q = floats(2, 6, 8), floats(2, 4, 3, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (
            lambda: tokred.merge(dual, MAP, 3),
            lambda: OPS.transition_stats(dual, x),
            lambda: tokred.gather_tokens([x, dual], MAP),
        ):
            with pytest.raises(ValueError, match="forward mode"):
                call()
        assert_bitwise_equal(tokred.qk_score(q, q), tokred.qk_score(q, q))


@pytest.mark.parametrize("mode", ["amax", "amin"])
def test_the_oracle_shares_no_gradient_with_an_extreme_of_0(mode: str) -> None:
    sign = 1 if mode == "amax" else -1
    x = sign * torch.tensor([[[0.0], [-1.0], [0.0], [-2.0]]])
    token_map = whole([0, 0, 1, 1])
    for merge in (tokred.merge, reference.merge):
        leaf = x.clone().requires_grad_()
        merge(leaf, token_map, 3, mode=mode)[0].sum().backward()
        assert leaf.grad.flatten().tolist() == [1, 0, 1, 0]
