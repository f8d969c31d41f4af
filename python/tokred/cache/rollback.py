"""How a layer of a packed cache takes back its last tokens without a trace."""

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
    """What packing tokens overwrote, and the tokens that have come since, as the model made them.

    Windows and mean are those at `length`; what was packed then still is. Appending as many of the
    tokens as remain makes the contents that they alone would have made. Settled: tokens were taken
    back, or were not but could have been; those that remain are here to stay.
    """

    length: int
    windows: dict[str, Tensor]
    key_mean: Tensor | None
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    settled: bool = False

    @classmethod
    def of(cls, contents: Contents, length: int) -> Checkpoint:
        windows = {name: tensor.clone() for name, tensor in contents.windows.items()}
        return cls(length, windows, contents.key_mean, (), ())

    @property
    def tokens(self) -> int:
        """How many have come since."""
        return sum(each.shape[2] for each in self.keys)

    @property
    def nbytes(self) -> int:
        tensors = (*self.windows.values(), *self.keys, *self.values)
        return sum(tensor.nbytes for tensor in tensors)

    def extended(self, keys: Tensor, values: Tensor) -> Checkpoint:
        """With copies of these tokens."""
        return replace(self, keys=(*self.keys, keys.clone()), values=(*self.values, values.clone()))

    def settle(self) -> Checkpoint:
        return replace(self, settled=True)

    def map(self, function: Callable[[Tensor], Tensor]) -> Checkpoint:
        """The function of every tensor, whose first dimension is the batch."""
        return Checkpoint(
            self.length,
            {name: function(tensor) for name, tensor in self.windows.items()},
            None if self.key_mean is None else function(self.key_mean),
            tuple(map(function, self.keys)),
            tuple(map(function, self.values)),
            self.settled,
        )

    def rolled_back(self, contents: Contents, length: int) -> tuple[Contents, Checkpoint]:
        """What the later contents are at `length` tokens, and the checkpoint to go on from."""
        windows = {name: tensor.clone() for name, tensor in self.windows.items()}
        packed = contents.packed
        if self.key_mean is None and contents.key_mean is not None:
            # Tokens are packed again, with another mean, while the later contents may still fail
            # to be replaced.
            packed = contents.map(torch.clone).packed
        earlier = replace(contents, packed=packed, windows=windows, key_mean=self.key_mean)
        count = length - self.length
        if count == 0:
            return earlier, replace(self, keys=(), values=())
        keys, values = (torch.cat(side, 2)[:, :, :count] for side in (self.keys, self.values))
        checkpoint = replace(self, keys=(keys,), values=(values,))
        return earlier.appended(self.length, keys, values), checkpoint
