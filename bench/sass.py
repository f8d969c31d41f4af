"""python -m bench.sass [--check] [--only NAME]: what the CUDA kernels' machine code promises.

Compiles one instance of each kernel for the H200, counts the instructions of its main loop, and
predicts the time of one shape as the longest of four: the issue slots of all multiprocessors, the
half-rate integer pipe, the bytes, and the tensor cores. Writes the table of docs/cuda.md; with
--check it fails where a kernel has left its budget. Needs nvcc, and cuobjdump and nvdisasm of
requirements/test.txt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .machine_code import CLASS_OF, CLASSES, HALF_RATE, OTHER, Code, Flow, machine_code
from .tables import duration, table

# An H200: 132 multiprocessors of four schedulers at 1.755 GHz.
ISSUE_RATE = 132 * 4 * 1.755e9  # warp instructions a second
BYTE_RATE = 4.3e12
TENSOR_RATE = 790e12  # FLOP a second of wgmma
MMA_SYNC = 0.63  # of that, what mma.sync reaches (arXiv 2402.13499)
FLOP = {"HMMA": 2 * 16 * 8 * 16}
REGISTERS, SHARED_KB, THREADS, BLOCKS = 65536, 228, 2048, 32  # of a multiprocessor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cuda.md"
BEGIN, END = "<!-- sass: begin -->\n", "<!-- sass: end -->\n"


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel, the shape it is judged by, and its budget."""

    name: str
    shape: str
    headers: tuple[str, ...]
    instance: str  # 'void name<..>(parameters)', in tokred::cuda
    ways: tuple[tuple[str, ...], ...]  # markers; a pass is the mean of these ways
    unit: str
    units: int  # of a warp in one pass of the main loop
    work: float  # units of the shape
    bytes: float
    threads: int
    shared_kb: float
    budget: float  # instructions of a thread for each of its units
    goal_us: float
    trips: tuple[int, ...] = ()  # of the loops inside the main loop, by address
    architecture: str = "arch=compute_80,code=sm_90"  # as CMakeLists.txt has them


_CODES = 2 * 8 * 131072 * 128  # of the keys and values of B = 1, Hkv = 8, T = 131072, D = 128
_COPIES = "LDGSTS.E.BYPASS.128"
KERNELS = (
    Kernel(
        name="packed decode, 4 bits",
        shape="128k tokens, Hq 32, Hkv 8, D 128, groups of 32",
        headers=("packed_attn/cuda/code_decode.cuh",),
        instance="void attention::code_decode_kernel<attention::CodeConfig<1>>("
        "const __grid_constant__ attention::CodeDecodeParams)",
        # Every other step of sixteen channels ends a group of 32, which reads scales.
        ways=(
            ("HMMA", _COPIES, "HADD2.F32", "LDS.128"),
            ("HMMA", _COPIES, "HADD2.F32"),
        ),
        unit="code",
        units=2 * 32 * 128,
        work=_CODES,
        bytes=_CODES / 2 + _CODES / 32 * 4,
        threads=128,
        shared_kb=66.5,
        budget=6.3,
        goal_us=44,
        trips=(1, 1, 1, 1, 2, 2),
    ),
    Kernel(
        name="packed_qk_score, 4 bits",
        shape="the keys of the same, a score for every head",
        headers=("attention/cuda/score_launch.h", "packed_attn/cuda/code_score.cuh"),
        instance="void scoring::code_score_kernel<attention::CodeConfig<1>>("
        "const __grid_constant__ scoring::CodeScoreArgs)",
        ways=(
            ("HMMA", _COPIES, "STG", "HADD2.F32", "LDS.128"),
            ("HMMA", _COPIES, "STG", "HADD2.F32"),
        ),
        unit="code",
        units=32 * 128,
        work=_CODES / 2,
        bytes=_CODES / 4 + _CODES / 64 * 4 + 32 * 131072 * 4,
        threads=128,
        shared_kb=40.5,
        budget=6.9,
        goal_us=18,
        trips=(1, 1, 2),
    ),
    Kernel(
        name="decode, bf16",
        shape="128k tokens, Hq 32, Hkv 8, D 128",
        headers=("attention/cuda/decode.cuh",),
        instance="void attention::decode_kernel<attention::DecodeConfig<bf16, 128>>("
        "const __grid_constant__ attention::DecodeParams)",
        ways=(("HMMA", _COPIES),),
        unit="copy of 16 bytes",
        units=2 * 16 * 16,
        work=_CODES / 8,
        bytes=2 * _CODES,
        threads=128,
        shared_kb=109,
        budget=36.2,
        goal_us=139,
    ),
    Kernel(
        name="kv_pack, 4 bits",
        shape="keys and values, 1048576 rows of 128 in bf16 each, groups of 32",
        headers=("kv_pack/cuda/pack_runs.cuh",),
        instance="void packing::pack_runs_kernel<bf16, 4, 1>("
        "const __grid_constant__ KvAppendParams, const __grid_constant__ RunLayout)",
        ways=(("LDG.E.128", "STG.E.64"),),
        unit="number",
        units=32 * 16,
        work=_CODES,
        bytes=2 * _CODES + _CODES / 2 + _CODES / 32 * 4,
        threads=256,
        shared_kb=0,
        budget=12.5,
        goal_us=190,
    ),
    Kernel(
        name="sparse decode, bf16",
        shape="B 16, 2048 listed keys of each of Hkv 8, Hq 32, D 128, without the combination",
        headers=("attention/cuda/decode.cuh",),
        instance="void attention::decode_kernel<attention::DecodeConfig<bf16, 128>>("
        "const __grid_constant__ attention::DecodeParams)",
        ways=(("HMMA", _COPIES),),
        unit="copy of 16 bytes",
        units=2 * 16 * 16,
        work=16 * 8 * 2048 * 2 * 16,
        bytes=16 * 8 * 2048 * (2 * 256 + 4),
        threads=128,
        shared_kb=109,
        budget=36.2,
        goal_us=38,
    ),
    Kernel(
        name="qk_score, bf16",
        shape="128k keys of Hkv 8, D 128, a score for each of Hq 32",
        headers=("score/cuda/qk_score.cuh",),
        instance="void scoring::qk_score_kernel<bf16, 16, 4, false>("
        "const __grid_constant__ scoring::QkScoreArgs)",
        ways=(("STG", "LDG.E.128"),),
        unit="number of the keys",
        units=8 * 128,
        work=_CODES / 2,
        bytes=_CODES + 32 * 131072 * 4,
        threads=256,
        shared_kb=0,
        budget=17.3,
        goal_us=78,
    ),
    Kernel(
        name="match, bf16",
        shape="B 64, 2048 of 4096 tokens against the others, C 64, without the norms",
        headers=("match/cuda/match_short.cuh",),
        instance="void matching::match_short_kernel<matching::ShortConfig<bf16, kWideTiles>>("
        "const __grid_constant__ MatchParams)",
        ways=(("HMMA", "FMUL", "FSETP", _COPIES),),
        unit="pair of tokens",
        units=32 * 64,
        work=64 * 2048 * 2048,
        bytes=64 * 4096 * 64 * 2,
        threads=128,
        shared_kb=49,
        budget=8.5,
        goal_us=65,
    ),
    Kernel(
        name="topk, long rows",
        shape="256 rows of 131072 in fp32: reading them, and a turn for what 128 scores keep",
        headers=("topk/cuda/topk.cuh",),
        instance="void selecting::block_kernel<selecting::WideSelect, float>("
        "const __grid_constant__ TopkParams)",
        ways=(("LDG.E.128", "FSETP", "ATOMS"),),
        unit="score",
        units=32 * 16,
        work=256 * 131072,
        bytes=256 * 131072 * 4,
        threads=512,
        shared_kb=96.4,
        budget=24.8,
        goal_us=40,
        trips=(1, 1, 1, 1),
    ),
    Kernel(
        name="prefill, bf16, mma.sync",
        shape="16384 tokens, H 32, D 128, every key visible",
        headers=("sparse_attn/cuda/biased_attention.cuh",),
        instance="void attention::biased_attention_kernel<attention::ForwardConfig<bf16, 128>>("
        "const __grid_constant__ AttentionParams)",
        ways=(("HMMA", _COPIES),),
        unit="pair of query and key",
        units=16 * 64,
        work=32 * 16384**2,
        bytes=4 * 32 * 16384 * 256,
        threads=128,
        shared_kb=86,
        budget=45.7,
        goal_us=7330,
        trips=(4, 3),
    ),
)


@dataclass(frozen=True)
class Report:
    kernel: Kernel
    code: Code
    one_pass: dict[str, float]  # by opcode

    @property
    def total(self) -> float:
        return sum(self.one_pass.values())

    @property
    def by_class(self) -> dict[str, float]:
        counts = dict.fromkeys(CLASSES, 0.0)
        for opcode, count in self.one_pass.items():
            counts[CLASS_OF.get(opcode, OTHER)] += count
        return counts

    def a_unit(self, count: float) -> float:
        """Instructions of a thread for each of the units that it works on."""
        return 32 * count / self.kernel.units

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        warps = self.kernel.threads // 32
        registers = warps * -(-32 * self.code.registers // 256) * 256
        shared = self.kernel.shared_kb + 1  # the system takes one of every block
        limits = (REGISTERS // registers, int(SHARED_KB / shared), THREADS // self.kernel.threads)
        return min(*limits, BLOCKS)

    def times_us(self) -> dict[str, float]:
        kernel, passes = self.kernel, self.kernel.work / self.kernel.units
        half = sum(n for opcode, n in self.one_pass.items() if opcode in HALF_RATE.split())
        flop = sum(n * FLOP.get(opcode, 0) for opcode, n in self.one_pass.items())
        return {
            "issue": 1e6 * passes * self.total / ISSUE_RATE,
            "integer": 1e6 * passes * 2 * half / ISSUE_RATE,
            "bytes": 1e6 * kernel.bytes / BYTE_RATE,
            "tensor": 1e6 * passes * flop / (TENSOR_RATE * MMA_SYNC),
        }

    def faults(self) -> list[str]:
        kernel, code = self.kernel, self.code
        count = self.a_unit(self.total)
        found = []
        if count > kernel.budget:
            found.append(f"{count:.2f} instructions a {kernel.unit}, the budget is {kernel.budget}")
        if code.stack or code.spills:
            found.append(f"{code.stack} bytes of stack, {code.spills} instructions of spilling")
        return [f"{kernel.name}: {fault}" for fault in found]


def examine(kernel: Kernel) -> Report:
    code = machine_code(kernel.headers, kernel.instance, kernel.architecture)
    flow = Flow(code)
    loop = flow.main_loop(kernel.ways[0][0])
    mean: dict[str, float] = {}
    for markers in kernel.ways:
        for opcode, count in flow.one_pass(loop, markers, kernel.trips).items():
            mean[opcode] = mean.get(opcode, 0.0) + count / len(kernel.ways)
    return Report(kernel, code, mean)


def page(reports: Sequence[Report]) -> str:
    """The two tables: what the code is, and what it promises."""
    code_lines, time_lines = [], []
    for report in reports:
        kernel, code, classes = report.kernel, report.code, report.by_class
        holds = (code.registers, f"{kernel.shared_kb:.0f} KB", report.blocks)
        faults = (code.stack, code.spills)
        code_lines.append(
            [
                f"{kernel.name}, a {kernel.unit}",
                *(f"{report.a_unit(classes[name]):.2f}" for name in CLASSES),
                f"{report.a_unit(report.total):.2f}",
                f"{kernel.budget:g}",
                *map(str, holds + faults),
            ]
        )
        times = report.times_us()
        most = max(times, key=times.__getitem__)
        roof = max(times["bytes"], times["tensor"])
        time_lines.append(
            [
                f"{kernel.name}: {kernel.shape}",
                *map(duration, times.values()),
                f"{duration(times[most])} ({most})",
                f"{100 * roof / times[most]:.0f} %",
                duration(kernel.goal_us),
            ]
        )
    after = ["all", "budget", "registers", "shared", "blocks", "stack", "spills"]
    code_table = table(["main loop", *CLASSES, *after], code_lines)
    header = ["kernel", "issue", "integer", "bytes", "tensor", "predicted", "of the roof", "goal"]
    return f"{code_table}\n\n{table(header, time_lines)}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, and also compare")
    parser.add_argument("--only", default="", help="print the kernels whose name has this")
    options = parser.parse_args(argv)
    reports = [examine(kernel) for kernel in KERNELS if options.only in kernel.name]
    text = page(reports)
    print(text)
    faults = [fault for report in reports for fault in report.faults()]
    if not options.only:
        before, rest = PAGE.read_text().split(BEGIN)
        after = rest.split(END)[1]
        written = before + BEGIN + text + END + after
        if not options.check:
            PAGE.write_text(written)
        elif written != PAGE.read_text():
            faults.append(f"{PAGE.name} is not that of this code: make sass")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
