"""Packed keys and values for the tests of attention and scores on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from math import lcm

import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result, flat
from cases.inputs import generator, widened
from cases.oracle import reference
from tokred import PackedKV, PackFormat
from tokred.ops.kv_pack import packed_tokens
from tokred.reference.kv_pack import hadamard


def packing(text: str) -> PackFormat:
    """A format in words: bits, axis, group size, then the scheme and "rotated" where it is."""
    bits, axis, group_size, *rest = text.split()
    rotated = "rotated" in rest
    schemes = [word for word in rest if word != "rotated"]
    return PackFormat(int(bits), int(group_size), axis, *schemes or ["asymmetric"], rotated)


def pack(x: Tensor, form: PackFormat) -> PackedKV:
    return reference.kv_pack(x, *astuple(form))


def as_records(k: PackedKV, v: PackedKV) -> tuple[PackedKV, PackedKV]:
    """The same, as views of one buffer: all bytes of a token and head side by side."""
    parts = [k.codes, v.codes, *(side.params.view(torch.uint8) for side in (k, v))]
    buffer = torch.cat(parts, 3).transpose(1, 2).contiguous().transpose(1, 2)
    k_codes, v_codes, k_params, v_params = buffer.split([part.shape[3] for part in parts], 3)
    k_params, v_params = (params.view(torch.float16) for params in (k_params, v_params))
    return replace(k, codes=k_codes, params=k_params), replace(v, codes=v_codes, params=v_params)


def spoil(packed: PackedKV, hidden: Tensor, number: float) -> PackedKV:
    """Another packed tensor: the numbers of the hidden tokens, bool [B | 1, N], are lost."""
    form = packed.format
    if form.axis == "token":
        hidden = hidden.unflatten(1, (-1, form.group_size)).all(2)
    assert hidden.any()
    params = packed.params.masked_fill(hidden[:, None, :, None], number)
    return replace(packed, params=params)


def fixed_point_slack(backend: Backend, q: Tensor, k: PackedKV, scale: float | None) -> float:
    """How far logits may be off because the CPU takes half queries in fixed point.

    A channel is off by half a step, at most 2^-15 of the largest one; a sum of them by a few times
    the root of its squares.
    """
    if not backend.name.startswith("cpu") or q.dtype == torch.float32 or k.format.scheme == "fp8":
        return 0.0
    if not q.numel() or not k.num_tokens:
        return 0.0
    rows = hadamard(q.float()) if k.format.rotated else q.float()
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    return 2**-12 * scale * float(rows.abs().max() * reference.kv_unpack(k).norm(dim=-1).max())


def alone(value: object, item: slice, batch: int) -> object:
    """The part of an argument that belongs to some items of the batch."""
    if isinstance(value, PackedKV):
        codes, params = (alone(t, item, batch) for t in (value.codes, value.params))
        return replace(value, codes=codes, params=params)
    return value[item] if isinstance(value, Tensor) and value.shape[0] == batch else value


def assert_alone_as_in_a_batch(kernels: Backend, op: str, inputs: tuple) -> None:
    """The first item of a batch of three, and the other two, as in the batch, bit for bit."""
    whole = flat(kernels.run(op, *inputs))
    for item in (slice(0, 1), slice(1, 3)):
        part = kernels.run(op, *(alone(t, item, 3) for t in inputs))
        assert_bitwise_equal(part, [t[item] for t in whole], str(item))


def assert_same_on_every_cpu(on_every_cpu: Callable, op: str, inputs: tuple) -> None:
    """The same bits on every instruction set, on one and on two threads."""
    assert_one_result(on_every_cpu(lambda: getattr(tokred, op)(*inputs)))


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `tokens` are the packed ones and those of the windows.

    Lists are per query head, per key head or for all, and of each query or of all.
    """

    batch: int = 2
    heads: int = 2
    group: int = 2
    queries: int = 1
    tokens: int = 80
    head_dim: int = 64
    value_dim: int = 64
    k: str = "4 token 16"
    v: str = "4 channel 32"
    window_k: int = 0
    window_v: int = 0
    cache: bool = False
    lengths: bool = False
    slots: bool = False
    lists: str = "none"
    each_query: bool = False
    listed: int = 24
    mask: str = "none"
    bias: str = "none"
    causal: bool = False
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    scale: float | None = None
    softcap: float | None = None

    @property
    def page(self) -> int:
        """Slots that go together: every group of tokens."""
        forms = (packing(self.k), packing(self.v))
        return lcm(*(form.group_size for form in forms if form.axis == "token"))

    def packed_rows(self, form: PackFormat, window: int) -> int:
        """Rows of a side: the tokens it holds, in a cache some more."""
        if not self.cache:
            return self.tokens - window
        used = packed_tokens(form.axis, window, self.tokens)
        return (used // self.page + 2) * self.page

    def capacity(self) -> int:
        sides = ((self.k, self.window_k), (self.v, self.window_v))
        return max(self.packed_rows(packing(form), window) for form, window in sides)

    def pool_size(self) -> int:
        return (-(-self.capacity() // self.page) * self.batch + 3) * self.page

    def side(
        self, rng: torch.Generator, text: str, window: int, dim: int
    ) -> tuple[PackedKV, Tensor | None]:
        """Keys or values, channels of different sizes as real keys have them, and the window."""
        form = packing(text)
        rows = self.pool_size() if self.slots else self.packed_rows(form, window)
        spread = 0.5 + torch.rand(dim, generator=rng)
        shape = (1 if self.slots else self.batch, self.heads, rows, dim)
        packed = pack(torch.randn(shape, generator=rng) * spread, form)
        if window == 0:
            return packed, None
        residual = torch.randn(self.batch, self.heads, window, dim, generator=rng) * spread
        return packed, residual.to(self.dtype)

    def make_slots(self, rng: torch.Generator) -> Tensor | None:
        """Pages in a random order, some of them nowhere."""
        if not self.slots:
            return None
        pages = -(-self.capacity() // self.page)
        order = torch.randperm(self.batch * pages + 3, generator=rng)[: self.batch * pages]
        first = order.view(self.batch, pages, 1) * self.page
        slots = (first + torch.arange(self.page)).int()
        slots[:, 1::5], slots[:, 2::7], slots[:, 3::9] = -1, 2**31 - 1, -(2**31)
        slots[:, 4::11] = self.pool_size()
        return slots.flatten(1)[:, : self.capacity()].contiguous()

    def make_lists(self, rng: torch.Generator) -> Tensor | None:
        """Lists with entries outside of the tokens, and tokens listed twice."""
        if self.lists == "none":
            return None
        heads = {"head": self.heads * self.group, "kv": self.heads, "one": 1}[self.lists]
        shape = (self.batch, heads, self.queries if self.each_query else 1, self.listed)
        indices = torch.randint(-3, self.tokens + 3, shape, dtype=torch.int32, generator=rng)
        indices[..., 1::11], indices[..., 2::13] = -(2**31), 2**31 - 1
        return indices

    def make_mask(self, rng: torch.Generator) -> Tensor | None:
        heads = self.heads * self.group
        shapes = {
            "none": None,
            "tokens": (self.batch, self.tokens),
            "padding": (self.batch, 1, 1, self.tokens),
            "heads": (1, heads, 1, self.tokens),
            "full": (self.batch, heads, self.queries, self.tokens),
        }
        shape = shapes[self.mask.removesuffix(" of numbers")]
        if shape is None:
            return None
        visible = torch.rand(shape, generator=rng) < 0.6
        if not self.mask.endswith("numbers"):
            return visible
        return torch.randn(shape, generator=rng).where(visible, -torch.inf).to(self.dtype)

    def make_bias(self, rng: torch.Generator) -> Tensor | None:
        if self.bias == "none":
            return None
        heads = () if self.bias == "tokens" else (1 if self.bias == "shared" else self.heads,)
        batch = 1 if self.bias == "shared" else self.batch
        bias = torch.randn(batch, *heads, self.tokens, generator=rng)
        if self.bias == "holes":
            bias[..., ::3] = -torch.inf
        return bias

    def inputs(self) -> tuple:
        """The arguments of packed_attention."""
        rng = generator(7)
        shape = (self.batch, self.heads * self.group, self.queries, self.head_dim)
        q = (torch.randn(shape, generator=rng) * self.magnitude).to(self.dtype)
        k, residual_k = self.side(rng, self.k, self.window_k, self.head_dim)
        v, residual_v = self.side(rng, self.v, self.window_v, self.value_dim)
        lengths = None
        if self.lengths:
            choices = torch.tensor([self.tokens // 2, self.tokens, -5, 1, 2**31 - 1, 0, 33])
            lengths = choices.repeat(self.batch)[: self.batch].int()
        return (
            *(q, k, v, residual_k, residual_v, self.scale, self.make_lists(rng)),
            *(self.make_mask(rng), self.make_bias(rng), self.causal),
            *(self.tokens if self.cache else None, lengths, self.make_slots(rng), self.softcap),
        )

    def score_inputs(self, reduce: str) -> tuple:
        """The arguments of packed_qk_score."""
        q, k, _, residual, _, scale, _, mask, _, _, length, lengths, slots, _ = self.inputs()
        return (q, k, residual, reduce, scale, length, lengths, mask, slots)


CHANNEL = Case(k="4 channel 32", tokens=70)
# KIVI's cache: 64 whole keys in the window, or fewer; always 24 values.
CACHE = Case(2, 2, 4, 1, 150, window_k=64, window_v=24, cache=True)
RING = replace(CHANNEL, tokens=91, window_k=20, window_v=33, cache=True)
PAGES = Case(3, 2, 2, 1, 130, window_k=16, window_v=20, cache=True, slots=True)


def check(backend: Backend, inputs: tuple, values: float = 4.0) -> None:
    """As accurate as plain torch; values: about the largest value."""
    out, lse = backend.run("packed_attention", *inputs)
    exact, exact_lse = reference.packed_attention(*widened(inputs))
    plain, plain_lse = reference.packed_attention(*inputs)
    assert out.dtype == inputs[0].dtype and lse.dtype == torch.float32
    assert out.shape == exact.shape and lse.shape == exact_lse.shape
    eps = torch.finfo(torch.float32).eps
    largest = exact_lse.nan_to_num(0, 0, 0).abs().max().item() if lse.numel() else 0
    logits = 8 * eps * (1 + largest) + fixed_point_slack(backend, inputs[0], inputs[1], inputs[5])
    assert_as_accurate(lse, exact_lse, plain_lse, logits, "lse")
    # A logit's rounding error moves the weights by as much, relatively; tensor cores round them.
    slack = (torch.finfo(out.dtype).eps + logits) * (1 + values)
    assert_as_accurate(out, exact, plain, slack, "out")
