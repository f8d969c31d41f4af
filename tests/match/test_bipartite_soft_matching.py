"""bipartite_soft_matching and threshold_matching: the plan, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference


def signs(batch: int, tokens: int, channels: int = 16, seed: int = 0) -> Tensor:
    """Rows of +-1: every cosine is a multiple of 1/8, exact in any arithmetic, ties everywhere."""
    bits = torch.randint(0, 2, (batch, tokens, channels), generator=generator(seed))
    return bits * 2.0 - 1


@dataclass(frozen=True)
class Case:
    tokens: int
    r: int
    num_prefix: int = 0
    order: str = "tome"
    mask: str = "none"
    sides: str = "default"
    special: float | None = None
    batch: int = 2

    def metric(self) -> Tensor:
        metric = signs(self.batch, self.tokens)
        if self.special is not None:
            metric[:, 1::3, 5] = self.special
            metric[:, 4::9] = self.special
        return metric

    def options(self) -> tuple:
        rng = generator(5)
        mask = None
        if self.mask != "none":
            chance = {"some": 0.7, "nothing": 0.0, "few": 0.2}[self.mask]
            mask = torch.rand(self.batch, self.tokens, generator=rng) < chance
        sources = destinations = None
        if self.sides == "listed":
            order = torch.randperm(self.tokens, generator=rng).int()
            third = self.tokens // 3
            sources, destinations = order[third:], order[:third][None]
        elif self.sides == "garbage":
            low, high, extreme = -3, self.tokens + 3, torch.iinfo(torch.int32)
            shape = (self.batch, self.tokens + 2)
            sources, destinations = (
                torch.randint(low, high, shape, generator=rng, dtype=torch.int32) for _ in range(2)
            )
            sources[:, 1], sources[:, 2] = extreme.min, extreme.max
            destinations = destinations[:, : self.tokens // 2 + 1]
            destinations[:, 0] = extreme.max
        elif self.sides == "no destination":
            sources = torch.arange(self.tokens, dtype=torch.int32)
            destinations = torch.zeros(0, dtype=torch.int32)
        return self.num_prefix, mask, self.order, sources, destinations

    def sources(self) -> Tensor | None:
        return self.options()[3]


ORDERS = ("tome", "position")
CASES = [
    *(
        Case(tokens, r, prefix, order)
        for tokens in (0, 1, 2, 3, 9, 34)
        for prefix in (0, 1, 2, 5)
        for r, order in ((0, "tome"), (1, "position"), (3, "tome"), (1000, "position"))
    ),
    *(
        Case(33, r, prefix, order, mask, sides)
        for r in (0, 12, 40)
        for prefix in (0, 1)
        for order in ORDERS
        for mask in ("none", "some")
        for sides in ("default", "listed", "garbage")
    ),
    *(
        Case(21, 6, p, order, mask)
        for p in (0, 1)
        for order in ORDERS
        for mask in ("nothing", "few")
    ),
    *(
        Case(20, r, p, order, sides="no destination")
        for r in (0, 4)
        for p in (0, 2)
        for order in ORDERS
    ),
    *(
        Case(40, r, prefix, order, special=value)
        for value in (0.0, torch.nan, torch.inf)
        for r in (3, 20)
        for prefix, order in ((0, "tome"), (1, "position"))
    ),
    Case(9, 2, batch=0),
    Case(197, 16, 1),
    Case(2501, 800),
    Case(2500, 700, 1, "position", mask="some"),
]


@cache
def expected_map(case: Case) -> Tensor:
    return reference.bipartite_soft_matching(case.metric().double(), case.r, *case.options())


@cache
def expected_threshold_map(case: Case, threshold: float) -> tuple[Tensor, Tensor]:
    return reference.threshold_matching(case.metric().double(), threshold, *case.options())


@pytest.mark.parametrize("case", CASES, ids=label)
def test_map_equals_the_reference(backend: Backend, case: Case) -> None:
    metric, options = case.metric(), case.options()
    token_map = backend.run("bipartite_soft_matching", metric, case.r, *options)
    assert_bitwise_equal(token_map, expected_map(case))
    slots = tokred.num_out(case.tokens, case.r, case.num_prefix, case.sources())
    assert token_map.numel() == 0 or -1 <= token_map.min() <= token_map.max() < slots
    if case.mask == "none" and case.sides == "default":
        assert all(len(row[row >= 0].unique()) == slots for row in token_map)


@pytest.mark.parametrize("case", [c for c in CASES[::3] if c.tokens < 1000], ids=label)
def test_threshold_map_equals_the_reference(backend: Backend, case: Case) -> None:
    metric, options = case.metric(), case.options()
    for threshold in (-torch.inf, 0.0, 0.25, 0.5, torch.inf):
        expected = expected_threshold_map(case, threshold)
        token_map, num_out = backend.run("threshold_matching", metric, threshold, *options)
        assert_bitwise_equal((token_map, num_out), expected, f"threshold {threshold}")
        for row, count in zip(token_map, num_out.tolist(), strict=True):
            assert sorted(row[row >= 0].unique().tolist()) == list(range(count))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_and_layout(kernels: Backend, dtype: torch.dtype) -> None:
    metric = signs(2, 29, 64)
    expected = reference.bipartite_soft_matching(metric, 9, 1)
    view = torch.stack([metric, metric], 2)[:, :, 1].to(dtype)
    strided = view.transpose(0, 1).contiguous().transpose(0, 1)
    for variant in (view, strided):
        assert_bitwise_equal(kernels.run("bipartite_soft_matching", variant, 9, 1), expected)


def tome(metric: Tensor, r: int, class_token: bool, distill_token: bool):
    """ToMe's published matching; returns the function that applies it with a reduction."""
    tokens = metric.shape[1]
    r = min(r, (tokens - class_token - distill_token) // 2)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if class_token:
        scores[:, 0] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    strength, partner = scores.max(-1)
    edges = strength.argsort(-1, descending=True)
    kept, gone = edges[:, r:], edges[:, :r]
    if class_token:
        kept = kept.sort(-1).values
    target = partner.gather(1, gone)

    def apply(x: Tensor, reduce: str = "sum") -> Tensor:
        def pick(index: Tensor) -> Tensor:
            return index[..., None].expand(-1, -1, x.shape[2])

        source, destination = x[:, ::2], x[:, 1::2]
        moved = source.gather(1, pick(gone))
        destination = destination.scatter_reduce(1, pick(target), moved, reduce)
        stayed = source.gather(1, pick(kept))
        if distill_token:
            parts = (stayed[:, :1], destination[:, :1], stayed[:, 1:], destination[:, 1:])
            return torch.cat(parts, 1)
        return torch.cat([stayed, destination], 1)

    return apply


@pytest.mark.parametrize("r", [1, 8, 16, 200])
@pytest.mark.parametrize("tokens", [50, 97])
@pytest.mark.parametrize("num_prefix", [0, 1, 2])
def test_equals_tome(backend: Backend, tokens: int, num_prefix: int, r: int) -> None:
    """On data without ties: the same members in the same slots, from one-hot tokens."""
    metric = torch.randn(2, tokens, 32, generator=generator(11))
    apply = tome(metric.double(), r, num_prefix >= 1, num_prefix == 2)
    onehot = torch.eye(tokens, dtype=torch.double).expand(2, -1, -1)
    token_map = backend.run("bipartite_soft_matching", metric, r, num_prefix)
    num_out = tokred.num_out(tokens, r, num_prefix)
    members, size = reference.merge(onehot, token_map, num_out, mode="sum")
    assert torch.equal(members, apply(onehot))
    assert torch.equal(size, apply(torch.ones(2, tokens, 1).double())[..., 0])


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_position_order_is_tome_order_renumbered(kernels: Backend, num_prefix: int) -> None:
    metric = torch.randn(3, 41, 16, generator=generator(4))
    tome_map = kernels.run("bipartite_soft_matching", metric, 12, num_prefix)
    by_position = kernels.run("bipartite_soft_matching", metric, 12, num_prefix, None, "position")
    for a, b in zip(tome_map.tolist(), by_position.tolist(), strict=True):
        first_seen = {slot: number for number, slot in enumerate(dict.fromkeys(a))}
        assert b == [first_seen[slot] for slot in a]


def test_destinations_alone_make_the_others_sources() -> None:
    metric = signs(2, 13)
    destinations = torch.tensor([[4, 7, 12], [3, 11, 5]], dtype=torch.int32)
    for side in (destinations, destinations[:1], destinations[0]):
        rows = side.reshape(-1, 3).tolist()
        others = [[t for t in range(1, 13) if t not in row] for row in rows]
        sources = torch.tensor(others, dtype=torch.int32)
        both = tokred.bipartite_soft_matching(metric, 4, 1, None, "tome", sources, side)
        alone = tokred.bipartite_soft_matching(metric, 4, 1, destinations=side)
        assert_bitwise_equal(alone, both)
        assert_bitwise_equal(
            tokred.threshold_matching(metric, 0.2, 1, destinations=side),
            tokred.threshold_matching(metric, 0.2, 1, None, "tome", sources, side),
        )
    assert tokred.num_out(13, 100, 1, destinations=destinations) == 4


def test_garbage_destinations_alone() -> None:
    destinations = torch.tensor([5, 5, -1, 99, 0], dtype=torch.int32)
    token_map = tokred.bipartite_soft_matching(signs(1, 12), 6, 1, destinations=destinations)
    assert token_map.max() < tokred.num_out(12, 6, 1, destinations=destinations)


def test_batch_does_not_matter(kernels: Backend) -> None:
    metric = torch.randn(6, 75, 24, generator=generator(2))
    whole = kernels.run("bipartite_soft_matching", metric, 20, 1)
    assert_bitwise_equal(
        kernels.run("bipartite_soft_matching", metric.flip(0), 20, 1), whole.flip(0)
    )
    for item in range(6):
        alone = kernels.run("bipartite_soft_matching", metric[item : item + 1], 20, 1)
        assert_bitwise_equal(alone, whole[item : item + 1])


def test_isa_and_threads_do_not_matter(on_every_cpu) -> None:
    metric = torch.randn(3, 260, 48, generator=generator(2))
    assert_one_result(on_every_cpu(lambda: tokred.bipartite_soft_matching(metric, 100)))


def test_num_out_rejects_what_the_op_rejects() -> None:
    with pytest.raises(ValueError, match="r and num_prefix"):
        tokred.num_out(10, -1)
    with pytest.raises(ValueError, match="r and num_prefix"):
        tokred.num_out(10, 1, -1)
