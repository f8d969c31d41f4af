"""Strips and compresses the built libraries into build/device, which travels to the device."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT, PACKED = ROOT / "python" / "tokred" / "lib", ROOT / "build" / "device"
LIBRARIES = ("libtokred.so", "libtokred_cuda.so")
MAX_BYTES = 60 * 10**6


def main() -> int:
    shutil.rmtree(PACKED, ignore_errors=True)
    PACKED.mkdir(parents=True)
    missing = [name for name in LIBRARIES if not (BUILT / name).exists()]
    for name in sorted(set(LIBRARIES) - set(missing)):
        stripped = PACKED / name
        subprocess.run(["strip", "--strip-unneeded", "-o", stripped, BUILT / name], check=True)
        with lzma.open(f"{stripped}.xz", "wb", preset=1) as file:
            file.write(stripped.read_bytes())
        stripped.unlink()
    total = sum(path.stat().st_size for path in PACKED.iterdir())
    print(f"{PACKED}: {total / 1e6:.1f} MB")
    if missing:
        print(f"{', '.join(missing)} not built here: the device builds the libraries itself")
    if total > MAX_BYTES:
        print(f"more than the {MAX_BYTES / 1e6:.0f} MB that can travel")
    return int(total > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
