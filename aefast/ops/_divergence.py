"""What ops that measure a divergence between two tensors of rows have in common."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.ops import _arguments, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def define_divergence(
    op: str, names: tuple[str, str], reference: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Defines ``torch.ops.aefast.<op>`` and its backward, and gives the function (*, D), (*, D) to (*) that runs them.

    ``reference`` is the same in plain PyTorch. Launchers take (B, D) of any strides and give (B,), and for grad (B,)
    the gradients of both.
    """
    tensors = ", ".join(f"Tensor {name}" for name in names)
    define(f"{op}({tensors}, str backend) -> Tensor")
    define(f"{op}_backward(Tensor grad, {tensors}, str backend) -> (Tensor, Tensor)")
    forward = getattr(torch.ops.aefast, op).default

    @implement(op)
    def _(first, second, backend):
        return getattr(_registry.kernels(backend, op), op)(first, second)

    @implement(f"{op}_backward")
    def _(grad, first, second, backend):
        return getattr(_registry.kernels(backend, op), f"{op}_backward")(grad, first, second)

    @torch.library.register_fake(f"aefast::{op}", lib=LIBRARY)
    def _(first, second, backend):
        return first.new_empty(first.shape[0], dtype=_arguments.accumulator(first.dtype))

    @torch.library.register_fake(f"aefast::{op}_backward", lib=LIBRARY)
    def _(grad, first, second, backend):
        return first.new_empty(first.shape), first.new_empty(first.shape)

    class Divergence(torch.autograd.Function):
        """`call` is (backend, launchers to call at once or None)."""

        @staticmethod
        def forward(ctx, first, second, call):
            backend, launchers = call
            ctx.save_for_backward(first, second)
            ctx.backend = backend
            if launchers is not None:
                return getattr(launchers, op)(first, second)
            with below_autograd():
                return forward(first, second, backend)

        @staticmethod
        def backward(ctx, grad):
            first, second = ctx.saved_tensors
            if _registry.wants_reference(grad):
                needs = ctx.needs_input_grad[:2]
                gradients = _registry.differentiate(reference, (first, second), needs, grad)
            else:
                tensors = grad, first, second
                gradients = _registry.gradients(op, ctx.backend, tensors, (), (True, True))
            return *gradients, None

    apply = direct_apply(Divergence)

    @torch.library.impl(LIBRARY, op, "Autograd")
    def _(first, second, backend):
        if _registry.is_transformed():
            return reference(first, second)
        if _registry.needs_gradient(first, second):
            return Divergence.apply(first, second, (backend, None))
        with below_autograd():
            return forward(first, second, backend)

    def divergence(first: Tensor, second: Tensor) -> Tensor:
        backend = _registry.choose(op, first, second)
        if backend == "eager":
            return reference(first, second)
        leading = first.shape[:-1]
        if first.dim() == 2:
            return of_matrices(first, second, backend)
        shape = (math.prod(leading), first.shape[-1])
        return of_matrices(first.reshape(shape), second.reshape(shape), backend).reshape(leading)

    def of_matrices(first: Tensor, second: Tensor, backend: str) -> Tensor:
        if not _registry.is_direct(backend, first, second):
            return forward(first, second, backend)
        launchers = _registry.kernels(backend, op)
        if _registry.needs_gradient(first, second):
            return apply(first, second, (backend, launchers))
        return getattr(launchers, op)(first, second)

    return divergence


def check_operands(op: str, names: tuple[str, str], first: Any, second: Any, dims: str = "") -> None:
    """That both are tensors of one shape with at least one dimension, one dtype and one device."""
    _arguments.check_tensor(names[0], first, op)
    _arguments.check_tensor(names[1], second, op)
    _arguments.check_floating(names[0], first, op)
    _arguments.check_dense(names[0], first, op)
    _arguments.check_dense(names[1], second, op)
    if first.dim() < 1:
        raise InputError(f"{op}: {names[0]} must have at least one dimension{dims}, got a scalar")
    if second.shape != first.shape:
        raise InputError(
            f"{op}: {names[1]} must have the shape of {names[0]}, {_arguments.shape_of(first)}, "
            f"got {_arguments.shape_of(second)}"
        )
    _arguments.check_like(names[1], second, names[0], first, op)


def cost(backward: bool, first: Tensor, dim: int, exps: int) -> _registry.Cost:
    """Each operand is read once and each result written once; `exps` an element."""
    elements = (2 + 4 * backward) * first.numel()
    rows = first.numel() // max(1, first.shape[dim])
    wide = _arguments.accumulator(first.dtype).itemsize
    return _registry.Cost(
        elements * first.element_size() + (1 + backward) * rows * wide,
        0,
        (1 + backward) * exps * first.numel(),
    )
