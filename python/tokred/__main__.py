"""python -m tokred COMMAND: what is here, trying methods on models, demos and benchmarks.

The exit code is 0 where all went well, 1 where something failed, 2 for arguments that do not fit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


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
    from .commands import info, methods, trial

    whole = argparse.ArgumentParser(
        prog="python -m tokred",
        description="Token reduction for transformers.",
        epilog="COMMAND --help says what a command takes. Without one it is info.",
    )
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    for module in (info, methods, trial):
        module.add(commands)
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
    except (ValueError, TypeError) as error:
        print(f"tokred: {error}", file=sys.stderr)
        return 2
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"tokred: {error}", file=sys.stderr)
        return 1
    return code


def run() -> int:
    """main(), quiet where the reader of a pipe has gone, as with `... | head`, and at Ctrl-C."""
    try:
        return main()
    except BrokenPipeError:
        # What is still buffered must not be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("tokred: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
