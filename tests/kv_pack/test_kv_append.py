"""kv_append: however tokens arrive, the cache is what packing all of them at once would give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend, move
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference
from cases.packed import as_records
from tokred import PackedKV, PackFormat
from tokred.reference.kv_pack import hadamard, packed_tokens

OPS = torch.ops.tokred
State = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Case:
    """A cache, and how many tokens arrive at each call."""

    axis: str = "channel"
    window: int = 0
    arrivals: tuple[int, ...] = (7, 1, 1, 20, 0, 1, 40)
    bits: int = 4
    group_size: int = 16
    scheme: str = "asymmetric"
    rotated: bool = False
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    batch: int = 1
    capacity: int = 80

    @property
    def form(self) -> PackFormat:
        return PackFormat(self.bits, self.group_size, self.axis, self.scheme, self.rotated)

    @property
    def total(self) -> int:
        return sum(self.arrivals)

    def x(self, tokens: int | None = None) -> Tensor:
        shape = (self.batch, tokens or self.total, 2, self.head_dim)
        x = torch.randn(shape, generator=generator(1)).transpose(1, 2)
        return x.to(self.dtype)

    def empty(self, pool: int = 0) -> tuple[PackedKV, Tensor | None]:
        """A cache full of other bytes, so that whatever is written shows."""
        rows = (1, pool) if pool else (self.batch, self.capacity)
        packed = self.form.empty(rows[0], 2, rows[1], self.head_dim)
        packed.codes.random_(0, 256, generator=generator(2))
        packed.params.fill_(7.5)
        if not self.window:
            return packed, None
        shape = (self.batch, self.window, 2, self.head_dim)
        return packed, torch.full(shape, -3.5, dtype=self.dtype).transpose(1, 2)


def state(packed: PackedKV, window: Tensor | None) -> list[Tensor]:
    return [packed.codes, packed.params, *([] if window is None else [window])]


def append(
    backend: Backend,
    x: Tensor,
    cache: tuple[PackedKV, Tensor | None],
    length: int,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[PackedKV, Tensor | None]:
    """The cache with the tokens; the one given may change."""
    x, cache, lengths, slots = move((x, cache, lengths, slots), backend.device)
    backend.function("kv_append")(x, cache[0], length, cache[1], lengths, slots)
    return move(cache, "cpu")


def append_all(backend: Backend, case: Case, arrivals: tuple[int, ...]) -> list[Tensor]:
    cache, held = case.empty(), 0
    for part in case.x().split(arrivals, 2):
        cache = append(backend, part, cache, held)
        held += part.shape[2]
    return state(*cache)


def expected_cache(case: Case) -> list[Tensor]:
    """All tokens packed at once, as far as they are packed, and the others in their rows."""
    packed, window = case.empty()
    x = case.x()
    count = packed_tokens(case.axis, case.window, case.total)
    whole = reference.kv_pack(x[:, :, :count], *packed.arguments()[2:])
    packed.codes[:, :, :count] = whole.codes
    packed.params[:, :, : whole.params.shape[2]] = whole.params
    rows = hadamard(x.float()).to(x.dtype) if case.rotated else x
    if case.window:
        before = 0
        for arrived in case.arrivals:  # rows that are packed keep what they last held
            after = before + arrived
            first = max(before, packed_tokens(case.axis, case.window, after))
            for t in range(first, after):
                window[:, :, t % case.window] = rows[:, :, t]
            before = after
    return state(packed, window)


LONG = (130, 1, 1, 70)
CASES = [
    Case(),
    *(Case(window=w, dtype=FLOATS[w % 3]) for w in (1, 5, 16, 33, 64)),
    *(Case("token", w, group_size=8, dtype=FLOATS[w // 8 % 3]) for w in (8, 16, 24, 64)),
    Case("token", 9, group_size=3, bits=2, capacity=81),
    Case("token", 4, group_size=1, bits=8, scheme="symmetric"),
    *(Case("token", 16, (1,) * 40, group_size=8, bits=b, head_dim=80) for b in (1, 3)),
    *(Case("channel", 16, (1,) * 40, scheme=s, head_dim=48) for s in ("symmetric", "zero_point")),
    Case("channel", 8, bits=8, scheme="fp8", head_dim=112),
    *(Case(window=w, bits=b, scheme="codebook", head_dim=64) for w, b in ((0, 3), (16, 2))),
    Case("channel", 16, LONG, 4, 128, "codebook", False, 128, torch.bfloat16, capacity=202),
    *(Case(axis, 16, rotated=True, group_size=16, head_dim=96) for axis in ("channel", "token")),
    *(Case(axis, 32, LONG, capacity=208, head_dim=256) for axis in ("channel", "token")),
    Case("channel", 0, LONG, capacity=208, dtype=torch.bfloat16, head_dim=128),
    Case("token", 96, LONG, capacity=192, group_size=96, dtype=torch.float16, head_dim=256),
    *(Case(axis, 16, (16, 16, 16, 1, 15), batch=2) for axis in ("channel", "token")),
    *(Case(axis, 16, (80,), batch=2) for axis in ("channel", "token")),
    Case("token", 16, (0, 17), batch=0),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_step_by_step_is_all_at_once(backend: Backend, case: Case) -> None:
    actual = append_all(backend, case, case.arrivals)
    assert_bitwise_equal(actual, expected_cache(case), "in steps")
    count = packed_tokens(case.axis, case.window, case.total)
    rows = count // case.group_size if case.axis == "token" else count
    once = append_all(backend, case, (case.total,))
    for a, b, end in zip(actual, once, (count, rows), strict=False):
        assert_bitwise_equal(b[:, :, :end], a[:, :, :end], "at once")


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_rotated_rows_are_rounded_in_the_window(kernels: Backend, axis: str, dtype) -> None:
    """What is packed from the window has its dtype: less exact than what is packed from x."""
    case = Case(axis, 16, rotated=True, dtype=dtype)
    cache, oracle, held = case.empty(), case.empty(), 0
    for part in case.x().split(case.arrivals, 2):
        cache = append(kernels, part, cache, held)
        reference.kv_append(part, oracle[0], held, oracle[1])
        held += part.shape[2]
    assert_bitwise_equal(state(*cache), state(*oracle))
    once = append(kernels, case.x(), case.empty(), 0)
    assert not torch.equal(once[0].codes, cache[0].codes)


def lengths_of(*lengths: int) -> Tensor:
    return torch.tensor([3, *lengths, -1], dtype=torch.int32)[1:-1]


MANY = [0, 1, 15, 16, 17, 40, 63, 64, 75, 79, 80, 96, 97, -1, -16, -(2**31), 2**31 - 1]


@pytest.mark.parametrize("arrived", [1, 3, 16, 40])
@pytest.mark.parametrize(
    "case",
    [Case("channel", 0), Case("channel", 16), Case("token", 16, rotated=True), Case("token", 32)],
    ids=label,
)
def test_every_item_has_its_length(kernels: Backend, case: Case, arrived: int) -> None:
    """Items without room, or of negative length, are left as they are; the others grow."""
    case = replace(case, batch=len(MANY))
    lengths, x = lengths_of(*MANY), case.x(arrived)
    actual, expected = append(kernels, x, case.empty(), 0, lengths), case.empty()
    reference.kv_append(x, expected[0], 0, expected[1], lengths)
    assert_bitwise_equal(state(*actual), state(*expected))
    for b in (1, 5, 9):
        part, window = case.empty()
        part = replace(part, codes=part.codes[b : b + 1], params=part.params[b : b + 1])
        window = None if window is None else window[b : b + 1]
        alone = append(kernels, x[b : b + 1], (part, window), 0, lengths[b : b + 1])
        assert_bitwise_equal(state(*alone), [t[b : b + 1] for t in state(*actual)])


def test_lengths_may_be_strided_and_are_not_changed(kernels: Backend) -> None:
    case = Case("channel", 4, batch=3)
    lengths = torch.tensor([[2, 9], [7, 9], [11, 9]], dtype=torch.int32)[:, 0]
    x = case.x(5)
    actual, expected = append(kernels, x, case.empty(), 11, lengths), case.empty()
    reference.kv_append(x, expected[0], 11, expected[1], lengths)
    assert_bitwise_equal(state(*actual), state(*expected))
    assert lengths.tolist() == [2, 7, 11]


def pages(case: Case, page: int, pool: int) -> Tensor:
    """Every item's slots: pages of a pool in random order."""
    each = case.capacity // page
    order = torch.randperm(pool // page, generator=generator(9))[: case.batch * each]
    slots = order.view(case.batch, each, 1) * page + torch.arange(page)
    return slots.flatten(1).int()


PAGED = [
    Case("channel", 0, batch=3),
    Case("channel", 8, batch=3),
    Case("token", 16, batch=3, group_size=8),
    Case("token", 8, (40, 1, 39), batch=2, group_size=8, rotated=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("case", PAGED, ids=label)
def test_slots_of_a_pool(kernels: Backend, case: Case, bad: bool) -> None:
    """Slots outside the pool have no place: what would lie there is not written."""
    slots, held = pages(case, 8, 256), 0
    if bad:
        where = torch.rand(slots.shape, generator=generator(8))
        outside = torch.tensor([-1, 256, -(2**31), 2**31 - 1], dtype=torch.int32)
        slots = torch.where(where < 0.3, outside[(where * 13).long() % 4], slots)
    cache, expected = case.empty(256), case.empty(256)
    for part in case.x().split(case.arrivals, 2):
        cache = append(kernels, part, cache, held, None, slots)
        reference.kv_append(part, expected[0], held, expected[1], None, slots)
        held += part.shape[2]
    assert_bitwise_equal(state(*cache), state(*expected))
    if not bad and case.axis == "channel":
        whole = reference.kv_pack(case.x(), *expected[0].arguments()[2:])
        count = packed_tokens(case.axis, case.window, case.total)
        at = slots[:, :count].long()
        codes = cache[0].codes[0][:, at].transpose(0, 1)
        assert_bitwise_equal(codes, whole.codes[:, :, :count])


def test_slots_and_lengths(kernels: Backend) -> None:
    case = Case("token", 16, batch=4, group_size=8)
    slots, lengths = pages(case, 16, 512), lengths_of(5, 64, -7, 96)
    x = case.x(18)
    cache, expected = case.empty(512), case.empty(512)
    cache = append(kernels, x, cache, 5, lengths, slots)
    reference.kv_append(x, expected[0], 5, expected[1], lengths, slots)
    assert_bitwise_equal(state(*cache), state(*expected))


def test_records(kernels: Backend) -> None:
    """Codes and params of keys and values in one buffer: neither writes over the other."""
    case = Case("channel", 4, (30, 1, 9), group_size=64, head_dim=128, batch=2)
    keys, values = as_records(case.empty()[0], case.empty()[0])
    expected = [case.empty()[0] for _ in range(2)]
    k, v = case.x(), case.x().flip(2)
    backend_windows = [case.empty()[1] for _ in range(2)]
    windows = [case.empty()[1] for _ in range(2)]
    assert keys.codes.stride(1) == 144
    held = 0
    for parts in zip(k.split(case.arrivals, 2), v.split(case.arrivals, 2), strict=True):
        for n, packed in enumerate((keys, values)):
            grown, grown_window = append(kernels, parts[n], (packed, backend_windows[n]), held)
            packed.codes.copy_(grown.codes)
            packed.params.copy_(grown.params)
            backend_windows[n].copy_(grown_window)
            reference.kv_append(parts[n], expected[n], held, windows[n])
        held += parts[0].shape[2]
    for n, packed in enumerate((keys, values)):
        actual = [t.contiguous() for t in state(packed, backend_windows[n])]
        assert_bitwise_equal(actual, state(expected[n], windows[n]))


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_every_cpu_agrees(on_every_cpu, axis: str) -> None:
    case = Case(axis, 32, (700, 1, 299), group_size=32, head_dim=96, rotated=True, batch=2,
                capacity=992, dtype=torch.float16)  # fmt: skip
    assert_one_result(on_every_cpu(lambda: append_all(Backend("cpu"), case, case.arrivals)))


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_no_room_leaves_the_cache_unchanged(axis: str) -> None:
    case = Case(axis, 16, group_size=16)
    cache = append(Backend("cpu"), case.x(), case.empty(), 0)
    before = [t.clone() for t in state(*cache)]
    needed = packed_tokens(axis, 16, 70 + 60)
    with pytest.raises(
        RuntimeError,
        match=f"room for 80 packed tokens, but length \\+ 60 = 130 tokens need {needed}",
    ):
        tokred.kv_append(case.x(60), cache[0], 70, cache[1])
    assert_bitwise_equal(state(*cache), before)


OPCHECK = [Case(), Case("token", 16, batch=2), Case("channel", 5, rotated=True, batch=2)]


@pytest.mark.parametrize("case", OPCHECK, ids=label)
def test_opcheck(case: Case) -> None:
    packed, window = case.empty()
    f = packed.format
    lengths = torch.full((case.batch,), 3, dtype=torch.int32)
    args = (case.x(20), packed.codes, packed.params, window, 3, f.bits, f.group_size)
    torch.library.opcheck(
        OPS.kv_append.default, (*args, f.axis, f.scheme, f.rotated, lengths, None)
    )


def test_compile_mutates_in_place() -> None:
    case = Case("token", 16, (40,))

    def step(x: Tensor, codes: Tensor, params: Tensor, window: Tensor) -> Tensor:
        packed = PackedKV(codes, params, case.form)
        tokred.kv_append(x, packed, 0, window)
        return tokred.kv_unpack(packed)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = state(*case.empty())
        results.append([function(case.x(), *tensors).nan_to_num(0), *tensors])
    assert_bitwise_equal(results[1], results[0])


def test_refuses_what_requires_grad() -> None:
    packed = PackFormat(4, 16).empty(1, 1, 4, 16)
    with pytest.raises(ValueError, match="kv_append has no gradient, but x requires grad"):
        tokred.kv_append(torch.zeros(1, 1, 2, 16, requires_grad=True), packed, 0)
