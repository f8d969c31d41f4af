"""The MODEL of a command: a demo model, a folder, or an id of the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.compat import advice
from tokred.evaluation.inputs import reference_text

DEMO = ("smollm2", "dinov2")
_MODEL = (
    f"MODEL must be {' or '.join(DEMO)}, a folder that save_pretrained wrote, or an id of the "
    "Hugging Face hub"
)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and how its input is made.

    tokenizer: None of a model without one. size: the side of its square images in pixels, None of
    a model without images. mean, std: with which each channel of its images is normalised.
    """

    model: nn.Module
    tokenizer: Any
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name: str, device: str, dtype: str) -> Loaded:
    """The model that a command names, on a device.

    Raises:
        ValueError: there is none of that name; the message has the reason.
        tokred.demo.offline.MissingModelError: a demo model, or what reads it, is not installed.
        ImportError: transformers is not installed.
    """
    from tokred.demo.images import MEAN, STD

    if name == "smollm2":
        from tokred.demo.smollm2 import load_smollm2

        model, tokenizer = load_smollm2()
        found = Loaded(model, tokenizer, None, MEAN, STD)
    elif name == "dinov2":
        from tokred.demo.dinov2 import load_dinov2

        found = Loaded(load_dinov2(), None, 224, MEAN, STD)
    else:
        found = _from_transformers(name)
    kind = getattr(torch, dtype)
    try:
        found.model.to(device=device, dtype=kind)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot hold the model: {error}") from None
    return found


def _from_transformers(name: str) -> Loaded:
    from tokred.demo.images import MEAN, STD
    from tokred.demo.offline import broken_torchvision_hidden

    near = get_close_matches(name, DEMO, cutoff=0.75)
    if near and not Path(name).exists():
        raise ValueError(f"{_MODEL}, got {name!r}: did you mean {near[0]}?")
    try:
        with broken_torchvision_hidden():
            import transformers
            from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise ImportError(advice(error) or str(error)) from None
    logging.disable_progress_bar()
    with broken_torchvision_hidden():
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            kinds = [getattr(transformers, each, None) for each in config.architectures or ()]
            kind = next(filter(None, kinds), transformers.AutoModel)
            model = kind.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{_MODEL}, got {name!r}: {reason}") from None
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError):
            tokenizer = None
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    mean, std = _normalisation(name, MEAN, STD)
    return Loaded(model.eval(), tokenizer, size if isinstance(size, int) else None, mean, std)


def _normalisation(name: str, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and deviation of each channel that a folder says; those given where it says none."""
    path = Path(name) / "preprocessor_config.json"
    if path.is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        mean, std = said.get("image_mean", mean), said.get("image_std", std)
    # One number is of all channels.
    mean, std = ((x,) * 3 if isinstance(x, int | float) else tuple(x) for x in (mean, std))
    return mean, std


def pixels(paths: list[str], size: int, loaded: Loaded) -> list[Tensor]:
    """The centre square of each image file, f32 [1, 3, size, size]; a photograph of scikit-image
    where there are no files.

    Raises:
        OSError, ValueError: a file is no image.
    """
    from tokred.demo.gallery import photograph_from

    chosen: list[str | None] = [*paths] or [None]
    photographs = [photograph_from(path, size) for path in chosen]
    mean, std = (torch.tensor(x)[:, None, None] for x in (loaded.mean, loaded.std))
    images = [torch.from_numpy(each.image.copy()).permute(2, 0, 1) / 255 for each in photographs]
    return [((image - mean) / std)[None] for image in images]


def text_ids(path: str | None, tokens: int, loaded: Loaded) -> Tensor:
    """i64 [1, N]: the first tokens of a file, or of Python's own reference, `tokens` at most.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8, or the model has no tokenizer.
    """
    if loaded.tokenizer is None:
        raise ValueError("the model has no tokenizer in its folder, which --text needs")
    if path is None:
        text = reference_text()
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--text must be UTF-8, and {path} is not: {error}") from None
    return loaded.tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
