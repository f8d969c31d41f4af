"""Builds the CPU library and the emulated device under ASan and UBSan, and runs the op tests there.

Run by `make sanitize`. Exits with the tests' status.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tokred import _C

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
ISAS = ("generic", "avx2", "avx512")
TESTS = [
    "match",
    "merge",
    "cluster",
    "linear_attn",
    "topk",
    "score",
    "kv_pack",
    "packed_attn",
    "ops/test_edges.py",
    "sparse_attn/test_biased_attention.py",
    "sparse_attn/test_biased_attention_decode.py",
    "sparse_attn/test_sparse_attention.py",
    "sparse_attn/test_combine_states.py",
    "sparse_attn/test_hidden_keys.py",
    "sparse_attn/test_positions.py",
    "sparse_attn/test_wgmma.py",
    # The gradients of block_sparse_attention take minutes; those of hidden rows and of positions go
    # through the same kernels.
    "sparse_attn/test_block_sparse_attention.py::test_against_float64",
    "sparse_attn/test_block_sparse_attention.py::test_rows_without_blocks_are_zero",
    "sparse_attn/test_block_sparse_attention.py::test_views_equal_their_copies",
]


def build() -> None:
    """Configures and builds both libraries with the sanitizers on."""
    # The instruction sets share their sources: the best one of the machine stands for all.
    options = ["TOKRED_SANITIZE=address,undefined", "TOKRED_SIMT=ON", "TOKRED_CUDA=OFF"]
    options.append("TOKRED_ONLY_ISA=" + _C.best_cpu_isa())
    defines = [f"-D{option}" for option in (f"Python_EXECUTABLE={sys.executable}", *options)]
    subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *defines])
    subprocess.check_call(["cmake", "--build", str(BUILD), "--target", "tokred", "tokred_simt"])


def runtime(name: str) -> str:
    """The path of a sanitizer's shared library, as the compiler knows it."""
    compiler = os.environ.get("CXX", "g++")
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


def main() -> int:
    """Builds, then runs the op tests with the sanitizers loaded before Python."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    build()
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python never frees some of its memory; ODR checks trip over the per-ISA copies of tables.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TOKRED_LIBRARY_FOLDER": str(BUILD),
        "TOKRED_SIMT_LIBRARY": str(BUILD / "libtokred_simt.so"),
    }
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    others = [isa for isa in ISAS if isa != _C.best_cpu_isa()]
    unwanted = ("compile", "export", "opcheck", "reference", *others)
    selection = " and ".join(f"not {word}" for word in unwanted)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-k", selection, *tests]
    return subprocess.call(command, env=environment, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
