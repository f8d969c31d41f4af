"""How a layer of a packed cache removes its last tokens as if they had never been appended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contents import Contents

# Tokens that can be taken back; draft models propose fewer at a time.
ROLLBACK = 64


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What is needed to undo appends: overwritten tensors, and the appended tokens unpacked.

    windows and key_mean are copies from when the cache had `length` tokens; tokens packed by then
    are not stored. keys and values are all tokens appended since, in full precision: to crop, some
    of them are appended to the old contents again. settled: a crop has happened, so that the next
    tokens start a new checkpoint.
    """

    length: int
    windows: dict[str, Tensor]
    key_mean: Tensor | None
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    settled: bool = False

    @classmethod
    def of(cls, contents: Contents, length: int) -> Checkpoint:
        """The checkpoint of contents with `length` tokens, from which none was appended yet."""
        windows = {name: tensor.clone() for name, tensor in contents.windows.items()}
        return cls(length, windows, contents.key_mean, (), ())

    @property
    def tokens(self) -> int:
        """How many tokens were appended since."""
        return sum(each.shape[2] for each in self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that it holds."""
        tensors = (*self.windows.values(), *self.keys, *self.values)
        return sum(tensor.nbytes for tensor in tensors)

    def extended(self, keys: Tensor, values: Tensor) -> Checkpoint:
        """The checkpoint with copies of these tokens."""
        return replace(self, keys=(*self.keys, keys.clone()), values=(*self.values, values.clone()))

    def settle(self) -> Checkpoint:
        """The same, settled."""
        return replace(self, settled=True)

    def map(self, function: Callable[[Tensor], Tensor]) -> Checkpoint:
        """The function applied to every tensor, the first dimension of which is the batch."""
        return Checkpoint(
            self.length,
            {name: function(tensor) for name, tensor in self.windows.items()},
            None if self.key_mean is None else function(self.key_mean),
            tuple(map(function, self.keys)),
            tuple(map(function, self.values)),
            self.settled,
        )

    def rolled_back(self, contents: Contents, length: int) -> tuple[Contents, Checkpoint]:
        """The later contents cropped to `length` tokens, and the checkpoint to go on from."""
        windows = {name: tensor.clone() for name, tensor in self.windows.items()}
        packed = contents.packed
        if self.key_mean is None and contents.key_mean is not None:
            # The tokens are packed again, with another mean, which must not change the contents
            # that stay where something fails.
            packed = contents.map(torch.clone).packed
        earlier = replace(contents, packed=packed, windows=windows, key_mean=self.key_mean)
        # In the parts in which they were appended: the mean is that of the keys up to one of them.
        at, keys, values = self.length, [], []
        for more_keys, more_values in zip(self.keys, self.values, strict=True):
            count = min(more_keys.shape[2], length - at)
            if count == 0:
                break
            keys.append(more_keys[:, :, :count])
            values.append(more_values[:, :, :count])
            earlier = earlier.appended(at, keys[-1], values[-1])
            at += count
        return earlier, replace(self, keys=tuple(keys), values=tuple(values))
