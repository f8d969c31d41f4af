"""What a case is made of, drawn from a seed: sizes, numbers, masks, lists, strides."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FAR = 2**63 - 1  # an int argument that must not overflow
_SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128, 129, 193)
_CHANNELS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 96, 100, 128, 129, 256)
_INT32_ENDS = (-(2**31), 2**31 - 1, -1, -2, 2**31 - 2, 2**30)
_SPECIAL = (
    math.nan, math.inf, -math.inf, 3.4e38, -1e38, 65504.0, 0.0, -0.0, 1e-40, 1e-45, 6e-8,
)  # fmt: skip


class Draw(random.Random):
    """Random choices that depend on the op and the seed alone.

    `small` keeps to sizes that the emulated device can afford.
    """

    def __init__(self, op: str, seed: int, small: bool = False) -> None:
        super().__init__(f"{op}:{seed}")
        self.small = small

    def chance(self, probability: float = 0.5) -> bool:
        return self.random() < probability

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.randrange(2**62))

    # Sizes.
    def size(self, among: Sequence[int] = _SIZES) -> int:
        if self.chance(0.1):
            return self.randrange(1, 70 if self.small else 300)
        return self.choice([n for n in among if n <= 40] if self.small else among)

    def batch(self) -> int:
        return self.choices([0, 1, 2, 3, 5], [1, 4, 4, 3, 1])[0]

    def channels(self) -> int:
        return self.choice([n for n in _CHANNELS if n <= 64] if self.small else _CHANNELS)

    def heads(self) -> tuple[int, int]:
        """Heads of queries and of keys; at times no query heads, which ops refuse."""
        keys = self.choice([1, 2, 3])
        return keys * self.choices([0, 1, 2, 3, 4, 7], [1, 6, 4, 3, 3, 2])[0], keys

    def queries(self) -> int:
        few = [0, 1, 1, 1, 2, 3, 5, 8, 17]
        return self.choice(few if self.small else [*few, 1, 4, 16, 33, 64, 65, 100])

    def leading(self) -> list[int]:
        """Dimensions before the rows."""
        count = self.choice([0, 1, 1, 2, 2, 3])
        return [self.choices([0, 1, 2, 3, 4], [1, 3, 4, 3, 1])[0] for _ in range(count)]

    def shared(self, shape: Sequence[int]) -> list[int]:
        """The shape with 1 in some places."""
        return [1 if self.chance(0.3) else n for n in shape]

    def one_of(self, *options: int) -> int:
        return self.choice(options)

    # Numbers.
    def dtype(self, double: bool = False) -> torch.dtype:
        return self.choice([F32, F16, BF16, F64] if double and not self.small else [F32, F16, BF16])

    def floats(self, shape: Sequence[int], dtype: torch.dtype = F32, plain: bool = False) -> Tensor:
        """Normal numbers; unless plain, at times rounded so that they tie, constant, small, large,
        or with equal rows."""
        generator = self.generator()
        x = torch.randn(tuple(shape), generator=generator, dtype=F64)
        kinds = ("normal", "ties", "constant", "small", "large", "equal rows")
        kind = "normal" if plain else self.choices(kinds, [6, 2, 1, 1, 1, 1])[0]
        if kind == "ties":
            x = (x * 2).round() / 2
        elif kind == "constant":
            x = torch.full_like(x, self.choice([0.0, 1.0, -2.5]))
        elif kind in ("small", "large"):
            x = x * (1e-3 if kind == "small" else 30)
        elif kind == "equal rows" and x.dim() >= 2 and x.shape[-2] > 1:
            rows = torch.randint(0, max(1, x.shape[-2] // 3), (x.shape[-2],), generator=generator)
            x = x.index_select(-2, rows)
        return x.to(dtype)

    def spoiled(self, x: Tensor, share: float = 0.05) -> Tensor:
        """x with NaN, infinities, the largest and the smallest floats here and there."""
        x = x.clone()
        if not x.numel():
            return x
        count = min(max(1, int(x.numel() * share)), 300) if self.chance(0.7) else 1
        places = torch.tensor([self.randrange(x.numel()) for _ in range(count)])
        x.view(-1)[places] = torch.tensor(self.choices(_SPECIAL, k=count), dtype=F64).to(x.dtype)
        return x

    def mask(self, shape: Sequence[int]) -> Tensor:
        share = self.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        mask = torch.rand(tuple(shape), generator=self.generator()) < share
        if mask.dim() > 1 and mask.shape[0] and self.chance(0.4):
            mask[self.randrange(mask.shape[0])] = False
        return mask

    def indices(self, shape: Sequence[int], count: int, ends: bool = True) -> Tensor:
        """int32 around [0, count), and now and then any other int32."""
        shape = tuple(shape)
        generator = self.generator()
        x = torch.randint(-2, max(1, count + 2), shape, generator=generator)
        if ends and self.chance(0.6):
            far = torch.tensor(_INT32_ENDS)[torch.randint(0, 6, shape, generator=generator)]
            x = torch.where(torch.rand(shape, generator=generator) < 0.12, far, x)
        return x.int()

    def scale(self) -> float | None:
        return self.choice([None, None, None, 0.0, 1.0, -0.5, 0.02])

    # Memory.
    def rubbish(self, count: int, dtype: torch.dtype) -> Tensor:
        """What lies between the elements of a view."""
        if dtype.is_floating_point:
            return torch.full((count,), self.choice([torch.nan, torch.inf, 7.7e3]), dtype=dtype)
        high = 2 if dtype == torch.bool else 100
        return torch.randint(0, high, (count,), generator=self.generator()).to(dtype)

    def strided(self, x: Tensor, last_too: bool) -> Tensor:
        """The same numbers in a view with other strides whose last element ends its storage.

        The last dimension stays contiguous, unless `last_too`.
        """
        if x.dim() == 0 or not x.numel():
            return x
        outer = list(range(x.dim() if last_too else x.dim() - 1))
        if self.chance(0.65):
            self.shuffle(outer)
        strides, step = [0] * x.dim(), 1
        for dim in reversed(outer if last_too else [*outer, x.dim() - 1]):
            strides[dim] = step
            step = step * x.shape[dim] + self.choice([0, 0, 0, 0, 1, 2, 3, 17])
        offset = self.choice([0, 0, 1, 2, 3, 5, 31])
        end = offset + 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
        return self.rubbish(end, x.dtype).as_strided(x.shape, strides, offset).copy_(x)
