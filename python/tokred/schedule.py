"""How many tokens each layer gives up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

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
