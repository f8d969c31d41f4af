"""Sums of measures over batches."""

from __future__ import annotations

from torch import Tensor


class Tally:
    """The means of what was added, by the names of measures."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Adds every number of a tensor."""
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def means(self) -> dict[str, float]:
        """The mean of each measure that has numbers."""
        return {name: self._sums[name] / n for name, n in self._counts.items() if n > 0}
