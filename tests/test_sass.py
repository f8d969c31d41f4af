"""The static report on the CUDA kernels: reading machine code, and one kernel within its budget."""

from __future__ import annotations

import pytest

from bench.machine_code import Code, Flow, missing_tools, parse
from bench.sass import KERNELS, Kernel, Report, examine

# A loop of a copy and two products that a side path can leave, around a loop of one conversion.
LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   STL [R1], R2 ;
        /*0040*/                   MOV R3, R2 ;
        /*0050*/                   MOV R4, R2 ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
.L_x_3:
        /*0070*/                   PRMT R5, R5, 0x5410, R6 ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*00a0*/              @P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""


def _code(registers: int = 64) -> Code:
    instructions, labels = parse(LISTING)
    return Code(instructions, labels, registers, stack=0)


def test_a_pass_goes_around_side_paths() -> None:
    flow = Flow(_code())
    loop = flow.main_loop("HMMA")
    assert sorted(loop) == [0x10, 0x30, 0x60, 0x70, 0x90]
    assert flow.one_pass(loop, ("HMMA",)) == {"LDG": 1, "BRA": 3, "HMMA": 2, "PRMT": 1}
    inside = flow.one_pass(loop, ("HMMA",), trips=(3,))
    assert inside == {"LDG": 1, "BRA": 5, "HMMA": 2, "PRMT": 3}
    assert flow.one_pass(loop, ("HMMA", "STL"))["MOV"] == 2
    with pytest.raises(ValueError, match="1 loops are inside, trips has 2"):
        flow.one_pass(loop, ("HMMA",), trips=(1, 2))


def _report(budget: float) -> Report:
    kernel = Kernel(
        name="some kernel",
        shape="some shape",
        headers=(),
        instance="",
        ways=(("HMMA",),),
        unit="code",
        units=64,
        work=64e9,
        bytes=4.3e9,
        threads=128,
        shared_kb=50,
        budget=budget,
        goal_us=1,
    )
    return Report(kernel, _code(), {"LDG": 1, "BRA": 2, "HMMA": 2, "LOP3": 3})


def test_the_longest_part_is_the_prediction() -> None:
    report = _report(budget=4)
    assert report.blocks == 4  # shared memory allows four, registers eight
    times = report.times_us()
    assert times["issue"] == pytest.approx(1e6 * 8 * 1e9 / 926.64e9)
    assert times["integer"] == pytest.approx(1e6 * 2 * 3 * 1e9 / 926.64e9)
    assert times["bytes"] == pytest.approx(1000)
    assert times["tensor"] == pytest.approx(1e6 * 2 * 4096 * 1e9 / (790e12 * 0.63))


def test_more_than_the_budget_and_spills_are_faults() -> None:
    grown, spilled = _report(budget=3.9).faults()
    assert grown == "some kernel: 4.00 instructions a code, the budget is 3.9"
    assert spilled == "some kernel: 0 bytes of stack, 1 instructions of spilling"


@pytest.mark.skipif(bool(missing_tools()), reason=f"without {', '.join(missing_tools())}")
@pytest.mark.parametrize("name", ["packed decode, 4 bits", "kv_pack, 4 bits", "match, bf16"])
def test_a_kernel_keeps_its_budget(name: str) -> None:
    """The others take longer to compile: `make sass` examines all of them."""
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == name)
    assert examine(kernel).faults() == []
