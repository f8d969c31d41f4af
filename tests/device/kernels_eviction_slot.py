"""Calls that launch the kernels of eviction_slot and replace_token."""

from __future__ import annotations

import torch
from launches import Call, draw, whole

import tokred


def _chosen(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    position = torch.arange(1100, dtype=torch.int32, device=device).expand(2, 4, 1100)
    scores, logits = draw((2, 4, 1100), device).abs(), draw((2, 8, 1100), device)
    lse = draw((2, 8), device) + 8
    return tokred.eviction_slot(position, 1100, scores, logits, lse, first=4, recent=500)


def _replaced(device: str) -> torch.Tensor:
    k, v = draw((2, 4, 1100, 64), device), draw((2, 4, 1100, 80), device)
    new_k, new_v = draw((2, 4, 1, 64), device), draw((2, 4, 1, 80), device)
    tokred.replace_token(whole(1100, (2, 4, 1), device), k, new_k, v, new_v)
    return torch.cat([k, v], 3)


CALLS = (
    Call("eviction_slot", ("eviction_slot_kernel",), _chosen),
    Call("replace_token", ("replace_token_kernel",), _replaced),
)
