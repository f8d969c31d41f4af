"""Every method that merges or drops the tokens of a vision encoder, beside the unpatched model.

DINOv2 ViT-S/14 at 518 pixels on one photograph. Half of the tokens are left behind the last
layer, and every layer that a method reduces gives up as many, or the same share, which is found by
trying where a method leaves another one than it is given. Cosines are those to the unpatched
model's class token and patches; what is left of a dropped patch counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from .bench_models import Patches, candidates, dinov2, photographs, quality
from .harness import Case
from .machine import DTYPES, Run

PIXELS, LAYERS, TOKENS, KEEP = 518, 12, 1370, 0.5


def patches(model: nn.Module, x: Tensor) -> Patches:
    """Every method, with the options that leave half of the tokens."""
    from tokred.demo.images import tokens_left
    from tokred.evaluation.budgets import fitted, options_at, reducers

    made: Patches = {}
    for method in reducers((), "methods"):
        options = options_at(method, LAYERS, TOKENS, KEEP)
        if options is None:
            continue
        left = partial(tokens_left, model, method.name, x)
        options = fitted(method, LAYERS, options, KEEP * (TOKENS - 1), left)
        made[f"tokred {method.name}"] = method.name, options
    return made


def cases(run: Run) -> Iterator[Case]:
    if not (find_spec("transformers") and find_spec("skimage")):
        return
    dtype = "bfloat16" if run.device == "cuda" else "float32"
    model, inputs = dinov2()
    model = model.to(run.device, DTYPES[dtype])
    x = photographs(PIXELS)[:1].to(run.device, DTYPES[dtype])
    with torch.inference_mode():
        some = patches(model, x)
    yield Case("merging", "DINOv2 ViT-S/14, half of the tokens", tuple(x.shape), dtype,
               partial(candidates, model, x, some), inputs,
               examine=partial(quality, model, x, some),
               context=torch.inference_mode)  # fmt: skip
