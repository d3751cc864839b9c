"""The chamfer distance of point clouds, without a matrix of distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.ops import _arguments, _pairwise, _registry, nearest


def reference(x: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
    """`chamfer` in plain PyTorch."""
    return _arguments.reduce(_of_clouds(nearest.squared_reference, x, y), reduction)


def _of_clouds(squared: Callable[..., tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Tensor:
    """(*, N, D) and (*, M, D) to (*)."""
    return squared(x, y)[0].mean(-1) + squared(y, x)[0].mean(-1)


def chamfer(x: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
    """The chamfer distance of point clouds, from squared distances and averaged over the points of each cloud.

    ``1/N Σ_i min_j ‖x_i - y_j‖² + 1/M Σ_j min_i ‖x_i - y_j‖²``: Fan, Su and Guibas, A Point Set Generation Network for
    3D Object Reconstruction from a Single Image, CVPR 2017, whose sums are not divided by N and M; here they are, as in
    PyTorch3D's ``chamfer_distance``.

    Value and gradients are those of `nearest`, of the distance squared: memory grows with N + M, and the gradient is
    that along the pairs of nearest points. What it says of nearly equal distances above 32 dimensions holds here.

    Args:
        x: (*, N, D), clouds of N points: float32, bfloat16, float16 or float64, any strides. Half precision is computed
            in float32, and so is everything under autocast.
        y: (*, M, D), clouds of M points, of the leading dimensions, dtype and device of x. N and M are at least 1.
        reduction: over the leading dimensions: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" of the leading dimensions, in the squared units of x; in float32, or float64 for
        float64.

    Raises:
        InputError: a shape, dtype, device or name is not as above, or, on the CPU in eager mode, x or y is not finite
            and the result is NaN for it; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, y) and _arguments.are_stand_ins(x, y):
        return _arguments.deferred(chamfer, locals())
    x, y = nearest.operands("chamfer", x, y, least=1)
    _arguments.check_reduction(reduction, "chamfer")
    each = _of_clouds(nearest.squared_nearest, x, y)
    _pairwise.check_finite("chamfer", each, x=x, y=y)
    return _arguments.reduce(each, reduction)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The operands of `nearest.samples` that have points, of up to 67 dimensions, with one reduction after another."""
    index = 0
    for sample in nearest.samples(device, dtype):
        x = sample["x"]
        if x.shape[-2] > 0 and x.shape[-1] <= 67:
            # A mean of no clouds is NaN.
            yield {**sample, "reduction": _arguments.REDUCTIONS[index % 3] if x.numel() else "sum"}
            index += 1


def cost(backward: bool, x: Tensor, y: Tensor, reduction: str = "mean") -> _registry.Cost:
    """Each operand is read once, and the product of a pair serves both of its points. The backward reads the operands
    and the indices of the nearest points, and writes both gradients."""
    points = (x.numel() + y.numel()) // max(1, x.shape[-1])
    moved = points * x.shape[-1] * x.element_size() * (1 + 2 * backward) + 2 * backward * points * 8
    return _registry.Cost(moved, 2 * (x.numel() // max(1, x.shape[-1])) * y.shape[-2] * x.shape[-1], 0)


OP = _registry.register(_registry.Op("chamfer", chamfer, reference, samples, cost, launchers="nearest"))
