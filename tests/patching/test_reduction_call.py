"""What a layer's call offers to methods that reduce tokens, what it costs, and what they return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tokred
from cases.tiny_models import CASES, PATCHES, Case, heads, is_layer, pooled_of, tokens_of
from tokred.patching import LatentCall, LayerAttention, Patch, Reduction, ReductionCall, Settings

LAYERS = 3


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Reducer:
    """A method that is given as a function, for some of the layers."""

    function: Callable[[ReductionCall], Reduction]
    reduces: Sequence[int] = range(LAYERS)

    adapters = ("timm", "transformers")

    def layers(self, num_layers: int) -> Sequence[int]:
        return self.reduces

    def plan(self, call: ReductionCall) -> Reduction:
        return self.function(call)


def patched(model: nn.Module, reducer: Any, **settings: Any) -> Patch:
    return Patch(model, reducer, Settings(**settings))


class Ops(TorchDispatchMode):
    """Counts the ops that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[op.overloadpacket._qualified_op_name] += 1
        return op(*args, **(kwargs or {}))

    @property
    def of_tokred(self) -> dict[str, int]:
        mine = {n: c for n, c in self.counts.items() if n.startswith("tokred::")}
        return {name.removeprefix("tokred::"): count for name, count in mine.items()}


# What it offers.


def attention_of(layer: nn.Module) -> nn.Module:
    names = ("attn", "attention", "self_attn")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def projected(attn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as the attention uses them."""
    if hasattr(attn, "qkv"):
        q, k, v = (heads(part, attn.num_heads) for part in attn.qkv(x).chunk(3, -1))
        return attn.q_norm(q), attn.k_norm(k), v
    return tuple(heads(getattr(attn, f"{name}_proj")(x), 2) for name in "qkv")


@pytest.mark.parametrize("prop_attn", [True, False])
@torch.no_grad()
def test_everything_as_in_plain_torch(case: Case, pixels: Tensor, prop_attn: bool) -> None:
    """In a layer without and one with sizes, behind one that merged."""
    calls: list[ReductionCall] = []

    def keep(call: ReductionCall) -> Reduction:
        calls.append(call)
        if call.layer:
            return None
        matched = tokred.bipartite_soft_matching(call.mean_keys, 5, call.num_prefix)
        return matched, call.x.shape[1] - 5

    model, inputs = case.model(), []
    layers = [module for module in model.modules() if is_layer(module)]
    for layer in layers:
        attention_of(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with patched(model, Reducer(keep), prop_attn=prop_attn) as handle:
        pooled_of(model, pixels)
    assert [call.layer for call in calls] == [0, 1, 2]
    assert handle.counts == (PATCHES + case.num_prefix, PATCHES + case.num_prefix - 5)
    for call, layer, x in zip(calls, layers, inputs, strict=True):
        q, k, v = projected(attention_of(layer), x)
        for actual, expected in ((call.q, q), (call.k, k), (call.v, v)):
            torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(call.mean_keys, k.mean(1))
        assert (call.num_layers, call.num_prefix) == (LAYERS, case.num_prefix)
        assert call.x.shape == x.shape and (call.size is None) == (call.layer == 0)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if prop_attn and call.size is not None:
            logits = logits + call.size.log()[:, None, None]
        weights = logits.softmax(-1)
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
        close(call.attention_rows([2, 0]), weights[:, :, [2, 0]])
        close(call.attention_rows(slice(1, 4)), weights[:, :, 1:4])
        close(call.received_attention(), weights.mean(2))
        close(call.received_attention("sum"), weights.sum(2))
        close(call.received_attention("max"), weights.amax(2))
        if case.num_prefix:
            close(call.class_attention(), weights[:, :, 0])
        else:
            with pytest.raises(ValueError, match="class token"):
                call.class_attention()


def test_what_is_not_there_is_refused() -> None:
    call = LatentCall(torch.zeros(2, 6, 4), layer=0, num_layers=1)
    for read in ("q", "k", "v", "mean_keys", "attention_rows"):
        with pytest.raises(ValueError, match="do not offer"):
            value = getattr(call, read)
            value([0])
    with pytest.raises(ValueError, match="reduce must be"):
        call.received_attention("median")


@torch.no_grad()
def test_float64_is_scored_in_float32(pixels: Tensor) -> None:
    rows: list[Tensor] = []

    def ask(call: ReductionCall) -> Reduction:
        rows.extend([call.class_attention(), call.received_attention(), call.mean_keys])
        return tokred.bipartite_soft_matching(call.mean_keys, 3, 1), call.x.shape[1] - 3

    with patched(CASES[0].model().double(), Reducer(ask)) as handle:
        handle.model(pixels.double())
    assert len(rows) == 3 * LAYERS
    assert all(row.dtype == torch.float32 and row.isfinite().all() for row in rows)


# What it costs.


@pytest.mark.parametrize("name", ["timm-everything", "dinov2"])
@torch.no_grad()
def test_a_method_that_asks_nothing_costs_nothing(name: str, pixels: Tensor) -> None:
    """Not one op more than the model's own, but for the sizes before the first layer."""
    model = next(case for case in CASES if case.name == name).model()
    with Ops() as unpatched:
        pooled_of(model, pixels)
    with patched(model, Reducer(lambda call: None)), Ops() as ops:
        pooled_of(model, pixels)
    assert ops.counts - unpatched.counts == Counter({"aten::ones": 1, "aten::expand": 1})
    assert not unpatched.counts - ops.counts


@pytest.mark.parametrize("name", ["timm-everything", "dinov2"])
@torch.no_grad()
def test_tome_pays_for_the_mean_keys_alone(name: str, pixels: Tensor) -> None:
    model = next(case for case in CASES if case.name == name).model()
    plans: Counter[str] = Counter()
    with tokred.patch(model, "tome", r=4) as handle:
        tome = handle.method

    def plan(call: ReductionCall) -> Reduction:
        with Ops() as inside:
            reduction = tome.plan(call)
        plans.update(inside.counts)
        return reduction

    with patched(model, Reducer(plan)), Ops() as ops:
        pooled_of(model, pixels)
    views = {"aten::detach", "aten::view", "aten::transpose"}
    computing = {name: count for name, count in plans.items() if name not in views}
    assert computing == {"aten::mean": LAYERS, "tokred::bipartite_soft_matching": LAYERS}
    expected = {"bipartite_soft_matching": LAYERS, "merge": LAYERS, "biased_attention": LAYERS - 1}
    assert ops.of_tokred == expected


# What a method returns, and what it leaves for later layers.


@pytest.mark.parametrize("name", ["timm", "vit", "siglip"])
@torch.no_grad()
def test_dropping_leaves_attention_as_it_is(name: str, pixels: Tensor) -> None:
    """No token has a size: all layers attend as the model does, rows are had where asked for."""
    case = next(case for case in CASES if case.name == name)
    model = case.model()
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    with Ops() as plain:
        pooled_of(model, pixels)

    def keep(call: ReductionCall) -> Reduction:
        call.attention_rows(slice(0, 1))
        return torch.arange(20, dtype=torch.int32).repeat(len(call.x), 1)

    with patched(model, Reducer(keep, [1])) as handle, Ops() as ops:
        pooled_of(model, pixels)
    assert handle.counts == (PATCHES + case.num_prefix, 20)
    assert torch.equal(handle.size, torch.ones(2, 20))
    assert ops.of_tokred == {"attention_rows": 1, "unmerge": 1}
    assert ops.counts[fused] == plain.counts[fused] >= LAYERS


def most_attended(call: ReductionCall, keep: int = 20) -> Reduction:
    """The class token and those that it attends to most, in order."""
    scores = call.class_attention().mean(1)[:, 1:]
    kept = scores.topk(keep, dim=1).indices.sort(dim=1).values + 1
    return nn.functional.pad(kept, (1, 0)).int()


@pytest.mark.parametrize("name", ["timm", "vit"])
@torch.no_grad()
def test_tokens_that_stay(name: str, pixels: Tensor) -> None:
    """Indices leave the other tokens out: those that stay keep their values."""
    model = next(case for case in CASES if case.name == name).model()
    seen: list[Tensor] = []

    def keep(call: ReductionCall) -> Reduction:
        kept = most_attended(call)
        seen.extend([call.x, kept])
        return kept

    layers = [module for module in model.modules() if is_layer(module)]
    names = ("norm2", "layernorm_after")
    norm = next(getattr(layers[1], n) for n in names if hasattr(layers[1], n))
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with patched(model, Reducer(keep, [1]), trace_source=True) as handle:
        tokens = tokens_of(model, pixels)
        restored = handle.unmerge(tokens)
    x, kept, after = seen
    kept = kept.long()
    assert handle.counts == (37, 21) and torch.equal(handle.size, torch.ones(2, 21))
    assert torch.equal(after, x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])))
    expected = torch.zeros_like(restored)
    expected.scatter_(1, kept[..., None].expand(-1, -1, x.shape[2]), tokens)
    assert torch.equal(restored, expected)
    assert ((handle.token_map == -1).sum(1) == 16).all()


def early_attention(call: ReductionCall) -> Reduction:
    """The last layer keeps the tokens that the first one's class token attends to most."""
    if call.layer == 0:
        call.carried["attention"] = call.class_attention().mean(1)
        return None
    kept = call.carried["attention"].topk(20, dim=1).indices.sort(dim=1).values
    return kept.int()


@pytest.mark.parametrize("name", ["timm", "deit"])
def test_what_is_carried_serves_recomputed_layers(name: str, pixels: Tensor) -> None:
    model = next(case for case in CASES if case.name == name).model()
    layers = [module for module in model.modules() if is_layer(module)]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        pooled_of(model, pixels).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with patched(model, Reducer(early_attention, [0, 2])) as handle:
        expected = gradients()
        assert handle.counts == (PATCHES + model_prefix(name), 20)
        for layer in layers:
            plain = layer.forward
            layer.forward = partial(checkpoint, plain, use_reentrant=False)
        actual = gradients()
        for layer in layers:
            layer.forward = layer.forward.args[0]
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def model_prefix(name: str) -> int:
    return next(case for case in CASES if case.name == name).num_prefix


@dataclass(frozen=True)
class Everything:
    """Reads all that a call offers, and carries it on."""

    asked: tuple[str, ...] = field(default=("q", "k", "v", "mean_keys"))

    adapters = ("timm", "transformers")

    def layers(self, num_layers: int) -> range:
        return range(num_layers)

    def plan(self, call: ReductionCall) -> Reduction:
        earlier = call.carried.get("score")
        scores = call.received_attention().mean(1) + call.attention_rows([1]).mean((1, 2))
        for name in self.asked:
            scores = scores + getattr(call, name).mean().abs()
        if earlier is not None:
            scores = scores + earlier.mean(1, keepdim=True)
        call.carried["score"] = scores
        kept = scores[:, call.num_prefix :].topk(call.x.shape[1] - call.num_prefix - 3, 1).indices
        kept = kept.sort(dim=1).values + call.num_prefix
        prefix = torch.arange(call.num_prefix).expand(kept.shape[0], -1)
        return torch.cat([prefix, kept], 1).int()


@pytest.mark.parametrize("name", ["timm-everything", "dinov2-registers"])
@torch.no_grad()
def test_compiles_to_one_graph(name: str, pixels: Tensor) -> None:
    model = next(case for case in CASES if case.name == name).model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with patched(model, Everything(), trace_source=True) as handle:
        expected, source = pooled_of(model, pixels), handle.token_map
        torch.testing.assert_close(pooled_of(compiled, pixels), expected)
        assert torch.equal(handle.token_map, source)
        assert handle.counts[-1] == handle.counts[0] - 3 * LAYERS


def test_references_alone_are_kept() -> None:
    """A layer's attention keeps what its modules returned, and reads it when asked."""
    output, reads = torch.randn(1, 4, 6), []

    def in_heads(x: Tensor) -> Tensor:
        reads.append(x)
        return heads(x, 2)

    attention = LayerAttention({"k": (output, in_heads)})
    call = ReductionCall(torch.zeros(1, 4, 8), 0, 1, attention=attention)
    assert not reads
    assert call.k.data_ptr() == output.data_ptr() and len(reads) == 1
    assert call.mean_keys is call.mean_keys and len(reads) == 2
