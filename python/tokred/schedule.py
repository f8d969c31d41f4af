"""How many tokens each layer gives up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

Amount: TypeAlias = int | float
Schedule: TypeAlias = Amount | tuple[int, float] | Sequence[Amount]


def parse_r(num_layers: int, r: Schedule) -> list[Amount]:
    """One amount per layer, from any of the ways to write a schedule.

    Args:
        num_layers: how many layers there are.
        r: an int, tokens to merge in every layer; a float in [0, 1), the share of its tokens that
            every layer merges; a tuple (r, inflect), from int(r * (1 - inflect)) in the first
            layer in a straight line to the mirrored number in the last, inflect = -1 being the
            decreasing schedule that ends at 0; or a list with one int or float per layer, padded
            with 0 where it is shorter than the model.

    Returns:
        num_layers amounts: ints are tokens, floats shares of the layer's tokens.

    Raises:
        ValueError: a negative amount, a share of 1 or more, a list longer than the model.
        TypeError: anything else.

    Source: Token Merging: Your ViT But Faster (arXiv 2210.09461), section 4.1 and its schedule
    of 32, 29, 26, ... 2, 0 for (16, -1) and 12 layers.
    """
    if isinstance(r, tuple):
        amounts = _inflected(num_layers, r)
    elif isinstance(r, Sequence) and not isinstance(r, str):
        amounts = list(r)
        if len(amounts) > num_layers:
            raise ValueError(f"r lists {len(amounts)} amounts, but there are {num_layers} layers")
        amounts += [0] * (num_layers - len(amounts))
    else:
        amounts = [r] * num_layers
    return [_checked(amount, r) for amount in amounts]


def resolve(amount: Amount, tokens: int, num_prefix: int) -> int:
    """The number of tokens to merge out of `tokens`: never more than half of what may merge."""
    r = int(tokens * amount) if isinstance(amount, float) else amount
    limit = max(tokens - num_prefix, 0) // 2
    # A branch, not min(): under torch.compile with symbolic shapes it becomes one guard a layer,
    # where minima would nest from layer to layer and take minutes to simplify.
    return r if r <= limit else limit


def _inflected(num_layers: int, r: tuple[int, float]) -> list[Amount]:
    if len(r) != 2 or not isinstance(r[0], int):
        raise ValueError(f"r as a tuple is (tokens, inflect), such as (16, -1.0), not {r!r}")
    tokens, inflect = r
    first = int(tokens * (1.0 - inflect))
    last = 2 * tokens - first
    step = (last - first) / max(num_layers - 1, 1)
    return [int(first + step * layer) for layer in range(num_layers)]


def _checked(amount: Amount, r: Schedule) -> Amount:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(
            "r must be an int, a float in [0, 1), a tuple (int, inflect) or a list of ints and "
            f"floats, not {r!r}"
        )
    if amount < 0 or (isinstance(amount, float) and not amount < 1):
        raise ValueError(f"r = {r!r} gives a layer {amount}: ints must be >= 0, floats in [0, 1)")
    return amount


def reducing_layers(num_layers: int, r: Schedule) -> list[int]:
    """The layers whose amount is not 0; r as in parse_r."""
    return [layer for layer, amount in enumerate(parse_r(num_layers, r)) if amount]


KeepKind: TypeAlias = Literal["linear", "sigmoid", "pyramid"]


def keep_schedule(
    num_layers: int,
    tokens: int,
    end: int,
    kind: KeepKind = "linear",
    first: int = 1,
    centre: float = 0.5,
    width: float = 0.1,
    stages: int = 3,
) -> list[int]:
    """How many of `tokens` tokens every layer works on: never more than the layer before it.

    Args:
        num_layers: how many layers there are.
        tokens: what the layers before `first` work on. end: what is left at the end.
        kind: "linear" or "sigmoid": end + (tokens - end) keep_share(depth), the depth from 0 in
            layer `first` to 1 in the last. "pyramid": by the same factor at each of `stages`
            layers, which divide all layers into stages + 1 parts.
        centre, width: of the sigmoid. stages: of the pyramid.

    Returns:
        num_layers ints, rounded down.

    Raises:
        ValueError: another kind, end outside [0, tokens], first outside [0, num_layers], a width
            that is not above 0, or stages below 1.

    Source: P-Sigmoid of Accelerating Multimodal Large Language Models by Searching Optimal Vision
    Token Reduction (arXiv 2412.00556), whose parameters that searches for; the pyramid of
    PyramidDrop (arXiv 2410.17247).
    """
    if not 0 <= end <= tokens:
        raise ValueError(f"end must be from 0 to {tokens} tokens, got {end}")
    if not 0 <= first <= num_layers:
        raise ValueError(f"first must be one of {num_layers} layers, got {first}")
    if kind == "pyramid":
        if stages < 1:
            raise ValueError(f"stages must be at least 1, got {stages}")
        passed = [min(layer * (stages + 1) // num_layers, stages) for layer in range(num_layers)]
        return [int(tokens ** (1 - s / stages) * end ** (s / stages) + 1e-9) for s in passed]
    if kind not in ("linear", "sigmoid"):
        raise ValueError(f'kind must be "linear", "sigmoid" or "pyramid", got {kind!r}')
    last = max(num_layers - 1 - first, 1)
    shares = [keep_share(i / last, kind, centre, width) for i in range(num_layers - first)]
    return [tokens] * first + [int(end + (tokens - end) * share + 1e-9) for share in shares]


def keep_share(
    depth: float, kind: Literal["linear", "sigmoid"], centre: float = 0.5, width: float = 0.1
) -> float:
    """The share that is still there, at a depth, of the tokens that a schedule drops in the end.

    1 - depth for "linear", sigmoid((centre - depth) / width) for "sigmoid".

    Raises:
        ValueError: a width that is not above 0.
    """
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}")
    return 1 - depth if kind == "linear" else 0.5 * (1 + math.tanh((centre - depth) / width / 2))
