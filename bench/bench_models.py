"""Whole models: ToMe by tokred.patch beside the unpatched model with SDPA.

DINOv2 ViT-S/14 on four photographs, with the cosine between patched and unpatched features; a
timm ViT-S/16, whose random weights only time. Patched copies share the model's parameters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokred

from .harness import Case
from .machine import DTYPES, Run

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
AMOUNTS = {518: (32, 64, 96), 224: (4, 8, 16)}
MORE_AMOUNTS = {518: (16, 32, 48, 64, 80, 96, 112), 224: (2, 4, 6, 8, 12, 16)}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNPATCHED = "unpatched, SDPA"


def photographs(pixels: int) -> Tensor:
    """[4, 3, pixels, pixels], normalised as DINOv2 expects."""
    from skimage import data
    from skimage.transform import resize

    images = [
        resize(getattr(data, name)(), (pixels, pixels), anti_aliasing=True) for name in PHOTOGRAPHS
    ]
    x = torch.stack([torch.from_numpy(image).permute(2, 0, 1).float() for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def allow_torchvision() -> None:
    """transformers imports torchvision where it is installed, timm always does."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from cases import torchvision_stub

    torchvision_stub.install()


def dinov2() -> tuple[nn.Module, str]:
    """The model and what runs through it; random weights, which only time, where it is missing."""
    allow_torchvision()
    from tokred.demo.dinov2 import load_dinov2
    from tokred.demo.offline import MissingModelError

    try:
        return load_dinov2(), "photographs"
    except MissingModelError as error:
        print(f"random weights, because {error}")
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    return Dinov2Model(config).eval(), "photographs, random weights"


def has_timm() -> bool:
    """Looks into the folder of its own, too, that the Makefile gives timm and torchvision."""
    folder = Path(sys.prefix) / "timm"
    if folder.is_dir():
        sys.path.append(str(folder))
    return find_spec("timm") is not None


def timm_vit() -> nn.Module:
    allow_torchvision()
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_384", pretrained=False).eval()


def sharing_copy(model: nn.Module) -> nn.Module:
    """Modules of its own, parameters and buffers shared."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def inside(
    patch: Callable[[nn.Module], AbstractContextManager], model: nn.Module, held: ExitStack
) -> nn.Module:
    """A sharing copy inside `patch(copy)` while `held` is open: no step enters or leaves it."""
    copied = sharing_copy(model)
    held.enter_context(patch(copied))
    return copied


def features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


Patches = dict[str, tuple[str, dict[str, Any]]]  # the method and its options, by candidate


def tome(amounts: tuple[int, ...]) -> Patches:
    return {f"tokred tome r={r}": ("tome", {"r": r}) for r in amounts}


def candidates(model: nn.Module, x: Tensor, patches: Patches) -> dict[str, Callable]:
    calls: dict[str, Callable] = {UNPATCHED: partial(model, x)}
    for name, (method, options) in patches.items():
        patched = sharing_copy(model)
        tokred.patch(patched, method, **options).__enter__()
        calls[name] = partial(patched, x)
    return calls


def quality(
    model: nn.Module, x: Tensor, patches: Patches, outputs: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Tokens left, and mean cosines to the unpatched class token and unmerged patch tokens."""
    exact = features(outputs[UNPATCHED]).float()
    metrics = {UNPATCHED: {"r": 0.0, "tokens": float(exact.shape[1])}}
    for name, (method, options) in patches.items():
        with tokred.patch(model, method, trace_source=True, **options) as handle:
            merged = features(model(x))
            every = handle.unmerge(merged).float()
        cosine = F.cosine_similarity(every, exact, dim=-1)
        r = options.get("r")
        metrics[name] = {
            **({"r": float(r)} if isinstance(r, int) else {}),
            "tokens": float(merged.shape[1]),
            "cls_cosine": cosine[:, 0].mean().item(),
            "cls_cosine_worst": cosine[:, 0].min().item(),
            "patch_cosine": cosine[:, 1:].mean().item(),
        }
    return metrics


def dinov2_case(
    loaded: tuple[nn.Module, str], pixels: int, amounts: tuple[int, ...], dtype: str, device: str
) -> Case:
    model, inputs = loaded
    model = model.to(device, DTYPES[dtype])
    x = photographs(pixels).to(device, DTYPES[dtype])
    return Case(
        "models",
        "DINOv2 ViT-S/14",
        tuple(x.shape),
        dtype,
        partial(candidates, model, x, tome(amounts)),
        inputs,
        examine=partial(quality, model, x, tome(amounts)),
        context=torch.inference_mode,
    )


def timm_case(model: nn.Module, amounts: tuple[int, ...], dtype: str, device: str) -> Case:
    model = model.to(device, DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 384, 384, generator=generator).to(device, DTYPES[dtype])

    def examine(outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {UNPATCHED: {"r": 0.0}} | {f"tokred tome r={r}": {"r": float(r)} for r in amounts}

    return Case(
        "models",
        "timm ViT-S/16",
        tuple(x.shape),
        dtype,
        partial(candidates, model, x, tome(amounts)),
        "randn, random weights",
        examine=examine,
        context=torch.inference_mode,
    )


def cases(run: Run) -> Iterator[Case]:
    dtype = "bfloat16" if run.device == "cuda" else "float32"
    amounts = AMOUNTS if run.quick else MORE_AMOUNTS
    if find_spec("transformers") and find_spec("skimage"):
        loaded = dinov2()
        for pixels in (518, 224):
            yield dinov2_case(loaded, pixels, amounts[pixels], dtype, run.device)
    if not run.quick and has_timm():
        yield timm_case(timm_vit(), (16, 32, 48), dtype, run.device)
