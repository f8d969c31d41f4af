"""Methods that evict keys, beside attention to all keys under masks that a rule makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cases.inputs import generator
from tokred.integrations.transformers.kept_keys import KeptKeysLayer

HEADS, GROUP, DIM, PADDING = 2, 2, 16, 9
PARTS = (40, 1, 1, 1, 1, 6, 1, 1)


@dataclass
class Step:
    """What a rule is given after a pass, of one row of the batch without its padding.

    p: f64 [Hq, L, N], the attention weights of the new queries, 0 where a key is gone.
    q: f64 [Hq, L, D]. k, v: f64 [Hkv, N, D], all tokens. alive: bool [Hkv, N], those that stayed.
    memory: what earlier steps have left.
    """

    p: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    alive: Tensor
    memory: dict[str, Tensor]

    @property
    def is_prompt(self) -> bool:
        return self.p.shape[1] > 1

    def grouped(self, x: Tensor) -> Tensor:
        """[Hq, N] as means of the heads that share a key head."""
        return x.unflatten(0, (self.k.shape[0], -1)).mean(1)


Rule = Callable[[Step], Tensor]
"""The keys that stay, bool [Hkv, N], among those that are alive."""


def keep_best(scores: Tensor, alive: Tensor, budget: int | list[int]) -> Tensor:
    """bool [Hkv, N]: the living keys of largest score of every head, the earlier of two alike."""
    stays = torch.zeros_like(alive)
    budgets = [budget] * alive.shape[0] if isinstance(budget, int) else budget
    for head, count in enumerate(budgets):
        living = alive[head].nonzero()[:, 0].tolist()
        ranked = sorted(living, key=lambda j, h=head: (-float(scores[h, j]), j))
        stays[head, ranked[:count]] = True
    return stays


@dataclass
class Row:
    """Attention of one row of the batch to all of its tokens, in float64."""

    rule: Rule
    k: Tensor
    v: Tensor
    alive: Tensor
    softcap: float | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The new tokens, [H, L, D]: out [Hq, L, D]; then the rule drops some keys."""
        q, k, v = q.double(), k.double(), v.double()
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        new, total = k.shape[1], self.k.shape[1]
        self.alive = torch.cat([self.alive, torch.ones(k.shape[0], new, dtype=torch.bool)], 1)
        group = q.shape[0] // k.shape[0]
        keys, values, alive = (x.repeat_interleave(group, 0) for x in (self.k, self.v, self.alive))
        seen = torch.ones(new, total, dtype=torch.bool).tril(total - new) & alive[:, None]
        logits = q @ keys.mT / q.shape[2] ** 0.5
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        p = logits.masked_fill(~seen, -torch.inf).softmax(2)
        stays = self.rule(Step(p, q, self.k, self.v, self.alive, self.memory))
        assert not (stays & ~self.alive).any()
        self.alive = stays
        return p @ values


def check_layer(
    options: Any, rule: Rule, dtype: torch.dtype = torch.float32, layer: int = 0,
    num_layers: int = 1, rotary: Any = None, parts: tuple[int, ...] = PARTS,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """A layer's cache and attention beside the rule, for a row with left padding and one without.

    After every pass the keys that are left are those that the rule leaves, and the outputs agree.
    """
    draw = generator(3)
    cache = KeptKeysLayer(options, layer, num_layers, rotary)
    empty = torch.zeros(HEADS, 0, DIM, dtype=torch.float64)
    none = torch.zeros(HEADS, 0, dtype=torch.bool)
    rows = [Row(rule, empty, empty, none, softcap) for _ in range(2)]
    total, dropped = 0, 0
    for count in parts:
        q = torch.randn(2, HEADS * GROUP, count, DIM, generator=draw).to(dtype)
        k, v = (torch.randn(2, HEADS, count, DIM, generator=draw).to(dtype) for _ in range(2))
        total += count
        mask = torch.ones(2, 1, 1, total, dtype=torch.bool)
        mask[1, ..., :PADDING] = False
        states, _ = cache.update(k, v)
        out, _ = states.attend(q, mask, None, softcap)
        for row, pad in ((0, 0), (1, PADDING)):
            skip = pad if total == count else 0
            own = rows[row].step(q[row, :, skip:], k[row, :, skip:], v[row, :, skip:])
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {
                "rtol": 2e-2, "atol": 2e-2}  # fmt: skip
            torch.testing.assert_close(out[row, :, skip:].double(), own, **tolerance)
            assert kept_places(cache, row, pad) == [
                alive.nonzero()[:, 0].tolist() for alive in rows[row].alive
            ], f"row {row} after {total} tokens"
            dropped += int((~rows[row].alive).sum())
    assert dropped > 0 or cache.position is None


def kept_places(cache: KeptKeysLayer, row: int, padding: int = 0) -> list[list[int]]:
    """The places of the tokens that each head of a row has kept, padding left out."""
    if cache.position is None:
        return [list(range(cache.length - padding))] * cache.keys.shape[1]
    places = [sorted(head.tolist()) for head in cache.position[row]]
    if cache.bias is not None:
        hidden = cache.bias[row] == -torch.inf
        places = [
            sorted(head[~gone].tolist())
            for head, gone in zip(cache.position[row], hidden, strict=True)
        ]
    return [[place - padding for place in head] for head in places]
