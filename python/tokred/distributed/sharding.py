"""Registers with torch how every op works on DTensors, by the rules of `tokred.ops.placements`.

An op runs without communication where all arguments are sharded along the batch, or all along the
heads; what is 1 long there serves every shard, and is replicated. Other placements are brought into
one of these first, or replicated, by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
from torch.distributed.tensor.placement_types import Placement

from ..ops.placements import REFUSED, RULES


@dataclass(frozen=True)
class Rule:
    """arguments: the letters of each tensor argument's dimensions, by name. results: of each."""

    arguments: dict[str, str]
    results: tuple[str, ...]

    @classmethod
    def of(cls, op: str) -> Rule:
        given, _, returned = RULES[op].partition(" -> ")
        arguments = dict(part.split() for part in given.split(", "))
        return cls(arguments, tuple(returned.split(", ")))


def register() -> None:
    """Registers a rule for every op of torch.ops.tokred, or why it has none; any number of times.

    A refusal is a RuntimeError of torch's that carries the reason.
    """
    for op in RULES:
        _register(op, _strategy(op, Rule.of(op)))
    for op, reason in REFUSED.items():
        _register(op, _refusal(op, reason))


def _register(op: str, strategy: Callable[[OpSchema], OpStrategy]) -> None:
    overload = getattr(torch.ops.tokred, op).default
    kinds = [isinstance(argument.type, torch.TensorType) for argument in overload._schema.arguments]
    # Placements are remembered by all arguments from here on, as results depend on numbers.
    first = kinds.index(False) if False in kinds else len(kinds)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        overload, strategy, RuntimeSchemaInfo(first)
    )


def _refusal(op: str, reason: str) -> Callable[[OpSchema], OpStrategy]:
    def refuse(schema: OpSchema) -> OpStrategy:
        raise ValueError(f"{op} does not work on DTensors: {reason}")

    return refuse


def _strategy(op: str, rule: Rule) -> Callable[[OpSchema], OpStrategy]:
    names = [argument.name for argument in getattr(torch.ops.tokred, op).default._schema.arguments]

    def strategy(schema: OpSchema) -> OpStrategy:
        values = dict(zip(names, schema.args_schema, strict=False)) | schema.kwargs_schema
        tensors = {name: x for name, x in values.items() if isinstance(x, OpStrategy)}
        letters = {name: _spelled(rule.arguments[name], x.ndim) for name, x in tensors.items()}
        rows = max((x.count("*") for x in letters.values()), default=0)
        results = [_spelled(result, rows + len(result) - 1) for result in rule.results]
        if op.endswith("attention_backward") and "key_bias" in rule.arguments:
            # The gradient of a bias that is not there is empty.
            results[-1] = results[-1] if "key_bias" in tensors else "n"
        everywhere: list[Placement | None] = [Replicate()] * (len(results) + len(tensors))
        choices = [everywhere]
        marks = [("*", place) for place in range(rows)] + [("b", 0), ("h", 0)]
        for letter, nth in marks:
            inputs = [_placed(letters[name], x.shape, letter, nth) for name, x in tensors.items()]
            if not any(isinstance(placement, Shard) for placement in inputs):
                continue
            shapes = dict(zip(tensors, inputs, strict=True))
            outputs = [_result(letters_, letter, nth) for letters_ in results]
            if letter == "h":
                kept = _over_heads(op, values.get("reduce"), shapes, outputs)
                if kept is None:
                    continue
                outputs = kept
            choices.append([*outputs, *inputs])

        def even(choice: OpSpec) -> bool:
            """Heads that are not cut evenly would part from their keys' heads."""
            for (name, x), spec in zip(tensors.items(), choice.input_specs or (), strict=True):
                if "h" in letters[name]:
                    head = letters[name].index("h")
                    shards = 1
                    for size, placement in zip(spec.mesh.shape, spec.placements, strict=True):
                        shards *= size if placement == Shard(head) else 1
                    if x.shape[head] % shards:
                        return False
            return True

        found = expand_to_full_mesh_op_strategy(
            schema.get_mesh_from_args(), schema, choices, input_index=len(results)
        )
        found.strategies = [choice for choice in found.strategies if even(choice)]
        return found

    return strategy


def _spelled(letters: str, dims: int) -> str:
    """Letters with a star for every dimension that the star stands for."""
    return letters.replace("*", "*" * (dims - len(letters) + 1))


def _placed(letters: str, shape: Any, letter: str, nth: int) -> Placement:
    """An argument's placement where the nth dimension of a letter is sharded."""
    places = [place for place, each in enumerate(letters) if each == letter]
    if len(places) <= nth or shape[places[nth]] == 1:
        return Replicate()
    return Shard(places[nth])


def _result(letters: str, letter: str, nth: int) -> Placement:
    places = [place for place, each in enumerate(letters) if each == letter]
    return Shard(places[nth]) if len(places) > nth else Replicate()


def _over_heads(
    op: str, reduce: Any, inputs: dict[str, Placement], outputs: list[Placement]
) -> list[Placement] | None:
    """The results' placements with sharded heads; None where the heads must stay together."""
    sharded = {name: isinstance(x, Shard) for name, x in inputs.items()}
    one_key_head = sharded.get("q", False) and not all(
        sharded[name] for name in ("k", "pooled", "codes", "k_codes") if name in sharded
    )
    if reduce in ("head_mean", "softmax_vote") and op != "attention_columns":
        return [Partial("avg" if reduce == "head_mean" else "sum")]
    if one_key_head and reduce in ("group_mean", "group_max"):
        return None
    if one_key_head and op.startswith("linear_attention"):
        return None
    if one_key_head and op.endswith("_backward"):
        # All query heads add to the gradients of the one key head.
        return [
            Partial("sum") if number and isinstance(output, Shard) else output
            for number, output in enumerate(outputs)
        ]
    return outputs
