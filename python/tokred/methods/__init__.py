"""Published token-reduction methods, one a file, each a few lines over the ops."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

__all__ = ["METHODS", "Method", "get"]


@dataclass(frozen=True)
class Method:
    """What a method is and where it lives.

    status is "exact" where the published algorithm is followed to the letter, "approximate" where
    the result differs in a way the module's docstring states.
    """

    name: str
    title: str
    arxiv: str
    status: str
    summary: str

    def load(self) -> ModuleType:
        """The module tokred.methods.<name>; its OPTIONS is the class that tokred.patch fills."""
        return importlib.import_module(f"tokred.methods.{self.name}")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "tome",
            "Token Merging: Your ViT But Faster",
            "2210.09461",
            "exact",
            "between attention and MLP, merge the r most similar pairs of an even/odd split",
        ),
        Method(
            "tomesd",
            "Token Merging for Fast Stable Diffusion",
            "2303.17604",
            "exact",
            "merge into one token per grid cell before attention, copy back after it",
        ),
        Method(
            "pitome",
            "Accelerating Transformers with Spectrum-Preserving Token Merging",
            "2405.16148",
            "exact",
            "merge only inside dense clusters, which an energy score finds; keep lone tokens",
        ),
    )
}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(sorted(METHODS))}")
    return METHODS[name]
