"""Cases of adjacent_runs."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, namespace, op_case
from compare import Mismatch
from draw import Draw

_CHANNELS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129, 300)
_ORDER = ("x", "threshold", "y", "mask", "max_length", "num_sinks", "num_locals")


@op_case
def adjacent_runs(draw: Draw) -> Case:
    batch, n = draw.batch(), draw.size()
    shape = batch, n, draw.size(_CHANNELS)
    dtype = draw.dtype()
    x = draw.floats(shape, dtype)
    some: dict[str, Any] = {"x": draw.spoiled(x) if draw.chance(0.2) else x}
    some["threshold"] = draw.choice([-2.0, -0.3, 0.0, 0.1, 0.5, 0.9, 1.5])
    some["y"] = draw.floats(shape, dtype) if draw.chance(0.3) else None
    some["mask"] = draw.mask((batch, n)) if draw.chance(0.5) else None
    some |= {name: draw.choice([0, 0, 1, 2, 3, n, n + 9]) for name in _ORDER[4:]}

    def call(**inputs: Any) -> Any:
        return namespace().adjacent_runs.default(*(inputs[name] for name in _ORDER))

    def check(out: Any) -> None:
        """The runs are those of the cosines that came with them."""
        ids, start, length, count, cosine = out
        for b in range(batch):
            alive = torch.ones(n, dtype=torch.bool) if some["mask"] is None else some["mask"][b]
            places = alive.nonzero()[:, 0].tolist()
            free = set(places[some["num_sinks"] : max(len(places) - some["num_locals"], 0)])
            runs: list[list[int]] = []
            for t in places:
                joins = runs and runs[-1][-1] == t - 1 and {t - 1, t} <= free
                joins = joins and bool(cosine[b, t] >= some["threshold"])
                if joins and not 0 < some["max_length"] <= len(runs[-1]):
                    runs[-1].append(t)
                else:
                    runs.append([t])
            padding = [-1] * (n - len(runs))
            number = {t: r for r, run in enumerate(runs) for t in run}
            if (
                ids[b].tolist() != [number.get(t, -1) for t in range(n)]
                or start[b].tolist() != [run[0] for run in runs] + padding
                or length[b].tolist() != [len(run) for run in runs] + padding
                or int(count[b]) != len(runs)
            ):
                raise Mismatch(f"item {b} is not cut where its cosines say")

    return Case("adjacent_runs", some, check=check, call=call, batched=("x", "y", "mask"),
                loose=("mask",))  # fmt: skip
