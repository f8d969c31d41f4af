"""python -m tokred info | methods | demo | bench"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import tokred

from . import _library


def info(arguments: list[str]) -> int:
    """What is installed here, and what the ops run on."""
    lines = {
        "tokred": f"{tokred.__version__} in {Path(tokred.__file__).parent}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    for path in _library.library_paths():
        lines[path.name] = f"{path.stat().st_size / 1e6:.1f} MB, loaded"
    try:
        from . import _C
    except ImportError:
        lines["tokred._C"] = "not built for this Python (introspection only, no op needs it)"
    else:
        lines["cpu"] = f"instruction set {_C.cpu_isa()}"
        lines["build"] = str(_C.build_info())
    if torch.cuda.is_available():
        lines["cuda"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    else:
        lines["cuda"] = "no device"
    for name, value in lines.items():
        print(f"{name:18s} {value}")
    return 0


def methods(arguments: list[str]) -> int:
    """The published methods, with those marked whose papers leave formulas open."""
    from .methods import METHODS

    for method in METHODS.values():
        status = "" if method.status == "exact" else f" ({method.status})"
        print(f"{method.name:18s} arXiv:{method.arxiv}  {method.title}{status}")
        print(f"{'':18s} {method.summary}")
    return 0


def demo(arguments: list[str]) -> int:
    """Token merging on photographs, sparse attention and packed caches on text, in real models."""
    from .demo import main

    return main(arguments) or 0


def bench(arguments: list[str]) -> int:
    """The benchmarks of the checkout; arguments are passed on."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "bench" / "__main__.py").exists():
        print("tokred: the benchmarks are in the checkout, not in the wheel", file=sys.stderr)
        return 1
    return subprocess.call([sys.executable, "-m", "bench", *arguments], cwd=checkout)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    command.__name__: command for command in (info, methods, demo, bench)
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tokred",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:10s}{f.__doc__}" for name, f in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, nargs="?", default="info")
    options, arguments = parser.parse_known_args()
    return COMMANDS[options.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
