"""Registration of ops with torch's autograd, version counters and autocast.

An op is one of

    differentiable      in the arguments it names; others that require grad are refused
    not differentiable  its results are choices, and never require grad
    without gradient    inputs that require grad are refused while gradients are recorded

so that no result ever carries a gradient that is missing or wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._library import named_tensors, refuse_history
from .op_log import LOGS_OPS, logged
from .refusals import again

_library = torch.library.Library("tokred", "IMPL")
_any_requires_grad = torch._C._any_requires_grad
_below_autograd = torch._C._AutoDispatchBelowAutograd
_below_in_place = torch._C._AutoDispatchBelowADInplaceOrView


def call(op: Any, *args: Any) -> Any:
    """op(*args), without the autograd layer (several us a call) where nothing is recorded."""
    if torch.compiler.is_dynamo_compiling():
        return op(*args)
    if forward_ad._current_level >= 0:
        _refuse_tangents(_name(op), _arguments(op), args)
    try:
        if torch.is_grad_enabled():
            if _any_requires_grad(*args):
                return op(*args)
        elif torch.is_inference_mode_enabled():
            return op._op(*args)
        guard = _below_autograd()  # holds from here on; `with` would cost half a us more
        try:
            return op._op(*args)
        finally:
            del guard
    except (RuntimeError, NotImplementedError) as error:
        return again(op, args, error, partial(call, op))


def choose(op: Any, *args: Any) -> Any:
    """op(*args) for an op that is not differentiable."""
    if torch.compiler.is_dynamo_compiling():
        return op(*args)
    try:
        return op._op(*args)
    except (RuntimeError, NotImplementedError) as error:
        return again(op, args, error, partial(choose, op))


def call_in_place(op: Any, written: Sequence[Tensor], *args: Any) -> None:
    """op(*args), which writes to some of its arguments; autograd learns that they have changed."""
    if torch.compiler.is_dynamo_compiling():
        return op(*args)
    if (torch.is_grad_enabled() and _any_requires_grad(*args)) or forward_ad._current_level >= 0:
        return op(*args)
    guard = _below_in_place()  # as in call()
    try:
        op._op(*args)
    except (RuntimeError, NotImplementedError) as error:
        again(op, args, error, partial(call_in_place, op, written))
        return None  # the second try has counted the versions
    finally:
        del guard
    torch._C._increment_version(written)
    return None


if LOGS_OPS:
    call, choose, call_in_place = logged(call, 0), logged(choose, 0), logged(call_in_place, 1)


def differentiable(
    name: str, arguments: Sequence[str], backward: Callable, setup_context: Callable
) -> None:
    """Registers the gradient of an op in some of its arguments."""
    op = _overload(name)
    names = _arguments(op)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        refuse_history(name, names, inputs, besides=arguments)
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Tensor) -> Any:
        return backward(ctx, *_of_one_kind(grads))

    torch.library.register_autograd(op, run, setup_context=setup, lib=_library)


def _of_one_kind(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All gradients as DTensors where one is; autograd makes plain zeros for unused results."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None:
        return grads
    like = next((grad for grad in grads if isinstance(grad, tensor.DTensor)), None)
    if like is None:
        return grads
    return tuple(
        like.new_zeros(grad.shape, dtype=grad.dtype) if type(grad) is Tensor else grad
        for grad in grads
    )


def once_differentiable(name: str, called: str) -> None:
    """Registers a backward op that cannot be differentiated again."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"tokred: {called} has no second derivative; tokred.reference.{called} has, at the "
            "cost of plain torch"
        )

    torch.library.register_autograd(_overload(name), backward, lib=_library)


def not_differentiable(*names: str) -> None:
    """Registers ops whose results are choices: they never require grad, whatever the inputs do."""
    for name in names:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def without_gradient(name: str, called: str | None = None) -> None:
    """Registers an op that refuses inputs whose gradient it would drop, by its public name."""
    op = _overload(name)
    names, called = _arguments(op), called or name

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(called, names, args)
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            refuse_history(called, names, args)
        with _below_autograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def writes(name: str) -> None:
    """Registers that an op changes the arguments that its schema marks as written."""
    op = _overload(name)
    written = [i for i, a in enumerate(op._schema.arguments) if a.is_write]

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        with _below_in_place():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        # torch leaves out arguments at the end that have their default.
        given = [args[i] for i in written if i < len(args)]
        torch._C._increment_version([x for x in given if x is not None])

    _library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


def cast_under_autocast(name: str, *arguments: str) -> None:
    """Casts these arguments as torch casts those of its own attention; float64 stays."""
    places = _places(name, arguments)

    def cast(args: list[Any], dtype: torch.dtype) -> None:
        if args[places[0]].dtype == torch.float64:
            return
        for i in places:
            if i < len(args) and args[i] is not None:
                args[i] = args[i].to(dtype)

    _register_autocast(name, cast)


def promote_under_autocast(name: str, *arguments: str) -> None:
    """Casts these arguments to the widest dtype among them, as torch does before cat."""
    places = _places(name, arguments)

    def promote(args: list[Any], _: torch.dtype) -> None:
        dtype = args[places[0]].dtype
        for i in places[1:]:
            dtype = torch.promote_types(dtype, args[i].dtype)
        for i in places:
            args[i] = args[i].to(dtype)

    _register_autocast(name, promote)


def follow_under_autocast(name: str, argument: str, leader: str) -> None:
    """Casts an argument to the dtype of another, where that is given."""
    place, first = _places(name, (argument, leader))

    def follow(args: list[Any], _: torch.dtype) -> None:
        if first < len(args) and args[first] is not None:
            args[place] = args[place].to(args[first].dtype)

    _register_autocast(name, follow)


def _refuse_tangents(called: str, names: Sequence[str], values: Iterable[Any]) -> None:
    for name, tensor in named_tensors(names, values):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{called} has no derivative in forward mode, but {name} has a tangent: use "
                "reverse mode"
            )


def _overload(name: str) -> Any:
    return getattr(torch.ops.tokred, name).default


def _name(op: Any) -> str:
    return op._schema.name.partition("::")[2]


def _arguments(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def _places(name: str, arguments: Sequence[str]) -> list[int]:
    names = _arguments(_overload(name))
    return [names.index(argument) for argument in arguments]


def _register_autocast(name: str, cast: Callable[[list[Any], torch.dtype], None]) -> None:
    for device in ("cpu", "cuda"):
        _register_autocast_for(_overload(name), name, device, cast)


def _register_autocast_for(op: Any, name: str, device: str, cast: Callable) -> None:
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        values = list(args)
        cast(values, torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*values, **kwargs)

    op.py_impl(key)(kernel)
    _library.impl(name, kernel, key.name)
