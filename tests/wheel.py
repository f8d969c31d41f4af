"""Builds a wheel for other machines, and tries it in an environment that has nothing but torch.

Run by `make wheel`. Leaves the wheel in dist/, and exits with an error where it does not serve.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD, DIST = ROOT / "build", ROOT / "dist"
TORCH = ("libtorch*.so", "libc10*.so")  # they are loaded before ours, and never packed

# A call of every family, a gradient and a compiled op.
CALLS = """
import torch
import tokred
import tokred.nn

torch.manual_seed(0)
x = torch.randn(2, 65, 48)
token_map = tokred.bipartite_soft_matching(x, r=16, num_prefix=1)
merged, size = tokred.merge(x, token_map, num_out=49)
assert merged.shape == (2, 49, 48) and size.sum() == 2 * 65
assert torch.equal(tokred.topk(x, 3)[0], x.topk(3).values)
assert tokred.kmeans(x, 5)[1].shape == (2, 65)
q, k, v = (torch.randn(1, 2, 33, 64, requires_grad=True) for _ in range(3))
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
out = tokred.biased_attention(q, k, v)[0]
torch.testing.assert_close(out, expected)
for ours, theirs in zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (out, expected))):
    torch.testing.assert_close(ours, theirs)
q, k, v = (x.detach() for x in (q, k, v))
packed = tokred.kv_pack(k, 8, 64)
assert (tokred.kv_unpack(packed) - k).abs().max() < 0.05
assert tokred.qk_score(q, k, "head_mean").shape == (1, 1, 33)
assert tokred.linear_attention(q, k, v, torch.tensor([0.5, 1.0]))[0].shape == q.shape
"""


def output(*command: str | Path, **options: object) -> str:
    """What a command prints; its errors go to the terminal."""
    return subprocess.check_output([str(part) for part in command], text=True, **options)


def build() -> Path:
    """The wheel as setuptools packs it, in build/wheel."""
    folder = BUILD / "wheel"
    # What an earlier wheel held and the sources no longer do would be packed again.
    for old in (folder, *BUILD.glob("lib.*"), *BUILD.glob("bdist.*")):
        shutil.rmtree(old, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    output(*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path) -> Path:
    """The wheel under the name of the oldest Linux that it serves, in dist/."""
    for old in DIST.glob(wheel.name.split("-linux")[0] + "-*"):
        old.unlink()
    exclude = [part for name in TORCH for part in ("--exclude", name)]
    output(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, *exclude, wheel)
    (repaired,) = DIST.glob(wheel.name.split("-linux")[0] + "-*")
    if "manylinux" not in repaired.name:
        raise SystemExit(f"{repaired.name} serves this machine alone")
    names = zipfile.ZipFile(repaired).namelist()
    if missing := {"tokred/lib/libtokred.so", "tokred/py.typed"} - set(names):
        raise SystemExit(f"{repaired.name} lacks {sorted(missing)}")
    if foreign := [name for name in names if name.startswith("tokred.libs/")]:
        raise SystemExit(f"{repaired.name} holds libraries of others: {foreign}")
    return repaired


def try_out(wheel: Path) -> None:
    """Installs it beside torch in a fresh environment, and calls it from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        output(sys.executable, "-m", "venv", python.parent.parent)
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        output(*pip, "--constraint", ROOT / "requirements" / "build.txt", "torch", "numpy")
        output(*pip, "--no-deps", wheel)
        environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
        output(python, "-c", CALLS, cwd=folder, env=environment)
        print(output(python, "-m", "tokred", "info", cwd=folder, env=environment))


def main() -> None:
    """Builds, repairs and tries the wheel."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = time.perf_counter()
    wheel = build()
    seconds = time.perf_counter() - start
    wheel = repair(wheel)
    try_out(wheel)
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.relative_to(ROOT)}: {size:.1f} MB, built in {seconds:.0f} s")


if __name__ == "__main__":
    main()
