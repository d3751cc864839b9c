"""Checks that ops share. Each error names the argument, what it is, and what was expected."""

import difflib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable
from numbers import Real
from typing import Any

import torch
from torch.overrides import handle_torch_function
from torch.utils._pytree import tree_leaves

from aefast.errors import InputError
from aefast.kernels.activation import ACTIVATIONS, PARAMETER

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: Any, op: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def are_stand_ins(*values: Any) -> bool:
    """Whether any of the values stands for a tensor without being one, as a proxy of `torch.fx` does."""
    return any(map(_stands_in, values))


def _stands_in(value: Any) -> bool:
    return hasattr(type(value), "__torch_function__") and not isinstance(value, torch.Tensor)


def deferred(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the stand-ins among the arguments make of the call of a public function, by their ``__torch_function__``.

    `arguments` may hold other names besides.
    """
    signature = inspect.signature(function)
    call = signature.bind(**{name: arguments[name] for name in signature.parameters})
    # Lists of tensors are arguments too.
    stand_ins = [value for value in tree_leaves((call.args, call.kwargs)) if _stands_in(value)]
    return handle_torch_function(function, stand_ins, *call.args, **call.kwargs)


def check_floating(name: str, value: torch.Tensor, op: str) -> None:
    if value.dtype not in DTYPES:
        raise InputError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {str(value.dtype).removeprefix('torch.')}"
        )


def check_dense(name: str, value: torch.Tensor, op: str) -> None:
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise InputError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def check_like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor, op: str) -> None:
    """That `value` has the dtype and device of `other`."""
    if value.dtype != other.dtype:
        raise InputError(
            f"{op}: {name} must have the dtype of {other_name}, {str(other.dtype).removeprefix('torch.')}, "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )
    if value.device != other.device:
        raise InputError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: Any, op: str) -> None:
    check_name("reduction", reduction, REDUCTIONS, op)


def reduce(values: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction == "mean":
        return values.mean()
    return values.sum() if reduction == "sum" else values


def reduce_backward(grad: torch.Tensor | None, reduction: str, count: int) -> torch.Tensor | None:
    """The gradient of each of `count` values, from that of what `reduce` makes of them."""
    if grad is None or reduction == "none":
        return grad
    return (grad / count if reduction == "mean" else grad).expand(count)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What elements of `dtype` are computed and summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_number(
    name: str, value: Any, op: str, low: float = -sys.float_info.max, high: float = sys.float_info.max
) -> None:
    """That `value` is a number from `low` to `high`, by default any finite one."""
    if not _is_float(value) or not low <= value <= high:
        expected = {
            (-sys.float_info.max, sys.float_info.max): "a finite number",
            (0.0, sys.float_info.max): "a finite number of at least 0",
            (1.0, sys.float_info.max): "a finite number of at least 1",
        }.get((low, high), f"a number from {low:g} to {high:g}")
        raise InputError(f"{op}: {name} must be {expected}, got {value!r}")


def check_positive(name: str, value: Any, op: str) -> None:
    """That `value` is a finite number above 0."""
    if not _is_float(value) or not 0.0 < value <= sys.float_info.max:
        raise InputError(f"{op}: {name} must be a finite number above 0, got {value!r}")


def _is_float(value: Any) -> bool:
    """Whether it is a number that a float holds, NaN and infinity among them."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # An integer beyond all floats is less than infinity.
    return is_number and (isinstance(value, float) or abs(value) <= sys.float_info.max)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where one of `known` resembles `word`, else an empty string."""
    close = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_name(name: str, value: Any, known: Collection[str], op: str) -> None:
    """That `value` is one of `known`."""
    if not isinstance(value, str) or value not in known:
        hint = did_you_mean(value, known)
        raise InputError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}{hint}")


def check_activation(name: str, value: Any, op: str) -> None:
    check_name(name, value, ACTIVATIONS, op)


def check_activation_parameters(negative_slope: Any, alpha: Any, op: str) -> None:
    """A negative one would make the activation non-monotonic, and its derivative no function of its output."""
    check_number("negative_slope", negative_slope, op, 0.0)
    check_number("alpha", alpha, op, 0.0)


def check_activation_parameter(activation: str, negative_slope: Any, alpha: Any, op: str) -> None:
    """`check_activation_parameters`, of the one that the activation reads."""
    name = PARAMETER.get(activation)
    if name is not None:
        check_number(name, alpha if name == "alpha" else negative_slope, op, 0.0)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


# Asked once: torch.compile of older releases does not trace the question.
_HAS_AUTOCAST = frozenset(
    name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)
)


def has_autocast(device_type: str) -> bool:
    return device_type in _HAS_AUTOCAST


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for devices of this type."""
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The operands of a dense op as autocast casts them, each floating tensor but float64 to its dtype."""
    first = tensors[0]
    if not isinstance(first, torch.Tensor):
        return tensors
    device_type = first.device.type
    if not is_autocast(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)

    def cast(value: Any) -> Any:
        eligible = isinstance(value, torch.Tensor) and value.dtype in DTYPES and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    return tuple(cast(tensor) for tensor in tensors)
