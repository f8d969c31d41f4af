"""python -m tokred methods: the published methods, and one of them in full."""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import groupby
from typing import Any

import tokred.methods
from tokred.methods import Method, get, written

# The models that an adapter can patch.
_MODELS = {
    "timm": "timm's vision transformers",
    "transformers": "transformers' encoders of images, sound and text",
    "diffusers": "diffusers' models",
    "causal_lm": "transformers' causal language models",
    "causal_lm_cache": "transformers' causal language models, in their caches",
    "vision_language": "transformers' vision-language models",
}


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "methods",
        help=methods.__doc__,
        description=f"{methods.__doc__}; with NAMES, what they do, their options and models",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("names", nargs="*", metavar="NAME", help="only these, in full")
    command.set_defaults(function=methods)


def methods(options: argparse.Namespace) -> int:
    """the published methods; those whose papers leave formulas open are marked"""
    chosen = [get(name) for name in options.names] or list(tokred.methods.METHODS.values())
    if options.json:
        print(json.dumps([method.as_dict() for method in chosen], indent=2, default=repr))
        return 0
    if options.names:
        print("\n\n".join(described(method) for method in chosen))
        return 0
    for family, listed in groupby(chosen, key=lambda method: method.family):
        print(f"\n{family.value}:" if family is not chosen[0].family else f"{family.value}:")
        for method in listed:
            status = "" if method.status == "exact" else f" ({method.status})"
            print(f"  {method.name:18s} arXiv:{method.arxiv}  {method.title}{status}")
            print(f"  {'':18s} {method.summary}")
    return 0


def described(method: Method) -> str:
    """A method in full: paper, models, the call, options, and what its file says."""
    adapters = getattr(method.options, "adapters", ())
    where = "; ".join(_MODELS[adapter] for adapter in adapters)
    lines = [
        f"{method.name}: {method.summary}",
        "",
        f"paper    {method.title}, https://arxiv.org/abs/{method.arxiv} ({method.status})",
        f"family   {method.family.value}",
        f"needs    {method.needs_in_words}",
        f"models   {where or 'those that are written for it'}",
        f"call     {method.usage() or f'the functions of tokred.methods.{method.name}'}",
    ]
    if method.options is not None:
        lines += ["", "options:", *_options(method)]
    return "\n".join([*lines, "", (method.load().__doc__ or "").strip()])


def _options(method: Method) -> list[str]:
    """Lines: the defaults, then the docstring of the options."""
    defaults = [
        f"{name} (no default)" if value is dataclasses.MISSING else f"{name}={written(value)}"
        for name, value in method.defaults().items()
    ]
    text = (method.options.__doc__ or "").strip().split("\n", 1)
    said = text[1].strip("\n").rstrip().split("\n") if len(text) > 1 else []
    return [f"  defaults: {', '.join(defaults)}", *(line[2:] if line else "" for line in said)]
