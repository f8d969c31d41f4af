"""What the methods for vision-language models share: their options, and how many tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ._method import Options


@dataclass(frozen=True)
class VisualOptions(Options):
    """Options of methods that choose visual tokens.

    keep: visual tokens kept per image. ratio: the share kept, in (0, 1], in place of keep.
    positions: "kept" or "renumbered"; "auto" keeps those of several dimensions (M-RoPE) alone.
    newlines: "keep" or "drop" the tokens at the ends of rows of patches.
    """

    keep: int = 64
    ratio: float | None = None
    positions: Literal["auto", "kept", "renumbered"] = "auto"
    newlines: Literal["keep", "drop"] = "keep"

    adapters: ClassVar[tuple[str, ...]] = ("vision_language",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """None, of a method that reads the visual tokens alone."""
        return []

    def count(self, tokens: int) -> int:
        """How many of an image's tokens stay: keep, or round(ratio * tokens), at least 1."""
        wanted = self.keep if self.ratio is None else max(round(self.ratio * tokens), 1)
        return min(wanted, tokens)
