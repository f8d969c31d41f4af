"""Functions that choose visual tokens: scores and masks of other tokens, and rows without any."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SCORES = {
    "catp": "relevance",
    "dart": "norms",
    "flash_vlm": "scores",
    "holov": "attention",
    "idpruner": "scores",
    "scope": "attention",
    "vispruner": "attention",
    "zoo_prune": "sensitive",
}


def selection(name: str) -> Callable[..., Tensor]:
    return importlib.import_module(f"tokred.methods.{name}").select_tokens


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_other_tokens_are_refused(name: str) -> None:
    x, select = torch.randn(2, 12, 8), selection(name)
    for shape in ((2, 11), (2, 13), (3, 12)):
        with pytest.raises(ValueError, match=rf"must be \[2, 12\] .*got \[{shape[0]}, {shape[1]}"):
            select(x, torch.rand(shape), k=4)
    for valid in (torch.ones(2, 5).bool(), torch.ones(2, 12)):
        with pytest.raises(ValueError, match=r"valid must be bool \[2, 12\], got"):
            select(x, torch.rand(2, 12), k=4, valid=valid)


@pytest.mark.parametrize("name", SCORES)
def test_rows_without_tokens(name: str) -> None:
    picks = selection(name)(torch.randn(2, 0, 8), torch.rand(2, 0), k=4)
    assert picks.tolist() == [[-1] * 4] * 2
