"""Progress bars: tqdm's where it is installed, and lines where it is not."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A bar on stderr, or in a notebook, of steps that have names.

    shown: whether there is one. total: the steps, None as long as their number is not known.
    """

    def __init__(self, shown: bool = True, total: int | None = None) -> None:
        self.shown, self.total, self.done = shown, total, 0
        self.bar: Any = None
        if shown:
            try:
                from tqdm.auto import tqdm
            except ModuleNotFoundError:
                return
            # Where stderr is a file, a line in ten seconds is enough.
            interval = 0.1 if sys.stderr.isatty() else 10
            self.bar = tqdm(total=total, leave=False, mininterval=interval)

    def expect(self, total: int) -> None:
        """Says how many steps there are in all."""
        self.total = total
        if self.bar is not None:
            self.bar.reset(total)
            self.bar.update(self.done)

    def step(self, name: str) -> None:
        """Says what is measured next."""
        if self.bar is not None:
            self.bar.set_description(name, refresh=False)
        elif self.shown:
            of = "" if self.total is None else f" of {self.total}"
            print(f"{self.done + 1}{of}: {name}", file=sys.stderr, flush=True)

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
