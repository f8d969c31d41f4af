"""python -m tokred info | methods | demo | gallery | compare | bench"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import torch

import tokred

from . import _library


def info(options: argparse.Namespace) -> int:
    """what is installed here, and what the ops run on"""
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
        vnni = " with VNNI" if _C.cpu_isa() == "avx512" and _C.cpu_vnni() else ""
        lines["cpu"] = f"instruction set {_C.cpu_isa()}{vnni}"
        lines["build"] = str(_C.build_info())
    if torch.cuda.is_available():
        lines["cuda"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    else:
        lines["cuda"] = "no device"
    if options.json:
        print(json.dumps(lines, indent=2))
        return 0
    for name, value in lines.items():
        print(f"{name:18s} {value}")
    return 0


def methods(options: argparse.Namespace) -> int:
    """the published methods, with those marked whose papers leave formulas open"""
    from .methods import METHODS, get

    chosen = [get(name) for name in options.names] or list(METHODS.values())
    if options.json:
        print(json.dumps([method.as_dict() for method in chosen], indent=2))
        return 0
    if options.names:
        for method in chosen:
            print(f"{method.name}: {method.family.value}; needs {method.needs_in_words}")
            print(f"{method.usage() or f'functions of tokred.methods.{method.name}'}\n")
            print(f"{(method.load().__doc__ or '').strip()}\n")
        return 0
    for family, listed in groupby(chosen, key=lambda method: method.family):
        print(f"\n{family.value}:" if family is not chosen[0].family else f"{family.value}:")
        for method in listed:
            status = "" if method.status == "exact" else f" ({method.status})"
            print(f"  {method.name:18s} arXiv:{method.arxiv}  {method.title}{status}")
            print(f"  {'':18s} {method.summary}")
    return 0


def demo(arguments: list[str]) -> int:
    """token merging on photographs, sparse attention and packed caches on text, in real models"""
    from .demo import main

    return main(arguments) or 0


def gallery(arguments: list[str]) -> int:
    """a picture of what every merging method joins in a photograph, with time and cosine"""
    from .demo.gallery import main

    return main(arguments)


def compare(arguments: list[str]) -> int:
    """every method that fits photographs or text, at equal budgets: quality, time and memory"""
    from .demo.compare import main

    return main(arguments)


def bench(arguments: list[str]) -> int:
    """the benchmarks of the checkout"""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "bench" / "__main__.py").exists():
        print("tokred: the benchmarks are in the checkout, not in the wheel", file=sys.stderr)
        return 1
    return subprocess.call([sys.executable, "-m", "bench", *arguments], cwd=checkout)


# These have parsers of their own, --help included, and get what follows their names as it is.
PASSED_ON = {"demo": demo, "gallery": gallery, "compare": compare, "bench": bench}


def parser() -> argparse.ArgumentParser:
    """The parser of `python -m tokred`; those of PASSED_ON are listed in it only for its help."""
    whole = argparse.ArgumentParser(prog="python -m tokred")
    commands = whole.add_subparsers(dest="command", metavar="command")
    for function in (info, methods):
        command = commands.add_parser(
            function.__name__, help=function.__doc__, description=function.__doc__
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(function=function)
        if function is methods:
            command.add_argument("names", nargs="*", help="only these, with what they do in full")
    for name, passed_on in PASSED_ON.items():
        commands.add_parser(name, help=passed_on.__doc__, add_help=False)
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 2 and one line on stderr for arguments it does not take."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["info"]
    if arguments[0] in PASSED_ON:
        return PASSED_ON[arguments[0]](arguments[1:])
    options = parser().parse_args(arguments)
    try:
        code = options.function(options)
        sys.stdout.flush()
    except ValueError as error:
        print(f"tokred: {error}", file=sys.stderr)
        return 2
    return code


def run() -> int:
    """main(), quiet where the reader of a pipe has gone, as with `... | head`."""
    try:
        return main()
    except BrokenPipeError:
        # What is still buffered must not be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(run())
