"""The op libraries use torch's stable ABI alone, and the CUDA one registers every op."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokred._library import LIBRARY_FOLDER

CPU_LIBRARY = LIBRARY_FOLDER / "libtokred.so"
CUDA_LIBRARY = LIBRARY_FOLDER / "libtokred_cuda.so"

STABLE = re.compile(r"(aoti_torch|torch)_\w+")
SYSTEM = re.compile(r"\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
LINKER = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
NEEDED = re.compile(
    r"(libtorch|libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux\S*)\.so\S*"
)

# What a CUDA build of torch exports and a CPU build lacks.
STUB = """
#include <stdint.h>
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) { *stream = 0; return 0; }
int32_t torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function,
                                 uint32_t line, _Bool with_assertions, char** message) {
  *message = 0;
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) {}
"""

LIST_CUDA_OPS = """
import ctypes, sys, torch
stub, *libraries = sys.argv[1:]
ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
for library in libraries:
    torch.ops.load_library(library)
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("tokred::"):
        print(name, has_kernel(name, "CPU"), has_kernel(name, "CUDA"))
"""


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=[CPU_LIBRARY, CUDA_LIBRARY], ids=["cpu", "cuda"])
def library(request: pytest.FixtureRequest) -> Path:
    if not request.param.exists():
        pytest.skip(f"{request.param.name} is not built")
    return request.param


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_stable_symbols_are_imported(library: Path) -> None:
    listing = run("nm", "-D", "--undefined-only", library)
    imported = {line.split()[-1] for line in listing.splitlines()}
    assert any(STABLE.fullmatch(symbol) for symbol in imported)
    unstable = {
        symbol
        for symbol in imported - LINKER
        if not STABLE.fullmatch(symbol) and not SYSTEM.fullmatch(symbol)
    }
    assert not unstable


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_no_python_and_no_cuda_runtime_are_needed(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library))
    assert "libtorch.so" in needed
    assert not [name for name in needed if not NEEDED.fullmatch(name)]


def test_every_op_has_a_cuda_kernel(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not CUDA_LIBRARY.exists():
        pytest.skip("needs a C compiler and libtokred_cuda.so")
    source, stub = tmp_path / "stub.c", tmp_path / "stub.so"
    source.write_text(STUB)
    run(compiler, "-shared", "-fPIC", source, "-o", stub)
    listing = run(sys.executable, "-c", LIST_CUDA_OPS, stub, CPU_LIBRARY, CUDA_LIBRARY)
    kernels = {name: flags for name, *flags in map(str.split, listing.splitlines())}
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tokred::")}
    assert kernels.keys() == names and len(names) >= 10
    assert all(flags == ["True", "True"] for flags in kernels.values()), kernels
