"""Cases of eviction_slot and replace_token."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch, near, same
from draw import BF16, F16, F32, F64, FAR, Draw
from torch import Tensor

import tokred
from tokred import reference
from tokred.reference.topk import eviction_scores


@op_case
def eviction_slot(draw: Draw) -> Case:
    batch, keys = draw.batch(), draw.size()
    heads_q, heads = draw.heads()
    heads_q = heads_q or heads
    shape = (batch, heads, keys)
    some: dict[str, Any] = {"position": draw.indices(shape, 3 * keys)}
    some["length"] = draw.choice([0, keys, 3 * keys, 2**31, FAR])
    spoil = draw.spoiled if draw.chance(0.2) else lambda x: x
    if draw.chance(0.6):
        some["scores"] = spoil(draw.floats(shape))
    if draw.chance(0.6):
        some["logits"] = spoil(draw.floats((batch, heads_q, keys)))
        some["lse"] = draw.floats((batch, heads_q), plain=True) + 4
        if draw.chance(0.2):
            some["lse"][:, :1] = -torch.inf
        some["shared"] = draw.chance(0.3)
        if draw.chance(0.3):
            some["softcap"] = draw.choice([0.5, 30.0])
    if draw.chance(0.4):
        wide = (draw.one_of(1, batch), draw.one_of(1, heads), keys)
        some["bias"] = draw.floats(wide, plain=True).masked_fill(draw.mask(wide), -torch.inf)
    if draw.chance(0.3):
        some["start"] = draw.indices((batch,), keys)
    if draw.chance(0.4):
        some["newest"] = draw.indices((batch, heads, 1), keys)
    some["first"], some["recent"] = (draw.choice([0, 0, 1, 4, keys, FAR]) for _ in range(2))
    some["largest"] = draw.chance(0.3)

    def check(out: Any) -> None:
        slot, total = out
        if "logits" not in some:
            same(out, reference.eviction_slot(**some), "against the reference")
            return
        kept = torch.arange(keys) != slot
        exact, single = (_scores(some, dtype) for dtype in (F64, F32))
        near(total, exact, single, 2e-6, "what is received", where=kept)
        if total[~kept].any():
            raise Mismatch("the key that goes has a number")
        _check_choice(some, slot, total.where(kept, single))

    batched = ("position", "scores", "logits", "lse", "bias", "start", "newest")
    return Case("eviction_slot", some, check=check, batched=batched, loose=("lse", "start"))


def _scores(some: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The scores by which keys are ranked."""
    given = {name: some.get(name) for name in ("scores", "logits", "lse", "bias")}
    given = {name: None if x is None else x.to(dtype) for name, x in given.items()}
    newest, shared, softcap = (some.get(name) for name in ("newest", "shared", "softcap"))
    return eviction_scores(some["position"], *given.values(), newest, shared, softcap)


def _check_choice(some: dict[str, Any], slot: Tensor, number: Tensor) -> None:
    """Where rounding may order keys either way, any of them is right."""
    given = {name: x for name, x in some.items() if name not in ("logits", "lse", "softcap")}
    expected = reference.eviction_slot(**{**given, "scores": number, "shared": False})[0]
    if number.shape[2] == 0:
        same(slot, expected, "the key that goes")
        return
    chosen, best = (number.gather(2, each.long()) for each in (slot, expected))
    if not torch.allclose(chosen, best, rtol=1e-5, atol=1e-6, equal_nan=True):
        raise Mismatch(f"keys {slot.tolist()} go, not {expected.tolist()}")


@op_case
def replace_token(draw: Draw) -> Case:
    batch, heads, slots = draw.batch(), draw.one_of(1, 2, 3), draw.size()
    dtypes = [F32, F16, BF16, F64, torch.int64, torch.uint8]
    some: dict[str, Any] = {"slot": draw.indices((batch, heads, 1), slots)}
    for name in ("keys", "values"):
        tail = draw.choice([(), (1,), (7,), (16,), (33,), (3, 5)])
        x = torch.randint(-100, 100, (batch, heads, slots + 1, *tail), generator=draw.generator())
        x = x.to(draw.choice(dtypes))
        some[name], some[f"new_{name}"] = x[:, :, 1:].contiguous(), x[:, :, :1].contiguous()
    if draw.chance(0.7):
        some["position"] = draw.indices((batch, heads, slots), slots)
    some["new_position"] = draw.choice([-1, 0, 7, 2**31 - 1])
    written = tuple(name for name in ("keys", "values", "position") if name in some)

    def call(**inputs: Any) -> list[Tensor]:
        tokred.replace_token(**inputs)
        return [inputs[name].clone() for name in written]

    def check(out: Any) -> None:
        expected = {name: x.clone() if isinstance(x, Tensor) else x for name, x in some.items()}
        reference.replace_token(**expected)
        same(out, [expected[name] for name in written], "against the reference")

    tensors = tuple(name for name, x in some.items() if isinstance(x, Tensor))
    return Case("replace_token", some, check=check, call=call, batched=tensors,
                dense=("keys", "new_keys", "values", "new_values"), written=written)  # fmt: skip
