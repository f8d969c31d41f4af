"""What a kernel's machine code says: registers, blocks, the instructions of its main loop by class.

Markers are the instructions that do a kernel's work. The main loop is the loop with most of the
first marker. A pass is the path through it with the most markers and, among these, the fewest other
instructions, which leaves out slow paths. Inner loops count as often as the kernel runs them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COPY = "copy"
UNPACK = "unpack"
TENSOR = "tensor"
FLOAT = "float"
OTHER = "other"
CLASSES = (COPY, UNPACK, TENSOR, FLOAT, OTHER)
OPCODES = {
    COPY: "LDG STG LDS STS LDSM STSM LDGSTS LDGDEPBAR DEPBAR UBLKCP UTMALDG SYNCS LDC ULDC LDCU",
    UNPACK: "LOP3 PRMT SHF F2FP F2F F2I I2F I2FP HADD2 HFMA2 HMUL2 MOVM",
    TENSOR: "HMMA HGMMA IMMA IGMMA QGMMA",
    FLOAT: "FFMA FADD FMUL FMNMX FSEL FSETP FSET FCHK MUFU",
}
CLASS_OF = {code: name for name, codes in OPCODES.items() for code in codes.split()}
# Those of the pipe that takes a warp's instruction every other cycle.
HALF_RATE = "LOP3 PRMT SHF F2FP I2FP IADD3 VIADD ISETP LEA SEL VIMNMX FMNMX FSEL FSETP PLOP3"


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or from its package for Python."""
    places = [Path(entry) / "nvidia" / "cu13" / "bin" for entry in sys.path if entry]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


def missing_tools() -> list[str]:
    return [name for name in ("nvcc", "nvdisasm", "cuobjdump") if not find_tool(name)]


def run_tool(name: str, *arguments: str) -> str:
    tool = find_tool(name)
    if tool is None:
        raise FileNotFoundError(f"{name} is not on PATH; requirements/test.in names its package")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


# ---- from a kernel to its instructions -----------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # without modifiers
    text: str
    conditional: bool

    @property
    def kind(self) -> str:
        return CLASS_OF.get(self.opcode, OTHER)


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]  # their addresses
    registers: int
    stack: int

    @cached_property
    def spills(self) -> int:
        return sum(i.opcode in ("LDL", "STL") for i in self.instructions)


LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)(.*?);")


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """What nvdisasm prints of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            waiting.append(label[1])
        elif found := INSTRUCTION.search(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            always = not found[2] and not re.match(
                r"\S* +[^`]", found[4]
            )  # no predicate, a target only
            instructions.append(Instruction(address, found[3], found[3] + found[4], not always))
    return instructions, labels


def machine_code(headers: Iterable[str], instance: str, architecture: str) -> Code:
    """The code of an explicit instantiation, 'void name<..>(parameters)' in tokred::cuda."""
    includes = "".join(f'#include "{header}"\n' for header in headers)
    name = re.search(r"(\w+)(?:<.*>)?\(", instance)
    if name is None:
        raise ValueError(f"no name of a kernel in {instance!r}")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(
            f"{includes}namespace tokred::cuda {{\ntemplate __global__ {instance};\n}}\n"
        )
        flags = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr"]
        flags += [f"--generate-code={architecture}", f"-I{CSRC}"]
        run_tool("nvcc", *flags, "-cubin", "-o", str(cubin), str(source))
        usage = run_tool("cuobjdump", "-res-usage", str(cubin))
        listing = run_tool("nvdisasm", "-c", str(cubin))
    function = re.compile(rf"Function (\S*\d{name[1]}I\S*):\s+REG:(\d+) STACK:(\d+)")
    found = function.search(usage)
    if found is None:
        raise RuntimeError(f"the compiled code has no {name[1]}:\n{usage}")
    section = listing.split(f".text.{found[1]}:", 1)[1].split("//------", 1)[0]
    return Code(*parse(section), registers=int(found[2]), stack=int(found[3]))


# ---- loops ---------------------------------------------------------------------------------------


class Flow:
    """The basic blocks of a kernel, by the addresses at which they begin."""

    def __init__(self, code: Code) -> None:
        self.blocks: dict[int, list[Instruction]] = {}
        self.next: dict[int, set[int]] = {}
        targets = {i.address: target(i, code.labels) for i in code.instructions}
        starts = set(code.labels.values())
        joins: dict[str, int] = {}  # where the lanes of a barrier go on
        current: list[Instruction] = []
        for number, i in enumerate(code.instructions):
            if i.address in starts or not current:
                current = self.blocks.setdefault(i.address, [])
                self.next[i.address] = set()
            current.append(i)
            begin = current[0].address
            after = code.instructions[number + 1 : number + 2]
            goes_on = i.conditional or i.opcode not in ("BRA", "EXIT", "RET", "BRX")
            where = targets[i.address]
            barrier = re.search(r"\bB\d+", i.text)
            if i.opcode == "BSSY" and barrier and where is not None:
                joins[barrier[0]] = where
            elif i.opcode == "BSYNC" and barrier and barrier[0] in joins:
                where, goes_on = joins[barrier[0]], False
            if i.opcode in ("BRA", "BSYNC") and where is not None:
                self.next[begin].add(where)
            ends = i.opcode in ("BRA", "EXIT", "RET", "BRX", "BSYNC")
            if after and (ends or after[0].address in starts):
                if goes_on:
                    self.next[begin].add(after[0].address)
                current = []

    def loops(self, nodes: set[int]) -> list[set[int]]:
        """The outermost loops among some blocks, by address."""
        found = [part for part in components(nodes, self.next) if self.is_loop(part)]
        return sorted(found, key=min)

    def is_loop(self, part: set[int]) -> bool:
        return len(part) > 1 or any(node in self.next[node] for node in part)

    def head(self, loop: set[int]) -> int:
        entered = {to for node, tos in self.next.items() if node not in loop for to in tos}
        return min(entered & loop or loop)

    def inner(self, loop: set[int]) -> list[set[int]]:
        return self.loops(loop - {self.head(loop)})

    def marked(self, nodes: Iterable[int], markers: tuple[str, ...]) -> int:
        return sum(i.text.startswith(markers) for node in nodes for i in self.blocks[node])

    def main_loop(self, marker: str) -> set[int]:
        loop: set[int] = set(self.blocks)
        parts = self.loops(loop)
        while parts:
            best = max(parts, key=lambda part: self.marked(part, (marker,)))
            if 2 * self.marked(best, (marker,)) < max(self.marked(loop, (marker,)), 1):
                break
            loop, parts = best, self.inner(best)
        return loop

    def one_pass(
        self, loop: set[int], markers: tuple[str, ...], trips: Sequence[int] = ()
    ) -> Counter[str]:
        """The instructions of a pass by opcode; `trips` of the loops inside, by address."""
        head = self.head(loop)
        inside = self.loops(loop - {head})
        if trips and len(trips) != len(inside):
            raise ValueError(f"{len(inside)} loops are inside, trips has {len(trips)}")
        of_loop = {node: -1 - number for number, part in enumerate(inside) for node in part}
        ways = {
            node: Way(self.marked((node,), markers), Counter(i.opcode for i in self.blocks[node]))
            for node in loop
        }
        for number, part in enumerate(inside):
            times = trips[number] if trips else 1
            once = self.one_pass(part, markers)
            found = times * self.marked(part, markers)
            ways[-1 - number] = Way(found, Counter({code: times * n for code, n in once.items()}))
        edges: dict[int, set[int]] = {node: set() for node in ways}
        back: set[int] = set()
        for node in loop:
            here = of_loop.get(node, node)
            for to in self.next[node] & loop:
                if to == head:
                    back.add(here)
                elif of_loop.get(to, to) != here:
                    edges[here].add(of_loop.get(to, to))
        best = {head: ways[head]}
        for node in topological(head, edges):
            for to in edges[node]:
                way = best[node] + ways[to]
                if to not in best or way.rank > best[to].rank:
                    best[to] = way
        if len(loop) == len(self.blocks):  # a kernel without a loop
            back = {node for node in loop if not self.next[node]}
        ends = [best[node] for node in back if node in best]
        return max(ends, key=lambda way: way.rank, default=ways[head]).opcodes


@dataclass(frozen=True)
class Way:
    """Some way through a loop."""

    markers: int
    opcodes: Counter[str]

    @property
    def rank(self) -> tuple[int, int]:
        return self.markers, -self.opcodes.total()

    def __add__(self, other: Way) -> Way:
        return Way(self.markers + other.markers, self.opcodes + other.opcodes)


def target(i: Instruction, labels: dict[str, int]) -> int | None:
    found = re.search(r"`\((\.L\w+)\)", i.text)
    return labels.get(found[1]) if found else None


def components(nodes: set[int], edges: dict[int, set[int]]) -> list[set[int]]:
    """Strongly connected components (Tarjan), without recursion."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    open_nodes: list[int] = []
    found: list[set[int]] = []
    for root in sorted(nodes):
        work = [(root, iter(sorted(edges[root] & nodes)))] if root not in order else []
        while work:
            node, rest = work[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                open_nodes.append(node)
            for to in rest:
                if to not in order:
                    work.append((to, iter(sorted(edges[to] & nodes))))
                    break
                if to in open_nodes:
                    low[node] = min(low[node], order[to])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    cut = open_nodes.index(node)
                    found.append(set(open_nodes[cut:]))
                    del open_nodes[cut:]
    return found


def topological(start: int, edges: dict[int, set[int]]) -> list[int]:
    """The blocks that are reached from a start, each after all that lead to it."""
    done: list[int] = []
    seen = {start}
    work = [(start, iter(edges[start]))]
    while work:
        node, rest = work[-1]
        for to in rest:
            if to not in seen:
                seen.add(to)
                work.append((to, iter(edges[to])))
                break
        else:
            done.append(node)
            work.pop()
    return done[::-1]
