"""Runs a case in every way that must not matter: instruction sets, threads, strides, batches."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from case import CASES, Case, clone, precision, widened
from compare import Mismatch, flat, near, same
from draw import F64, Draw
from guard import Guard

from cases.backends import ISAS, SIMT_LIBRARY, set_cpu_isa

for _path in sorted(Path(__file__).parent.glob("op_*.py")):
    importlib.import_module(_path.stem)  # registers its cases

# Of this machine, the best one last.
HERE = tuple(isa for isa in ISAS if set_cpu_isa(isa))


class Examiner:
    """Examines cases on one backend, "cpu", "simt" or "cuda", with guarded tensors on the CPU."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        if backend == "simt":
            torch.ops.load_library(str(SIMT_LIBRARY))
        self.guard = Guard()
        self.calls = 0

    def examine(self, op: str, seed: int) -> Case:
        """Makes the case of this seed and examines it.

        Raises:
            Mismatch: a result is wrong; its message ends with the case.
        """
        draw = Draw(op, seed, small=self.backend != "cpu")
        torch.set_num_threads(1)
        with torch.no_grad(), self.guard.on():
            case = CASES[op](draw)
            try:
                self._examine(case, draw)
            except Exception as error:
                kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
                raise Mismatch(f"{kind}{error}\n    {case}") from error
        return case

    def _examine(self, case: Case, draw: Draw) -> None:
        self._set(draw, HERE[-1], 1)
        try:
            base = self._call(case, clone(case.arguments), "first")
        except RuntimeError:
            if case.refusable:
                return
            raise
        self._against_plain(case, base)
        for _ in range(2 if self.backend == "cpu" else 1):
            self._set(draw, draw.choice(HERE), draw.one_of(1, 2))
            same(self._call(case, case.strided(draw), "strided"), base, f"strided {self._where}")
        ways = [(isa, threads) for isa in HERE for threads in (1, 2)]
        for isa, threads in draw.sample(ways, 2) if self.backend == "cpu" else []:
            self._set(draw, isa, threads)
            same(self._call(case, clone(case.arguments), "again"), base, f"again {self._where}")
        batch = case.batch()
        if batch > 1:
            number = draw.randrange(batch)
            self._set(draw, draw.choice(HERE), 1)
            alone = self._call(case, case.item(number), "alone")
            part = [t[number : number + 1] for t in flat(base)]
            same(alone, part, f"item {number} of {batch} alone {self._where}")

    def _set(self, draw: Draw, isa: str, threads: int) -> None:
        set_cpu_isa(isa)
        torch.set_num_threads(threads)
        self.guard.vary(draw.randrange(64))
        cpu = f"on {isa} in {threads} threads"
        self._where = cpu if self.backend == "cpu" else f"on {self.backend}"

    def _call(self, case: Case, arguments: dict[str, Any], context: str) -> Any:
        """The result; raises if an input was written."""
        before = clone(arguments)
        out = case.run(arguments, self.backend)
        self.calls += 1
        for name, value in arguments.items():
            if name not in case.written:
                same(value, before[name], f"{context}: the argument {name} was written: it")
        return out

    def _against_plain(self, case: Case, base: Any) -> None:
        if case.check:
            case.check(base)
        if case.plain is None:
            return
        with self.guard.on(False):
            wide, narrow = (
                widened(case.arguments, dtype) for dtype in (F64, precision(case.arguments))
            )
            exact, single = case.plain(**wide), case.plain(**narrow)
        slack = case.slack
        halves = [t.dtype for t in flat(list(case.arguments.values())) if t.element_size() == 2]
        if case.halves and halves and self.backend != "cpu":
            slack = max(slack, 2 * max(torch.finfo(dtype).eps for dtype in halves))
        near(case.measure(base), exact, single, slack, "against plain torch", case.where)
