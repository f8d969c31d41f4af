"""Lets a CUDA build of torchvision, which is what PyPI has, be imported beside a CPU-only torch.

Its Python code registers fake kernels for ops that only its own library defines, and that library
does not load there. Declaring the ops is enough: timm and transformers use none of them.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_ANY = "(Tensor x) -> Tensor"
_POOLS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_SCHEMAS = [f"{name}{_BOXES}" for name in ("nms", "qnms")]
_SCHEMAS += [f"{name}{_ANY}" for pool in _POOLS for name in (pool, f"_{pool}_backward")]

_library: torch.library.Library | None = None


def install() -> None:
    """Declares torchvision's ops where its library cannot; once, before torchvision is imported.

    Also looks in <environment>/timm, where the Makefile keeps timm and torchvision.
    """
    global _library
    apart = Path(sys.prefix) / "timm"
    if apart.exists() and str(apart) not in sys.path:
        sys.path.append(str(apart))
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    if _library is not None or torch.version.cuda is not None or version.endswith("+cpu"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
