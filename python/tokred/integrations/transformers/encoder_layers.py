"""Recognises encoder layers by what they compute: attention, then a part for each token by itself.

Between the two, tokens can be reduced. The parts of a layer are guessed from their names, and a
guess is accepted where a trial on a few tokens gives the layer's own bits.
"""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokred.patching import Overrides

from .full_attention import dispatches

Step: TypeAlias = Callable[[Tensor], Tensor]

# What models compute once for all layers, which pass it on to their attention.
_PASSED = ("attention_mask", "position_embeddings", "position_ids")


def attention_in(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """(name of the child that it is in, module) of a layer's one attention that looks both ways;
    None where there is none, or more."""
    found = [
        (name, module)
        for name, child in layer.named_children()
        for module in child.modules()
        if dispatches(module)
    ]
    if len(found) != 1 or getattr(found[0][1], "is_causal", False) is True:
        return None
    return found[0]


def parameters_of(module: nn.Module) -> tuple[list[str], bool]:
    """The names of the parameters of its forward, the hidden states first, and whether it takes
    others by name."""
    signature = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    names = [p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return names[1:], any(p.kind is p.VAR_KEYWORD for p in signature)


def accepted(module: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the module's forward takes, without those that are None."""
    names, others = parameters_of(module)
    return {n: v for n, v in given.items() if v is not None and (others or n in names)}


def first_of(output: Any) -> Tensor:
    """The hidden states that a module has returned, alone or before others."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class LayerShape:
    """How a layer is made: y = x + attention(norm(x)), y + mlp(norm(y)), or one of its kin.

    Parts are names of the layer's children, "" for none.

    attention: returns the sum and its norm as well where both norms are "" (`inner`).
    before, between, after: norms before the attention; of the sum, or before the second part; of
        the second sum. middle: whether `between` makes the residual itself (post-norm).
    feed: the second part, in one module, or two, of which the other one adds the residual.
    scales, drops: on the branches of the two parts.
    alone: whether the attention returns hidden states alone, and not a tuple.
    """

    attention: str
    feed: tuple[str, ...]
    alone: bool = False
    inner: bool = False
    before: str = ""
    between: str = ""
    after: str = ""
    middle: bool = False
    scales: tuple[str, str] = ("", "")
    drops: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def run(self, layer: nn.Module, x: Tensor, attend: Step, reduce: Step) -> Tensor:
        """The layer on x [B, N, C], with `attend` for its attention, and `reduce` after that."""
        if self.inner:
            x = attend(x)
        else:
            x = x + self._branch(layer, 0, attend(_part(layer, self.before, x)))
        if self.middle:
            x = _part(layer, self.between, x)
        x = reduce(x)
        y = x if self.middle else _part(layer, self.between, x)
        for name in self.feed[:-1]:
            y = getattr(layer, name)(y)
        last = getattr(layer, self.feed[-1])
        y = last(y, x) if len(self.feed) > 1 else x + self._branch(layer, 1, last(y))
        return _part(layer, self.after, y)

    def _branch(self, layer: nn.Module, part: int, x: Tensor) -> Tensor:
        scale = getattr(layer, self.scales[part]) if self.scales[part] else None
        if isinstance(scale, nn.Module):
            x = scale(x)
        elif scale is not None:
            x = scale * x
        for name in self.drops[part]:
            x = getattr(layer, name)(x)
        return x


def _part(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    return getattr(layer, name)(x) if name else x


def shape_of(layer: nn.Module) -> LayerShape | None:
    """The shape of a layer, found by trial; None where none that is known gives its bits.

    Raises:
        ValueError: the layer has no weights yet.
    """
    found = attention_in(layer)
    weights = [weight for weight in layer.parameters() if weight.is_floating_point()]
    if found is None or not weights:
        return None
    if weights[0].is_meta:
        raise ValueError(f"{type(layer).__name__} has no weights yet: load them before the patch")
    return next((s for s in _guesses(layer, found[0]) if _gives_the_same(layer, s, weights)), None)


def _guesses(layer: nn.Module, attention: str) -> Iterator[LayerShape]:
    names = [name for name, _ in layer.named_children() if name != attention]
    names += [name for name, _ in layer.named_parameters(recurse=False)]
    norms = [name for name in names if "norm" in name.lower()]
    drops = tuple(name for name in names if "drop" in name)
    scales = sorted(n for n in names if n.startswith(("ls", "gamma", "lambda", "layer_scale")))
    feed = tuple(name for name in names if name not in {*norms, *drops, *scales})
    if len(scales) not in (0, 2) or len(norms) > 2 or not 1 <= len(feed) <= 2:
        return
    places = [(drops, drops), (drops[:1], drops[1:]), (drops, ()), ((), drops)]
    for place, order, alone in itertools.product(
        dict.fromkeys(places), itertools.permutations(norms), (False, True)
    ):
        common: dict[str, Any] = dict(
            attention=attention,
            feed=feed,
            alone=alone,
            scales=tuple(scales) or ("", ""),
            drops=place,
        )
        if len(order) == 2:
            yield LayerShape(**common, before=order[0], between=order[1])
            yield LayerShape(**common, between=order[0], after=order[1], middle=True)
        else:
            yield LayerShape(**common, inner=True, between="".join(order))


def _gives_the_same(layer: nn.Module, shape: LayerShape, weights: list[nn.Parameter]) -> bool:
    """Whether the layer and its shape agree on a few tokens, bit for bit, with stubs for attention
    and dropout, and give the attention the same arguments."""
    attention = getattr(layer, shape.attention)
    width = next(part.in_features for part in layer.modules() if isinstance(part, nn.Linear))
    x = torch.linspace(-9, 9, 4 * width, device=weights[0].device).sin()
    x = x.view(1, 4, width).to(weights[0].dtype)
    # Objects of which nothing is read, as the attention is a stub.
    names = [name for name in _PASSED if name in parameters_of(layer)[0]]
    given = {name: object() for name in names}
    seen: list[dict[str, Any]] = []
    order = ["hidden", *parameters_of(attention)[0][1:]]

    def attend(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(order, args, strict=False)) | kwargs
        hidden = named.pop("hidden" if args else "hidden_states")
        seen.append({name: value for name, value in named.items() if value is not None})
        hidden = hidden * 0.75 + 0.25
        return hidden if shape.alone else (hidden, None)

    def drop(hidden: Tensor) -> Tensor:
        return hidden * 0.5

    modes = [(module, module.training) for module in layer.modules()]
    overrides = Overrides()
    try:
        for module, _ in modes:
            module.training = False
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                if getattr(module, hooks):  # hooks must not see the trial
                    overrides.assign(module, hooks, OrderedDict())
        overrides.assign(attention, "forward", attend)
        for name in {*shape.drops[0], *shape.drops[1]}:
            overrides.assign(getattr(layer, name), "forward", drop)
        with torch.no_grad():
            theirs = type(layer).forward(layer, x, **given)
            ours = shape.run(layer, x, lambda h: first_of(attend(h, **given)), lambda y: y)
    except Exception:  # of a layer that the shape is not that of
        return False
    finally:
        overrides.undo()
        for module, mode in modes:
            module.training = mode
    passed = {name: seen[0].get(name) for name in accepted(attention, given)}
    same = accepted(attention, given) == passed
    return isinstance(theirs, Tensor) and torch.equal(theirs, ours) and same
