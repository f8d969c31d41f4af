"""Runs the tests on an emulated CPU with AVX-512, for machines that have none.

    python tests/avx512/run.py                            # a sample: every 16th case
    python tests/avx512/run.py --every 1 tests/test_topk.py
    python tests/avx512/run.py --every 4 --offset 1 -- -k "not dense"

Boots Linux in Bochs, which emulates every instruction of a Skylake-X CPU, with this environment's
Python and this repository on its disk, and runs pytest there on the cases that use the avx512
kernels (select_cases.py says which). Prints what pytest prints and exits with its status.
Everything it makes is in build/avx512.

Needs Debian or a relative of it on x86-64, 4 GB of memory, 3 GB of disk, no root, and, from apt:
bochs bochsbios vgabios bochs-sdl busybox-static cpio e2fsprogs isolinux syslinux-common xorriso
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "avx512"
KERNEL = "linux-image-cloud-amd64"
MODULES = ("scsi_common", "scsi_mod", "sd_mod", "libata", "ata_piix")
DONE = "tokred-avx512-status"
# Packages that the tests of the kernels need; those of models are left out, with their tests.
PACKAGES = ("torch", "numpy", "pytest", "hypothesis")
UNUSED = {"include", "test", "site-packages"}
# One sector track of the disk's geometry, which its size must be a multiple of.
CYLINDER = 16 * 63 * 512

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in MODULES; do insmod /modules/$module.ko; done
mount -t ext4 -o noatime /dev/sda /disk || echo "no disk"
mount -t devtmpfs dev /disk/dev; mount -t proc proc /disk/proc; mount -t tmpfs tmp /disk/tmp
stty -F /dev/console -onlcr cols 100
chroot /disk /bin/sh /run.sh
echo "DONE=$?"
poweroff -f
"""

BOCHSRC = """\
display_library: DISPLAY
memory: guest=3072, host=2048
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=corei7_skylake_x, ips=200000000, reset_on_triple_fault=0
clock: sync=none
ata0-master: type=disk, mode=flat, path="disk.img"
ata1-master: type=cdrom, path="boot.iso", status=inserted
boot: cdrom
SOUND
com1: enabled=1, mode=file, dev="serial.txt"
log: bochs.txt
debug: action=ignore
info: action=ignore
error: action=ignore
panic: action=fatal
"""


def run(*command: str | Path, **options: object) -> None:
    subprocess.run([str(c) for c in command], check=True, **options)  # type: ignore[call-overload]


def fetch_kernel() -> Path:
    """The folder that Debian's kernel package was unpacked in."""
    folder = BUILD / "kernel"
    if not (folder / "boot").exists():
        downloads = BUILD / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        depends = subprocess.check_output(["apt-cache", "depends", KERNEL], text=True)
        package = re.search(r"Depends: (linux-image-\S+)", depends)
        assert package, f"apt knows no {KERNEL}; run apt-get update"
        run("apt-get", "download", package[1], cwd=downloads)
        run("dpkg", "-x", next(downloads.glob(f"{package[1]}_*.deb")), folder)
    return folder


def make_boot_cd() -> None:
    """A CD with the kernel and a first root folder that mounts the disk and runs /run.sh there."""
    kernel, initramfs, cd = fetch_kernel(), BUILD / "initramfs", BUILD / "cd"
    for folder in (initramfs, cd):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("bin", "modules", "proc", "sys", "dev", "disk"):
        (initramfs / name).mkdir(parents=True)
    cd.mkdir()
    shutil.copy("/bin/busybox", initramfs / "bin")
    for name in MODULES:
        shutil.copy(next(kernel.rglob(f"{name}.ko")), initramfs / "modules")
    init = initramfs / "init"
    init.write_text(INIT.replace("MODULES", " ".join(MODULES)).replace("DONE", DONE))
    init.chmod(0o755)
    names = "\n".join(str(p.relative_to(initramfs)) for p in initramfs.rglob("*"))
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"],
        cwd=initramfs, input=names.encode(), capture_output=True, check=True,
    ).stdout  # fmt: skip
    (cd / "initrd").write_bytes(gzip.compress(archive, 1))
    shutil.copy(next((kernel / "boot").glob("vmlinuz-*")), cd / "vmlinuz")
    shutil.copy("/usr/lib/ISOLINUX/isolinux.bin", cd)
    shutil.copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", cd)
    options = "console=ttyS0 mitigations=off nopti nokaslr tsc=reliable quiet panic=1"
    (cd / "isolinux.cfg").write_text(
        f"default linux\nprompt 0\nlabel linux\nkernel vmlinuz\nappend initrd=initrd {options}\n"
    )
    run(
        "xorriso", "-as", "mkisofs", "-quiet", "-o", BUILD / "boot.iso", "-b", "isolinux.bin",
        "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", cd,
    )  # fmt: skip


def shared_libraries(binaries: Iterable[Path]) -> set[Path]:
    """The system's libraries that the binaries load, and the program that loads them."""
    command = ["ldd", *map(str, binaries)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {Path(p) for p in re.findall(r"(/\S+) \(0x", output)}


def installed_files(names: Iterable[str]) -> set[Path]:
    """The files of the packages and of what they require."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # only needed elsewhere
        if found.setdefault(package.name, package) is package:
            requirements = [line for line in package.requires or () if "extra ==" not in line]
            waiting += [re.split(r"[^\w.-]", line)[0] for line in requirements]
    files = (file for package in found.values() for file in package.files or ())
    paths = {Path(str(f.locate())) for f in files if not UNUSED.intersection(f.parts)}
    return {path for path in paths if path.is_file()}


def copy(source: Path, disk: Path) -> None:
    """Copies the file to its own absolute path on the disk."""
    target = disk / source.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def make_disk(pytest_arguments: list[str], environment: dict[str, str]) -> None:
    """A disk with Python, the environment's packages, and the repository's Python and libraries."""
    disk, image = BUILD / "disk", BUILD / "disk.img"
    shutil.rmtree(disk, ignore_errors=True)
    for name in ("bin", "dev", "proc", "tmp", "etc"):
        (disk / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", disk / "bin" / "sh")

    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    packages = Path(sysconfig.get_path("purelib"))
    stdlib = Path(sysconfig.get_path("stdlib"))
    copy(python, disk)
    for source in stdlib.rglob("*"):
        if source.is_file() and not UNUSED.intersection(source.relative_to(stdlib).parts):
            copy(source, disk)
    for source in installed_files(PACKAGES):
        copy(source, disk)
    binaries = [python, *disk.rglob("*.so"), *disk.rglob("*.so.*")]
    for library in shared_libraries(binaries):
        if not library.is_relative_to(disk):
            copy(library, disk)

    for name in ("python", "tests", "pyproject.toml"):
        source, target = ROOT / name, disk / "tokred" / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
    variables = {
        "HOME": "/tmp",
        "PYTHONPATH": f"/tokred/python:/tokred/tests/avx512:{packages}",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **environment,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    command = [
        str(python), "-m", "pytest", "-p", "select_cases", "-p", "no:cacheprovider", "-p",
        "no:xdist", "--color=no", *pytest_arguments,
    ]  # fmt: skip
    lines += ["cd /tokred", shlex.join(command)]
    (disk / "run.sh").write_text("\n".join(lines) + "\n")

    used = sum(p.lstat().st_size + 4096 for p in disk.rglob("*"))
    size = (used * 5 // 4 + (256 << 20)) // CYLINDER * CYLINDER
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    run("/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", disk, image)
    shutil.rmtree(disk)


def emulate(bochs: str, display: str) -> int:
    """Boots the CD, prints what the tests print, and returns their exit status."""
    serial = BUILD / "serial.txt"
    for name in ("serial.txt", "disk.img.lock"):
        (BUILD / name).unlink(missing_ok=True)
    command, sound = [bochs, "-q", "-f", "bochsrc"], ""
    if display == "sdl2":  # Debian's Bochs, which starts in a debugger and would play sounds
        command += ["-rc", "debugger"]
        (BUILD / "debugger").write_text("continue\n")
        sound = "sound: driver=dummy"
    (BUILD / "bochsrc").write_text(BOCHSRC.replace("DISPLAY", display).replace("SOUND", sound))
    serial.touch()
    with (BUILD / "bochs-output.txt").open("w") as output, serial.open(errors="replace") as text:
        emulator = subprocess.Popen(
            command, cwd=BUILD, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**os.environ, "SDL_VIDEODRIVER": "dummy"},
        )  # fmt: skip
        status = None
        try:
            tail = ""
            while status is None:
                ended = emulator.poll() is not None
                new = text.read()
                print(new, end="", flush=True)
                tail = (tail + new)[-200:]
                if done := re.search(rf"{DONE}=(\d+)\s", tail):
                    status = int(done[1])
                elif ended:
                    status = 1
                    print(f"Bochs stopped early: see {BUILD}/bochs.txt", file=sys.stderr)
                else:
                    time.sleep(1)
        finally:
            emulator.kill()
            emulator.wait()
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=16, help="run one case in so many")
    parser.add_argument("--offset", type=int, default=0, help="which of them")
    parser.add_argument("--bochs", default="bochs")
    parser.add_argument("--display", default="sdl2", help="a display library of that Bochs")
    parser.add_argument("pytest_arguments", nargs="*", default=["tests"])
    arguments = parser.parse_args()
    assert platform.machine() == "x86_64", "the libraries are built for the machine they are on"
    BUILD.mkdir(parents=True, exist_ok=True)
    make_boot_cd()
    case_choice = {"TOKRED_EVERY": str(arguments.every), "TOKRED_OFFSET": str(arguments.offset)}
    make_disk(arguments.pytest_arguments, case_choice)
    return emulate(arguments.bochs, arguments.display)


if __name__ == "__main__":
    sys.exit(main())
