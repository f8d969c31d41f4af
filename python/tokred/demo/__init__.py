"""python -m tokred demo: token merging in DINOv2 ViT-S/14 on real photographs, sparse attention and
packed caches in SmolLM2-135M on real text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokred._paths import check_folder

from . import cache, images, text
from .offline import MissingModelError, require_packages


def main(arguments: Sequence[str] = ()) -> int:
    """Runs the demo; the exit code is 1 where something must be installed first."""
    parser = argparse.ArgumentParser(prog="python -m tokred demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write")
    parser.add_argument("--quick", action="store_true", help="one photograph, a little text")
    parser.add_argument("--only", choices=("images", "text", "cache"), help="one part of the demo")
    options = parser.parse_args(arguments)
    try:
        check_folder("--output", options.output)
    except ValueError as error:
        parser.error(str(error))
    try:
        require_packages()
        if options.only in (None, "images"):
            images.run(images.QUICK if options.quick else images.FULL, options.output)
        if options.only in (None, "text"):
            text.run(text.QUICK if options.quick else text.FULL, options.output)
        if options.only in (None, "cache"):
            cache.run(cache.QUICK if options.quick else cache.FULL, options.output)
    except MissingModelError as error:
        print(f"tokred demo: {error}", file=sys.stderr)
        return 1
    return 0
