"""eviction_slot and replace_token: which key makes room in a full cache, and what is put there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal
from cases.inputs import FLOATS, generator
from cases.oracle import reference

INF = torch.inf
LENGTH = 90


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def positions(batch: int, heads: int, keys: int) -> Tensor:
    """Different positions below LENGTH, in any order."""
    order = torch.rand(batch * heads, LENGTH, generator=generator(5)).argsort(1)[:, :keys]
    return order.int().view(batch, heads, keys)


def cache(batch: int, heads: int, group: int, keys: int) -> dict[str, Tensor]:
    hidden = torch.rand(batch, heads, keys, generator=generator(2)) < 0.3
    lse = random(batch, heads * group) + 4
    lse[:1, :1] = -INF
    return {
        "scores": random(batch, heads, keys, seed=1).abs(),
        "logits": random(batch, heads * group, keys, seed=2) * 3,
        "lse": lse,
        "bias": random(batch, heads, keys, seed=3).masked_fill(hidden, -INF),
        "start": torch.arange(batch, dtype=torch.int32) * 7,
        "newest": torch.randint(-1, keys + 1, (batch, heads, 1), generator=generator(4)).int(),
    }


RULES: dict[str, dict[str, Any]] = {
    "H2O": {"scores": True, "logits": True, "recent": 20},
    "H2O padded": {"scores": True, "logits": True, "bias": True, "newest": True, "recent": 20},
    "TOVA": {"logits": True, "shared": True},
    "TOVA padded": {"logits": True, "shared": True, "bias": True, "softcap": 3.0},
    "StreamingLLM": {"first": 4},
    "StreamingLLM padded": {"first": 30, "bias": True, "start": True},
    "Knorm": {"scores": True, "largest": True, "first": 2, "recent": 3},
}


def options(rule: str, given: dict[str, Tensor]) -> dict[str, Any]:
    chosen = {name: given[name] if value is True and name in given else value
              for name, value in RULES[rule].items()}  # fmt: skip
    return chosen | ({"lse": given["lse"]} if "logits" in chosen else {})


@pytest.mark.parametrize("rule", RULES)
def test_rules(kernels: Backend, rule: str) -> None:
    for shape in ((2, 2, 3, 70), (1, 3, 1, 16), (3, 1, 2, 5), (2, 1, 1, 1), (0, 2, 1, 4)):
        batch, heads, _, keys = shape
        position, some = positions(batch, heads, keys), options(rule, cache(*shape))
        slot, total = kernels.run("eviction_slot", position, LENGTH, **some)
        wide = {name: x.double() if name in ("scores", "logits", "lse", "bias") else x
                for name, x in some.items()}  # fmt: skip
        exact = reference.eviction_slot(position, LENGTH, **wide)
        single = reference.eviction_slot(position, LENGTH, **some)
        assert_bitwise_equal(slot, exact[0], str(shape))
        assert_as_accurate(total, exact[1], single[1], 1e-6, str(shape))


@pytest.mark.parametrize("shared", [False, True])
def test_the_lowest_is_chosen_of_exact_weights(backend: Backend, shared: bool) -> None:
    """Weights that are powers of two times 1/2 leave no rounding to argue about."""
    position = torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32)
    weight = torch.tensor([[[4.0, 2, 8, 2], [2.0, 2, 1, 2]]])
    slot, total = backend.run(
        "eviction_slot", position, 4, None, weight.log(), torch.zeros(1, 2), shared=shared
    )
    assert slot.tolist() == [[[1]]]
    torch.testing.assert_close(total, torch.tensor([[[3.0, 0, 4.5, 2]]]))


def test_definition(backend: Backend) -> None:
    position = torch.tensor([[[3, 0, 7, 1, 5, 6]]], dtype=torch.int32)
    scores = torch.tensor([[[2.0, 0.5, 0.1, 0.5, 3.0, torch.nan]]])

    def slot(**some: Any) -> int:
        return backend.run("eviction_slot", position, 8, **some)[0].item()

    assert slot() == 1 and slot(first=1) == 3 and slot(first=2) == 0
    assert slot(largest=True) == 2 and slot(largest=True, recent=2) == 4
    assert slot(scores=scores) == 5, "NaN goes first"
    assert slot(scores=scores, recent=3) == 1, "of two alike the one stored first"
    assert slot(scores=scores, largest=True, recent=2) == 4
    hidden = torch.tensor([[[0, 0, 0, 0, -INF, 0.0]]])
    assert slot(scores=scores, bias=hidden) == 4, "hidden keys go, too"
    assert slot(bias=hidden, recent=3) == 4, "however recent"
    assert slot(first=8) == 0, "where all stay, the first"
    assert slot(first=2, start=torch.tensor([3], dtype=torch.int32)) == 1
    empty, total = backend.run("eviction_slot", position[..., :0], 8)
    assert empty.tolist() == [[[-1]]] and total.shape == (1, 1, 0)


def test_large_places(backend: Backend) -> None:
    """float32 does not tell them apart."""
    position = torch.tensor([[[2**24 + 3, 2**24 + 1, 2**24 + 2, 2**31 - 1]]], dtype=torch.int32)
    assert backend.run("eviction_slot", position, 2**31)[0].item() == 1
    assert backend.run("eviction_slot", position, 2**31, first=2**40)[0].item() == 0


def test_any_strides_and_every_cpu(on_every_cpu) -> None:
    given = cache(4, 3, 2, 50)
    position, some = positions(4, 3, 50), options("H2O padded", given)
    expected = tokred.eviction_slot(position, LENGTH, **some)

    def strided(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wide = x.new_zeros(x.shape[1], x.shape[0], x.shape[2] + 3) if x.dim() == 3 else None
        if wide is None:
            return torch.stack([x, x], x.dim())[..., 1]
        view = wide.transpose(0, 1)[:, :, 1 : x.shape[2] + 1]
        return view.copy_(x)

    views = {name: strided(x) for name, x in some.items()}
    results = on_every_cpu(lambda: tokred.eviction_slot(strided(position), LENGTH, **views))
    for name, actual in results.items():
        assert_bitwise_equal(actual, expected, name)
    alone = {name: x[2:3] if isinstance(x, Tensor) else x for name, x in some.items()}
    one = tokred.eviction_slot(position[2:3], LENGTH, **alone)
    assert_bitwise_equal(one, tuple(x[2:3] for x in expected))


# replace_token ------------------------------------------------------------------------------------

SLOTS = torch.tensor([[[0], [4], [-1]], [[5], [2], [2**31 - 1]]], dtype=torch.int32)


def run_in_place(backend: Backend, *args: Any) -> tuple[Tensor, ...]:
    """The tensors that were written; the emulated device and the CPU write where they are."""
    slot, keys, new_keys, values, new_values, position, new_position = args
    written = [x.clone(memory_format=torch.preserve_format) for x in (keys, values, position)]
    moved = [x.to(backend.device) for x in written]
    fixed = [x.to(backend.device) for x in (slot, new_keys, new_values)]
    replace = backend.function("replace_token")
    replace(fixed[0], moved[0], fixed[1], moved[1], fixed[2], moved[2], new_position)
    return tuple(x.cpu() for x in moved)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.int64], ids=str)
def test_replaces_one_token_a_head(kernels: Backend, dtype: torch.dtype) -> None:
    keys, values = ((random(2, 3, 5, d) * 50).to(dtype) for d in (64, 7))
    new_keys, new_values = ((random(2, 3, 1, d, seed=1) * 50).to(dtype) for d in (64, 7))
    position = positions(2, 3, 5)
    args = (SLOTS, keys, new_keys, values, new_values, position, 90)
    expected = [x.clone() for x in (keys, values, position)]
    for b, h, slot in ((0, 0, 0), (0, 1, 4), (1, 1, 2)):
        expected[0][b, h, slot], expected[1][b, h, slot] = new_keys[b, h, 0], new_values[b, h, 0]
        expected[2][b, h, slot] = 90
    assert_bitwise_equal(run_in_place(kernels, *args), tuple(expected))
    assert_bitwise_equal(run_in_place(Backend("reference"), *args), tuple(expected))


def test_replaces_in_views() -> None:
    """A cache with room, tokens as a model projects them, and what lies beside stays."""
    room = random(2, 3, 9, 16)
    keys, values = room[:, :, 2:7, :8], room[:, :, 2:7, 8:]
    new = random(2, 1, 3, 16, seed=1).transpose(1, 2)
    before = room.clone()
    tokred.replace_token(SLOTS, keys, new[..., :8], values, new[..., 8:])
    before[0, 0, 2], before[0, 1, 6], before[1, 1, 4] = new[0, 0, 0], new[0, 1, 0], new[1, 1, 0]
    assert_bitwise_equal(room, before)


def test_in_a_graph() -> None:
    """A step of decoding under torch.compile, which sees what was written."""

    def step(k: Tensor, v: Tensor, position: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        slot, _ = tokred.eviction_slot(position, 9, first=1)
        tokred.replace_token(slot, k, new, v, new, position, 9)
        return k * 1, v * 1, position * 1, slot

    def inputs() -> tuple[Tensor, ...]:
        return (random(2, 3, 5, 8), random(2, 3, 5, 8, seed=1), positions(2, 3, 5),
                random(2, 3, 1, 8, seed=2))  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(*inputs()), step(*inputs()))
