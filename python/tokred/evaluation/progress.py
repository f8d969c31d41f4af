"""Progress bars: tqdm's where it is installed, and lines where it is not."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A bar on stderr, of steps that have names; nothing is shown where nobody looks.

    total: the steps, None where their number is not known.
    """

    def __init__(self, total: int | None, shown: bool = True) -> None:
        self.total, self.done = total, 0
        self.shown = shown and sys.stderr.isatty()
        self.bar: Any = None
        if self.shown:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self.bar = tqdm(total=total, leave=False, dynamic_ncols=True)

    def step(self, name: str) -> None:
        """Says what is measured next."""
        if self.bar is not None:
            self.bar.set_description(name)
        elif self.shown:
            of = "" if self.total is None else f"/{self.total}"
            print(f"{self.done + 1}{of} {name}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        """A step is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
