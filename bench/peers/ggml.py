"""ggml's packed rows and its attention on them, built from its sources for the benchmarks alone."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

# The source archive of llama-cpp-python holds ggml's.
RELEASE = "llama_cpp_python-0.3.36"
ARCHIVE = (
    "https://files.pythonhosted.org/packages/ec/e9/"
    f"e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/{RELEASE}.tar.gz"
)
DIGEST = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"  # sha256
FOLDER = Path(__file__).parents[2] / "build" / "peers"
TYPES = {4: 2, 8: 8}  # ggml's numbers of q4_0 and q8_0
_SOURCES = f"{RELEASE}/vendor/llama.cpp/ggml"


def _fetch() -> Path:
    """The folder of ggml's sources, downloaded once and checked against their digest."""
    target = FOLDER / _SOURCES
    if target.exists():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, _ = urllib.request.urlretrieve(ARCHIVE, FOLDER / "ggml.tar.gz")
    if hashlib.sha256(Path(path).read_bytes()).hexdigest() != DIGEST:
        raise RuntimeError(f"{ARCHIVE} does not have the sha256 digest {DIGEST}")
    with tarfile.open(path) as sources:
        members = [m for m in sources if m.name.startswith(_SOURCES)]
        sources.extractall(FOLDER, members=members, filter="data")
    return target


def _build() -> Path:
    library = FOLDER / "ggml" / "libggml_peer.so"
    if library.exists():
        return library
    tools = Path(sys.executable).parent
    run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    run(
        [
            tools / "cmake",
            "-S",
            Path(__file__).parent,
            "-B",
            library.parent,
            "-G",
            "Ninja",
            f"-DGGML_SOURCES={_fetch()}",
            f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DGGML_NATIVE=ON",
        ]
    )
    run([tools / "cmake", "--build", library.parent])
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "peer_pack": ([ctypes.c_int, pointer, pointer, number, number], ctypes.c_size_t),
        "peer_unpack": ([ctypes.c_int, pointer, pointer, number], None),
        "peer_row_bytes": ([ctypes.c_int, number], ctypes.c_size_t),
        "peer_attention": (
            [ctypes.c_int, number, number, number, number, ctypes.c_float, ctypes.c_int],
            pointer,
        ),
        "peer_key": ([pointer], pointer),
        "peer_value": ([pointer], pointer),
        "peer_attend": ([pointer, pointer, pointer], None),
        "peer_free": ([pointer], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


@functools.cache
def is_here() -> bool:
    """Whether it could be built; says why not."""
    try:
        _library()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"without ggml as a peer: {error}")
        return False
    return True


class Rows:
    """f32 rows [.., D] packed by q4_0 or q8_0, which have a scale every 32 numbers. One thread."""

    def __init__(self, x: Tensor, bits: int):
        self.x, self.type, self.library = x.contiguous(), TYPES[bits], _library()
        self.count, self.columns = x.numel() // x.shape[-1], x.shape[-1]
        size = self.library.peer_row_bytes(self.type, self.columns)
        self.rows = torch.empty(self.count * size, dtype=torch.uint8)
        self.out = torch.empty_like(self.x)

    def pack(self) -> Tensor:
        self.library.peer_pack(
            self.type, self.x.data_ptr(), self.rows.data_ptr(), self.count, self.columns
        )
        return self.rows

    def unpack(self) -> Tensor:
        self.library.peer_unpack(
            self.type, self.rows.data_ptr(), self.out.data_ptr(), self.x.numel()
        )
        return self.out


class Attention:
    """Decode attention on q4_0 or q8_0 keys and values [Hkv, N, D]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bits: int, threads: int):
        self.library, self.q = _library(), q.float().contiguous()  # [Hq, D]
        heads, tokens, head_dim = k.shape
        self.handle = self.library.peer_attention(
            TYPES[bits], q.shape[0], heads, head_dim, tokens, head_dim**-0.5, threads
        )
        for x, place in ((k, self.library.peer_key), (v, self.library.peer_value)):
            at, size = place(self.handle), self.library.peer_row_bytes(TYPES[bits], head_dim)
            for head in range(heads):
                rows = x[head].float().contiguous()
                self.library.peer_pack(
                    TYPES[bits], rows.data_ptr(), at + head * tokens * size, tokens, head_dim
                )
        self.out = torch.empty_like(self.q)

    def __call__(self) -> Tensor:
        self.library.peer_attend(self.handle, self.q.data_ptr(), self.out.data_ptr())
        return self.out

    def __del__(self) -> None:
        self.library.peer_free(self.handle)
