"""Runs the kernels' tests on an emulated CPU with AVX-512, for machines that have none.

    python tests/avx512/run.py                                  # every 16th case
    python tests/avx512/run.py --every 1 tests/topk/test_topk.py     # all cases of a file
    python tests/avx512/run.py --every 4 --offset 1 -- -k "not large"

Boots Linux in Bochs, which emulates a Skylake-X instruction by instruction, with this environment's
Python and this repository on its disk. There pytest runs the cases that use the avx512 kernels, as
select_cases.py chooses them. Prints what pytest prints and exits with its status.

The line "cpu:" that pytest begins with has avx512_vnni where the kernels use VNNI. A Skylake-X has
none; Bochs adds it, but 3.0 reports it only if cpu/cpudb/intel/corei7_skylake-x.cc is changed to
set ecx of leaf 7 to get_std_cpuid_leaf_7_ecx(0). Its Ice Lake, which reports it, did not boot.

Needs Debian or a relative of it on x86-64, 3 GB of memory, 4 GB of disk in build/avx512, and the
packages bochs, bochs-sdl, bochsbios, vgabios, busybox-static, cpio, e2fsprogs, isolinux,
syslinux-common and xorriso.

Debian's Bochs has a debugger built in, which makes it several times slower: expect half an hour
before the first case. One that was built without starts in some minutes and then runs about 70
cases a minute. Its sources (3.0 was used) want
    ./configure --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex \\
        --enable-all-optimizations --disable-plugins --disable-docbook --with-nogui
and this script then --bochs PATH/TO/bochs --display nogui.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shlex
import shutil
import signal
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
PACKAGES = ("torch", "numpy", "pytest", "hypothesis")
UNUSED = {"include", "test", "site-packages"}  # folders of the standard library and of packages
CYLINDER = 16 * 63 * 512  # what Bochs wants a disk's size to be a multiple of
DONE = "tokred-avx512-status"  # what the emulated machine prints when pytest has ended

INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in {" ".join(MODULES)}; do insmod /modules/$module.ko; done
mount -t ext4 -o noatime /dev/sda /disk
mount -t devtmpfs dev /disk/dev; mount -t proc proc /disk/proc; mount -t tmpfs tmp /disk/tmp
stty -F /dev/console -onlcr cols 100
chroot /disk /bin/sh /run.sh
echo "{DONE}=$?"
sleep 60  # or else some of this line is lost
poweroff -f
"""

ISOLINUX = """\
default linux
label linux
kernel vmlinuz
append initrd=initrd console=ttyS0 quiet mitigations=off nopti nokaslr tsc=reliable panic=1
"""

# Without 'sync' the machine's time is its number of instructions, however long they take.
BOCHSRC = """\
memory: guest=3072, host=2048
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=corei7_skylake_x, {features}ips=200000000, reset_on_triple_fault=0
clock: sync=none
ata0-master: type=disk, mode=flat, path=disk.img
ata1-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
log: bochs.txt
debug: action=ignore
info: action=ignore
error: action=ignore
panic: action=fatal
"""


def fetch_kernel() -> Path:
    """The folder that Debian's kernel package was unpacked in."""
    folder, downloads = BUILD / "kernel", BUILD / "downloads"
    if not folder.exists():
        depends = subprocess.check_output(["apt-cache", "depends", KERNEL], text=True)
        package = re.findall(r"Depends: (linux-image-\S+)", depends)[0]
        downloads.mkdir(exist_ok=True)
        subprocess.check_call(["apt-get", "-qq", "download", package], cwd=downloads)
        archive = next(downloads.glob(f"{package}_*.deb"))
        subprocess.check_call(["dpkg", "-x", archive, folder])
    return folder


def make_boot_cd() -> None:
    """A CD with the kernel and a first root folder, which mounts the disk and runs its /run.sh."""
    kernel, first_root, cd = fetch_kernel(), BUILD / "first_root", BUILD / "cd"
    for folder in (first_root, cd):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("bin", "modules", "proc", "sys", "dev", "disk"):
        (first_root / name).mkdir(parents=True)
    cd.mkdir()
    shutil.copy("/bin/busybox", first_root / "bin")
    for name in MODULES:
        shutil.copy(next(kernel.rglob(f"{name}.ko")), first_root / "modules")
    init = first_root / "init"
    init.write_text(INIT)
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(first_root)) for path in first_root.rglob("*"))
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"],
        cwd=first_root,
        input=names.encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    (cd / "initrd").write_bytes(gzip.compress(archive.stdout, 1))
    (cd / "isolinux.cfg").write_text(ISOLINUX)
    shutil.copy(next((kernel / "boot").glob("vmlinuz-*")), cd / "vmlinuz")
    shutil.copy("/usr/lib/ISOLINUX/isolinux.bin", cd)
    shutil.copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", cd)
    options = "-b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table"
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", BUILD / "boot.iso", *options.split()]
    subprocess.check_call([*command, cd], stderr=subprocess.DEVNULL)


def installed_files(names: Iterable[str]) -> set[Path]:
    """The files of the packages and of what they require."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        try:
            package = distribution(waiting.pop())
        except PackageNotFoundError:
            continue  # only needed elsewhere
        if found.setdefault(package.name, package) is package:
            requirements = [line for line in package.requires or () if "extra ==" not in line]
            waiting += [re.split(r"[^\w.-]", line)[0] for line in requirements]
    files = (file for package in found.values() for file in package.files or ())
    paths = {Path(str(file.locate())) for file in files if not UNUSED.intersection(file.parts)}
    return {path for path in paths if path.is_file()}


def shared_libraries(binaries: Iterable[Path]) -> set[Path]:
    """The libraries that the binaries load, and the program that loads them."""
    command = ["ldd", *map(str, binaries)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", output)}


def copy(source: Path, disk: Path) -> None:
    """Copies the file to its own absolute path on the disk."""
    target = disk / source.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def make_disk(every: int, offset: int, pytest_arguments: list[str]) -> None:
    """A disk with Python, the packages, this repository, and /run.sh, which runs the tests."""
    disk, image = BUILD / "disk", BUILD / "disk.img"
    shutil.rmtree(disk, ignore_errors=True)
    for name in ("bin", "dev", "proc", "tmp"):
        (disk / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", disk / "bin" / "sh")

    python, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    modules = [path for path in library.rglob("*") if path.is_file()]
    modules = [path for path in modules if not UNUSED.intersection(path.relative_to(library).parts)]
    for path in (python, *modules, *installed_files(PACKAGES)):
        copy(path, disk)
    for path in shared_libraries([python, *disk.rglob("*.so*")]):
        if not path.is_relative_to(disk):
            copy(path, disk)
    shutil.copytree(ROOT / "python", disk / "tokred" / "python")
    shutil.copytree(ROOT / "tests", disk / "tokred" / "tests")
    shutil.copy(ROOT / "pyproject.toml", disk / "tokred")

    folders = ("/tokred/python", "/tokred/tests/avx512", sysconfig.get_path("purelib"))
    variables = {
        "HOME": "/tmp",
        "PYTHONPATH": ":".join(folders),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKRED_EVERY": every,
        "TOKRED_OFFSET": offset,
    }
    options = "-p select_cases -p no:cacheprovider -p no:xdist --color=no --assert=plain"
    command = [str(python), "-m", "pytest", *options.split(), *pytest_arguments]
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
    (disk / "run.sh").write_text("\n".join([*exports, "cd /tokred", shlex.join(command), ""]))

    used = sum(path.lstat().st_size + 4096 for path in disk.rglob("*"))
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate((used * 5 // 4 + (256 << 20)) // CYLINDER * CYLINDER)
    command = [
        "/sbin/mke2fs",
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-d",
        str(disk),
        str(image),
    ]
    subprocess.check_call(command)
    shutil.rmtree(disk)


def emulate(bochs: str, features: str, display: str) -> int:
    """Boots the CD, prints what the machine prints, and returns the exit status of pytest."""
    serial, log = BUILD / "serial.txt", BUILD / "bochs-output.txt"
    serial.write_text("")
    (BUILD / "disk.img.lock").unlink(missing_ok=True)
    command = [bochs, "-q", "-f", "bochsrc"]
    more = f"add_features={features}, " if features else ""
    settings = BOCHSRC.format(features=more) + f"display_library: {display}\n"
    if display == "sdl2":  # Debian's Bochs, which starts in a debugger and would play sounds
        (BUILD / "debugger").write_text("continue\n")
        command += ["-rc", "debugger"]
        settings += "sound: driver=dummy\nspeaker: enabled=0, mode=none\n"
    (BUILD / "bochsrc").write_text(settings)
    environment = {**os.environ, "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    with log.open("w") as output, serial.open(errors="replace") as lines:
        emulator = subprocess.Popen(
            command,
            cwd=BUILD,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            last = ""
            while True:
                ended = emulator.poll() is not None
                new = lines.read()
                print(new, end="", flush=True)
                last = (last + new)[-200:]
                if status := re.search(rf"{DONE}=(\d+)\s", last):
                    return int(status[1])
                if ended:
                    print(f"Bochs ended early: see {log}", file=sys.stderr)
                    return 1
                time.sleep(1)
        finally:
            emulator.kill()
            emulator.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=16, help="run one case in so many (16)")
    parser.add_argument("--offset", type=int, default=0, help="which of them (0)")
    parser.add_argument("--bochs", default="bochs", help="the emulator (bochs)")
    parser.add_argument(
        "--features", default="avx512vnni", help="what it has beside a Skylake-X's (avx512vnni)"
    )
    parser.add_argument("--display", default="sdl2", help="a display library it has (sdl2)")
    parser.add_argument("pytest_arguments", nargs="*", default=["tests"])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that Bochs is ended too
    BUILD.mkdir(parents=True, exist_ok=True)
    make_boot_cd()
    make_disk(arguments.every, arguments.offset, arguments.pytest_arguments)
    return emulate(arguments.bochs, arguments.features, arguments.display)


if __name__ == "__main__":
    sys.exit(main())
