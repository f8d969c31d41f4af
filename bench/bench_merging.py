"""Every method that merges or drops the tokens of a vision encoder, beside the unpatched model.

DINOv2 ViT-S/14 at 518 pixels on one photograph. Half of the tokens are left behind the last
layer, and every layer that a method reduces gives up as many, or the same share; where this comes
to another number (tca_condensation), the number says so. Cosines are those
to the unpatched model's class token and patches; what is left of a dropped patch counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokred

from .bench_models import UNPATCHED, dinov2, features, photographs, sharing_copy
from .harness import Case
from .machine import DTYPES, Run

PIXELS, LAYERS, TOKENS, KEEP = 518, 12, 1370, 0.5


def methods() -> dict[str, dict[str, Any]]:
    """The options of every method that leave half of the tokens."""
    from tokred.evaluation.budgets import options_at, reducers

    options = {m.name: options_at(m, LAYERS, TOKENS, KEEP) for m in reducers((), "methods")}
    return {name: found for name, found in options.items() if found is not None}


def candidates(model: nn.Module, x: Tensor) -> dict[str, Callable]:
    calls: dict[str, Callable] = {UNPATCHED: partial(model, x)}
    for name, options in methods().items():
        patched = sharing_copy(model)
        tokred.patch(patched, name, **options).__enter__()
        calls[f"tokred {name}"] = partial(patched, x)
    return calls


def quality(model: nn.Module, x: Tensor, outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
    exact = features(outputs[UNPATCHED]).float()
    metrics = {UNPATCHED: {"tokens": float(exact.shape[1])}}
    for name, options in methods().items():
        with tokred.patch(model, name, trace_source=True, **options) as handle:
            left = features(model(x))
            every = handle.unmerge(left).float()
        cosine = F.cosine_similarity(every, exact, dim=-1)
        metrics[f"tokred {name}"] = {
            "tokens": float(left.shape[1]),
            "cls_cosine": cosine[:, 0].mean().item(),
            "patch_cosine": cosine[:, 1:].mean().item(),
        }
    return metrics


def cases(run: Run) -> Iterator[Case]:
    if not (find_spec("transformers") and find_spec("skimage")):
        return
    dtype = "bfloat16" if run.device == "cuda" else "float32"
    model, inputs = dinov2()
    model = model.to(run.device, DTYPES[dtype])
    x = photographs(PIXELS)[:1].to(run.device, DTYPES[dtype])
    yield Case("merging", "DINOv2 ViT-S/14, half of the tokens", tuple(x.shape), dtype,
               partial(candidates, model, x), inputs, examine=partial(quality, model, x),
               context=torch.inference_mode)  # fmt: skip
