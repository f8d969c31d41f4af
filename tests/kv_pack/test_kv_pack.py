"""kv_pack and kv_unpack against plain torch, bit by bit, and against the formulas of the papers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference
from tokred import PackedKV
from tokred.reference.kv_pack import gaussian_levels, hadamard

OPS = torch.ops.tokred
DISTRIBUTIONS = (
    "randn", "outliers", "ties", "constant", "zero", "special", "nothing", "huge", "tiny",
    "subnormal", "saturating",
)  # fmt: skip
SCHEMES = ("asymmetric", "zero_point", "symmetric", "fp8", "codebook")
FORMS = [
    (bits, scheme)
    for scheme in SCHEMES
    for bits in (1, 2, 3, 4, 8)
    if (scheme != "symmetric" or bits > 1)
    and (scheme != "fp8" or bits == 8)
    and (scheme != "codebook" or bits < 8)
]
AXES = ("channel", "token")


def axes(scheme: str) -> tuple[str, ...]:
    return AXES[:1] if scheme == "codebook" else AXES


def make_tokens(shape: tuple[int, ...], distribution: str) -> Tensor:
    rng = generator(3)
    x = torch.randn(shape, generator=rng)
    if distribution == "outliers":
        x[..., 3] *= 100
    elif distribution == "ties":
        x = torch.randint(-6, 7, shape, generator=rng) / 2
    elif distribution == "constant":
        x = torch.full(shape, -1.7)
    elif distribution == "zero":
        x = torch.zeros(shape) * x.sign()
    elif distribution == "special":
        kind = torch.randint(0, 12, shape, generator=rng)
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])
        x = torch.where(kind < 5, special[kind.clamp(max=4)], x)
    elif distribution == "nothing":
        x = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, shape)]
        x[..., : shape[2] // 2, :] = torch.nan
    elif distribution in ("huge", "tiny", "subnormal", "saturating"):
        x *= {"huge": 1e38, "tiny": 1e-30, "subnormal": 4e-45, "saturating": 3e5}[distribution]
    return x


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    bits: int = 4
    scheme: str = "asymmetric"
    axis: str = "channel"
    group_size: int = 16
    head_dim: int = 64
    batch: int = 1
    heads: int = 2
    tokens: int = 24
    dtype: torch.dtype = torch.float32
    distribution: str = "randn"
    rotate: bool = False

    def x(self) -> Tensor:
        shape = (self.batch, self.heads, self.tokens, self.head_dim)
        return make_tokens(shape, self.distribution).to(self.dtype)

    def options(self) -> tuple:
        group_size = self.group_size
        if self.axis == "token" and self.tokens % group_size:
            group_size = 8
        return self.bits, group_size, self.axis, self.scheme, self.rotate


CASES = [
    *(
        Case(bits, scheme, axis, dtype=FLOATS[(bits + number) % 3])
        for bits, scheme in FORMS
        for number, axis in enumerate(axes(scheme))
    ),
    *(
        Case(
            8 if scheme == "fp8" else 3, scheme, axes(scheme)[n % len(axes(scheme))], distribution=d
        )
        for scheme in SCHEMES
        for n, d in enumerate(DISTRIBUTIONS)
    ),
    *(
        Case(bits, "codebook", group_size=group, head_dim=d, dtype=FLOATS[bits % 3])
        for bits, group, d in ((1, 16, 16), (2, 48, 48), (3, 80, 80), (4, 128, 128), (2, 256, 256))
    ),
    Case(3, "codebook", group_size=64, tokens=301, dtype=torch.bfloat16, rotate=True),
    *(Case(axis=AXES[(n + 1) % 2], distribution=d) for n, d in enumerate(DISTRIBUTIONS)),
    *(
        Case(bits, axis=AXES[bits % 2], head_dim=d, dtype=FLOATS[bits % 3])
        for bits in (1, 2, 3, 4, 8)
        for d in (16, 32, 48, 80, 96, 112, 128, 144, 256)
    ),
    *(
        Case(axis=AXES[n % 2], head_dim=d, dtype=FLOATS[n % 3], rotate=True)
        for n, d in enumerate((16, 32, 48, 64, 80, 96, 112, 128, 224, 256))
    ),
    *(
        Case(2, scheme, rotate=True, distribution="outliers")
        for scheme in SCHEMES
        if scheme != "fp8"
    ),
    *(Case(group_size=g, head_dim=128, tokens=5) for g in (16, 32, 64, 128)),
    *(Case(2, axis="token", group_size=g, tokens=48) for g in (1, 2, 3, 16, 48)),
    *(Case(axis="token", group_size=g, head_dim=256, tokens=300) for g in (60, 150, 300)),
    Case(axis="token", group_size=600, head_dim=16, tokens=600, distribution="special"),
    Case(axis="token", group_size=300, tokens=600, dtype=torch.bfloat16, rotate=True),
    Case(head_dim=128, heads=3, tokens=301, dtype=torch.bfloat16),
    Case(2, axis="token", group_size=8, batch=2, tokens=1000, dtype=torch.float16),
    *(Case(axis=axis, **{size: 0}) for axis in AXES for size in ("batch", "heads", "tokens")),
    Case(tokens=1),
]


def tensors(packed: PackedKV) -> tuple[Tensor, Tensor]:
    return packed.codes, packed.params


@pytest.mark.parametrize("case", CASES, ids=label)
def test_bits_of_codes_params_and_numbers(kernels: Backend, case: Case) -> None:
    x = case.x()
    actual = kernels.run("kv_pack", x, *case.options())
    expected = reference.kv_pack(x, *case.options())
    assert actual.format == expected.format
    assert_bitwise_equal(tensors(actual), tensors(expected), "packed")
    if case.rotate and case.distribution != "randn":
        return
    for dtype in {case.dtype, torch.float32}:
        numbers = kernels.run("kv_unpack", expected, dtype)
        assert_bitwise_equal(numbers, reference.kv_unpack(expected, dtype), f"unpacked {dtype}")


def read_codes(packed: PackedKV) -> Tensor:
    """The codes [B, H, N, D] read by what csrc/kv_pack/layout.h says of their places."""

    def read(rows: Tensor, bits: int) -> Tensor:
        codes, byte, total = [], 0, rows.shape[-1]
        while byte < total:
            run = next(size for size in (16, 8, 4, 2) if size <= total - byte)
            for plane in range(8 // bits):
                codes += [rows[..., byte + i] >> bits * plane for i in range(run)]
            byte += run
        return torch.stack(codes, -1) & (1 << bits) - 1

    if packed.format.bits != 3:
        return read(packed.codes.int(), packed.format.bits)
    low = packed.head_dim // 4
    rows = packed.codes.int()
    return read(rows[..., :low], 2) + 4 * read(rows[..., low:], 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 48, 80, 96, 112, 128, 256])
def test_layout(backend: Backend, bits: int, head_dim: int) -> None:
    """Integers that span the codes are their own codes."""
    x = torch.randint(0, 2**bits, (1, 2, 7, head_dim), generator=generator(5))
    x[..., ::16], x[..., 1::16] = 0, 2**bits - 1
    packed = backend.run("kv_pack", x.float(), bits, 16)
    assert torch.equal(read_codes(packed), x.int())
    assert packed.codes.shape[3] == head_dim * bits // 8
    assert torch.equal(packed.scale, torch.ones(1, 2, 7, head_dim // 16, dtype=torch.float16))
    assert torch.equal(packed.minimum, torch.zeros_like(packed.scale))


def kivi(x: Tensor, bits: int, group_size: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and minimum as in KIVI (arXiv:2402.02750), in the dtype of x."""
    groups = x.unflatten(3, (-1, group_size)) if axis == "channel" else None
    if groups is None:
        groups = x.unflatten(2, (-1, group_size)).transpose(3, 4)
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low) / (2**bits - 1)
    codes = ((groups - low) / scale).clamp(0, 2**bits - 1).round().int()
    codes = codes.flatten(3) if axis == "channel" else codes.transpose(3, 4).flatten(2, 3)
    return codes, scale[..., 0], low[..., 0]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(backend: Backend, bits: int, axis: str) -> None:
    x = torch.randn(2, 2, 128, 128, generator=generator(1))
    packed = backend.run("kv_pack", x, bits, 32, axis)
    codes, scale, low = kivi(x, bits, 32, axis)
    assert torch.equal(read_codes(packed), codes)
    assert_bitwise_equal((packed.scale, packed.minimum), (scale.half(), low.half()))
    half = x.half()
    packed = backend.run("kv_pack", half, bits, 32, axis)
    difference = (read_codes(packed) - kivi(half, bits, 32, axis)[0]).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < (1e-3 if bits == 2 else 5e-3)


def test_fp8_numbers_are_those_of_torch(backend: Backend) -> None:
    """With 448 in every group the scale is 1: all e4m3 numbers, and halfway points between them."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    halfway = (every[1:] + every[:-1]) / 2
    near = torch.stack([halfway.nextafter(torch.tensor(s)) for s in (-1e9, 1e9)])
    x = torch.cat([every, halfway, near.flatten(), torch.tensor([2**-10, -(2**-10), 1e-20])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 15)).unflatten(0, (-1, 15))
    x = torch.nn.functional.pad(x, (1, 0), value=448.0)[None, None]
    packed = backend.run("kv_pack", x, 8, 16, scheme="fp8")
    numbers = x.to(torch.float8_e4m3fn)
    assert_bitwise_equal(packed.codes, numbers.view(torch.uint8))
    assert torch.equal(backend.run("kv_unpack", packed), numbers.float())


def midpoints_of_means(bits: int) -> Tensor:
    """Lloyd's levels for normally distributed numbers: means between midpoints, until they stay."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    levels = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(2000):
        edges = torch.nn.functional.pad((levels[1:] + levels[:-1]) / 2, (1, 1), value=1e3)
        edges[0] = -1e3
        mass = normal.cdf(edges).diff()
        levels = -normal.log_prob(edges).exp().diff() / mass
    return levels


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_of_a_codebook_are_those_of_lloyd(bits: int) -> None:
    levels = midpoints_of_means(bits)
    assert torch.equal(gaussian_levels(bits)[0], (levels * 32).round().to(torch.int8))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant(backend: Backend, bits: int) -> None:
    """arXiv:2504.19874: every coordinate of a rotated unit vector to the nearest level."""
    x = torch.randn(2, 2, 64, 128, generator=generator(1)) * torch.rand(128, generator=generator(2))
    packed = backend.run("kv_pack", x, bits, 128, "channel", "codebook", True)
    norm = x.norm(dim=3, keepdim=True)
    unit = hadamard(x / norm) * 128**0.5
    levels = gaussian_levels(bits)[0].float() / 32
    codes = (unit[..., None] - levels).abs().argmin(-1)
    assert ((read_codes(packed) != codes).float().mean() < 1e-4).all()
    numbers = hadamard(levels[codes] / 128**0.5) * norm
    error = (backend.run("kv_unpack", packed) - numbers).abs()
    assert (error > 1e-3 * norm).float().mean() < 1e-2
    # The paper's distortions of unit vectors, of 1 to 4 bits.
    distortion = ((numbers - x) / norm).square().sum(3).mean()
    assert abs(distortion / (0.36, 0.117, 0.03454, 0.0095)[bits - 1] - 1) < 0.08


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_of_every_head(kernels: Backend, bits: int, shared: bool) -> None:
    heads = 1 if shared else 3
    levels = torch.randint(-128, 128, (heads, 2 * 2**bits), generator=generator(bits))
    levels = levels.sort(1).values.to(torch.int8)[:, 1 : 1 + 2**bits]
    x = torch.randn(2, 3, 20, 96, generator=generator(3))
    packed = kernels.run("kv_pack", x, bits, 32, "channel", "codebook", False, levels)
    expected = reference.kv_pack(x, bits, 32, "channel", "codebook", False, levels)
    assert_bitwise_equal(tensors(packed), tensors(expected))
    numbers = kernels.run("kv_unpack", packed)
    assert_bitwise_equal(numbers, reference.kv_unpack(expected))
    scale = packed.scale.repeat_interleave(32, 3).float()
    table = levels.expand(3, -1).float()
    for head in range(3):
        stood_for = (numbers / scale).round()[:, head]
        assert torch.isin(stood_for, table[head]).all()
        nearest = (x / scale)[:, head, ..., None].sub(table[head]).abs().amin(-1)
        assert ((x / scale)[:, head].sub(stood_for).abs() <= nearest + 0.2).all()


def test_any_levels_give_the_same_codes(kernels: Backend) -> None:
    """Levels in no order, and equal ones."""
    x = make_tokens((1, 2, 30, 64), "special")
    levels = torch.randint(-128, 128, (2, 8), generator=generator(9)).to(torch.int8)
    levels[1, 2:5] = 7
    some = (x, 3, 64, "channel", "codebook", True, levels)
    packed, expected = kernels.run("kv_pack", *some), reference.kv_pack(*some)
    assert_bitwise_equal(tensors(packed), tensors(expected))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("bits", "scheme"), [form for form in FORMS if form[1] != "codebook"])
def test_error_is_at_most_half_a_scale(backend: Backend, bits: int, scheme: str, axis: str) -> None:
    x = torch.randn(1, 2, 32, 64, generator=generator(2)) + 0.5
    packed = backend.run("kv_pack", x, bits, 16, axis, scheme)
    error = (backend.run("kv_unpack", packed) - x).abs()
    scale = packed.scale.float()
    dim = 3 if axis == "channel" else 2
    scale = scale.repeat_interleave(16, dim)
    # The params are rounded to 11 bits; the zero point to an integer, which costs a code more.
    rounding = 2**-11 * (x.abs() + 2**bits * scale)
    if scheme == "fp8":
        assert (error <= x.abs() * 2**-4 + scale * 2**-10 + 2**-11 * x.abs()).all()
    else:
        assert (error <= scale * (1.0 if scheme == "zero_point" else 0.5) + rounding).all()


def test_degenerate_groups(backend: Backend) -> None:
    x = torch.full((1, 1, 2, 32), 0.3)
    x[..., 16:] = 0
    for scheme in SCHEMES[:3]:
        packed = backend.run("kv_pack", x, 4, 16, scheme=scheme)
        numbers = backend.run("kv_unpack", packed)
        assert ((numbers[..., :16] - 0.3).abs() <= 3e-4).all()
        assert (numbers[..., 16:] == 0).all() and (packed.scale[..., 1] == 0).all()
    x[..., 0], x[..., 1], x[..., 2], x[..., 3] = torch.nan, torch.inf, -torch.inf, -0.7
    numbers = backend.run("kv_unpack", backend.run("kv_pack", x, 4, 16))[0, 0, 0]
    assert ((numbers[:5] - torch.tensor([-0.7, 0.3, -0.7, -0.7, 0.3])).abs() <= 1e-3).all()


def test_rotation_is_orthogonal_and_undone(backend: Backend) -> None:
    x = make_tokens((1, 2, 16, 128), "outliers")
    errors = [
        (backend.run("kv_unpack", backend.run("kv_pack", x, 4, 64, rotate=rotate)) - x).norm()
        for rotate in (False, True)
    ]
    assert errors[1] < errors[0] < x.norm() / 2
    before = backend.run("kv_pack", hadamard(x), 4, 32)
    assert_bitwise_equal(before.codes, backend.run("kv_pack", x, 4, 32, rotate=True).codes)
    assert not torch.equal(before.codes, backend.run("kv_pack", x, 4, 32).codes)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("rotate", [False, True])
def test_alone_and_in_a_batch(kernels: Backend, axis: str, rotate: bool) -> None:
    x = torch.randn(3, 2, 300, 48, generator=generator(4)).to(torch.bfloat16)
    group_size = 16 if axis == "channel" else 4
    packed = kernels.run("kv_pack", x, 3, group_size, axis, "zero_point", rotate)
    numbers = kernels.run("kv_unpack", packed, torch.bfloat16)
    for b in range(3):
        part = slice(b, b + 1), slice(1, 2), slice(100, 220)
        alone = kernels.run("kv_pack", x[part], *packed.arguments()[2:])
        rows = part if axis == "channel" else (*part[:2], slice(25, 55))
        assert_bitwise_equal(tensors(alone), (packed.codes[part], packed.params[rows]))
        assert_bitwise_equal(kernels.run("kv_unpack", alone, torch.bfloat16), numbers[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[:3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_halfway_between_codes(
    kernels: Backend, bits: int, scheme: str, dtype: torch.dtype
) -> None:
    """Quotients that end in .5 round to even, also where nothing is divided."""
    largest = 2 ** (bits - 1) - 1 if scheme == "symmetric" else 2**bits - 1
    rng = generator(8)
    x = torch.randint(0, 2 * largest + 1, (1, 2, 9, 128), generator=rng) / 2
    x[..., ::16], x[..., 1::16] = 0, largest  # scales are 1
    if scheme == "symmetric":
        x *= torch.randint(0, 2, x.shape, generator=rng) * 2 - 1
    how = (bits, 64 if bits == 2 else 32, "channel", scheme)
    packed = kernels.run("kv_pack", x.to(dtype), *how)
    assert_bitwise_equal(tensors(packed), tensors(reference.kv_pack(x.to(dtype), *how)))


@pytest.mark.parametrize("axis", AXES)
def test_every_cpu_agrees(on_every_cpu, axis: str) -> None:
    x = make_tokens((2, 3, 520, 80), "special").to(torch.float16)

    def run() -> tuple[Tensor, ...]:
        packed = tokred.kv_pack(x, 4, 40 if axis == "token" else 16, axis, "zero_point")
        return *tensors(packed), tokred.kv_unpack(packed)

    assert_one_result(on_every_cpu(run))


@pytest.mark.parametrize("axis", AXES)
def test_strides(kernels: Backend, axis: str) -> None:
    wide = torch.randn(2, 40, 3, 2 * 64, generator=generator(6))
    x = wide[..., 64:].transpose(1, 2)
    packed = kernels.run("kv_pack", x, 4, 16 if axis == "channel" else 8, axis)
    assert_bitwise_equal(tensors(packed), tensors(reference.kv_pack(x, *packed.arguments()[2:])))
    assert packed.codes.is_contiguous() and packed.params.is_contiguous()


def test_every_cpu_agrees_on_a_codebook(on_every_cpu) -> None:
    x = make_tokens((2, 3, 300, 80), "special").to(torch.float16)
    levels = torch.randint(-128, 128, (3, 16), generator=generator(7)).to(torch.int8).sort(1).values

    def run() -> tuple[Tensor, ...]:
        packed = tokred.kv_pack(x, 4, 80, scheme="codebook", levels=levels)
        return *tensors(packed), tokred.kv_unpack(packed)

    assert_one_result(on_every_cpu(run))


OPCHECKED = (
    Case(),
    Case(3, "symmetric", "token", 8, rotate=True),
    Case(2, "codebook", group_size=32),
)


@pytest.mark.parametrize("case", OPCHECKED, ids=label)
def test_opcheck(case: Case) -> None:
    x = case.x().transpose(1, 2).contiguous().transpose(1, 2)
    levels = gaussian_levels(case.bits) if case.scheme == "codebook" else None
    torch.library.opcheck(OPS.kv_pack.default, (x, *case.options(), levels))
    packed = reference.kv_pack(x, *case.options())
    torch.library.opcheck(OPS.kv_unpack.default, (*packed.arguments(), "bfloat16", levels))
    out = torch.empty(*packed.codes.shape[:3], packed.head_dim)
    torch.library.opcheck(OPS.kv_unpack_into.default, (*packed.arguments(), out, levels))


def round_trip(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed = tokred.kv_pack(x, 4, 16, scheme="symmetric")
    return packed.codes, packed.params, tokred.kv_unpack(packed, torch.float16)


def test_compile_without_recompiling() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 9, 12):
        x = torch.randn(2, 2, tokens, 32, generator=generator())
        assert_bitwise_equal(compiled(x), round_trip(x))
    assert counter.frame_count == 1


def test_export_with_a_dynamic_length() -> None:
    class RoundTrip(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return round_trip(x)

    shapes = {"x": {2: torch.export.Dim("tokens", min=2, max=64)}}
    example = (torch.randn(2, 2, 5, 32),)
    program = torch.export.export(RoundTrip(), example, dynamic_shapes=shapes)
    x = torch.randn(2, 2, 17, 32)
    assert_bitwise_equal(program.module()(x), round_trip(x))


def test_refuses_what_requires_grad() -> None:
    x = torch.zeros(1, 1, 2, 16, requires_grad=True)
    with pytest.raises(ValueError, match="kv_pack has no gradient, but x requires grad"):
        tokred.kv_pack(x, 4, 16)
