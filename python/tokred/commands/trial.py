"""python -m tokred evaluate | benchmark | profile: methods tried on a model of one's own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tokred.evaluation import Result

_EXAMPLES = """examples:
  python -m tokred {0} smollm2 --methods snap_kv,token_select --budgets 0.5,0.25
  python -m tokred {0} ./my_model --text book.txt --out report
  python -m tokred {0} dinov2 --image photograph.jpg --methods tome,pitome
"""


def add(commands: Any) -> None:
    """Adds the three commands to the parser."""
    for function in (evaluate, benchmark, profile):
        name = function.__name__
        command = commands.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            epilog=_EXAMPLES.format(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_arguments(command, name)
        command.set_defaults(function=function)


def _add_arguments(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        "model", metavar="MODEL",
        help="smollm2 or dinov2 of the demo, a folder of transformers' save_pretrained, or an id "
        "of the Hugging Face hub",
    )  # fmt: skip
    read = command.add_mutually_exclusive_group()
    read.add_argument(
        "--text", metavar="FILE", help="text in UTF-8; Python's language reference by default"
    )
    read.add_argument(
        "--image", metavar="FILE", nargs="+", default=[],
        help="images; a photograph of scikit-image by default",
    )  # fmt: skip
    command.add_argument("--methods", type=names, metavar="A,B", help="all that fit by default")
    command.add_argument(
        "--budgets", type=numbers, metavar="X,Y", default=[0.5, 0.25],
        help="shares of the tokens or keys that stay; 0.5,0.25 by default",
    )  # fmt: skip
    command.add_argument(
        "--bits",
        type=whole_numbers,
        metavar="A,B",
        default=[],
        help="also try packed caches of so many bits, such as 8,4",
    )
    command.add_argument(
        "--tokens", type=int, default=1024, metavar="N",
        help="tokens of the text that are read; 1024 by default",
    )  # fmt: skip
    command.add_argument(
        "--size", type=int, metavar="N",
        help="side of the square images in pixels; the model's by default",
    )  # fmt: skip
    if name == "evaluate":
        command.add_argument(
            "--decoded", type=int, default=64, metavar="N",
            help="how many of the tokens, the last ones, are predicted; 64 by default",
        )  # fmt: skip
    else:
        command.add_argument(
            "--repeats", type=int, default=8, metavar="N", help="timed turns; 8 by default"
        )
        command.add_argument(
            "--batch", type=int, default=1, metavar="N",
            help="rows of the batch, copies of one input; 1 by default",
        )  # fmt: skip
    command.add_argument("--device", default="cpu", help="cpu or cuda; cpu by default")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the weights; float32 by default",
    )  # fmt: skip
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write JSON, PNG and HTML here")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def evaluate(options: argparse.Namespace) -> int:
    """how much of a model's quality methods keep, beside the model without them"""
    import tokred

    loaded, inputs, settings = _prepared(options)
    return _publish(
        tokred.evaluate(
            loaded.model, inputs, tokenizer=loaded.tokenizer if _reads_text(inputs) else None,
            decoded=options.decoded, **settings,
        ),
        options,
    )  # fmt: skip


def benchmark(options: argparse.Namespace) -> int:
    """how much time and memory methods save in a model, beside the best dense practice"""
    import tokred

    loaded, inputs, settings = _prepared(options)
    inputs = _repeated(inputs, options.batch)
    result = tokred.benchmark(loaded.model, inputs, repeats=options.repeats, **settings)
    return _publish(result, options)


def profile(options: argparse.Namespace) -> int:
    """where a model's time goes: weights, attention, choosing and the rest, with each method"""
    import tokred

    loaded, inputs, settings = _prepared(options)
    inputs = _repeated(inputs, options.batch)
    result = tokred.profile(loaded.model, inputs, repeats=options.repeats, **settings)
    return _publish(result, options)


def _prepared(options: argparse.Namespace) -> tuple[Any, list[torch.Tensor], dict[str, Any]]:
    """The model, what it reads, and the arguments that all three functions take.

    Raises:
        ValueError: arguments do not fit; most are checked before a model is loaded.
    """
    from tokred._paths import check_folder
    from tokred.evaluation.candidates import check_bits, check_budgets, check_methods

    from .load import load, pixels, text_ids

    check_methods(options.methods)
    check_budgets(options.budgets)
    check_bits(options.bits)
    for name in ("tokens", "size", "batch", "decoded", "repeats"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for path in filter(None, [options.text, *options.image]):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
    if options.out is not None:
        check_folder("--out", options.out)
    loaded = load(options.model, options.device, options.dtype)
    reads_images = loaded.tokenizer is None and loaded.size is not None
    if options.image or (reads_images and options.text is None):
        size = options.size or loaded.size
        if size is None:
            raise ValueError(f"--image is for models of images, and {options.model} reads text")
        inputs = pixels(options.image, size, loaded)
    else:
        inputs = [text_ids(options.text, options.tokens, loaded)]
    shared = {
        "methods": options.methods,
        "budgets": options.budgets,
        "bits": options.bits,
        "progress": not options.quiet,
    }
    return loaded, inputs, shared


def _reads_text(inputs: list[torch.Tensor]) -> bool:
    return not inputs[0].is_floating_point()


def _repeated(inputs: list[torch.Tensor], batch: int) -> list[torch.Tensor]:
    """The first input, as a batch of so many copies."""
    return [inputs[0].repeat(batch, *[1] * (inputs[0].dim() - 1))]


def _publish(result: Result, options: argparse.Namespace) -> int:
    """Prints the table, writes the files; 1 where nothing was measured, or not all."""
    print(result.table(), flush=True)
    if options.out is not None:
        path = options.out / options.command
        written = [result.to_json(path.with_suffix(".json"))]
        try:
            written.append(result.plot(path.with_suffix(".png")))
        except ImportError as error:
            print(f"tokred: {error}", file=sys.stderr)
        written.append(result.to_html(path.with_suffix(".html")))
        print("\nwritten:", ", ".join(map(str, written)))
    return 1 if result.interrupted or not any(row.figures for row in result.rows) else 0


def names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
