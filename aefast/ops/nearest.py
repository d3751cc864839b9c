"""The nearest of the rows of one tensor to each row of another, without a matrix of distances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _pairwise, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` in plain PyTorch."""
    squared, index = squared_reference(x, y)
    return root(squared), index


def squared_reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(*, N, D) and (*, M, D) to the squared distances (*, N), and the indices (*, N)."""
    index = _search(x, y)
    return squared_to(x, y, index), index


def squared_to(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The squared distance of each row of x (*, N, D) to the row of y (*, M, D) that index (*, N) says."""
    wide = _arguments.accumulator(x.dtype)
    # Widened first: the gradient of a row is summed as wide.
    taken = y.to(wide).gather(-2, index.unsqueeze(-1).expand(*index.shape, y.shape[-1]))
    return (x.to(wide) - taken).square().sum(-1)


# Differences that _search holds at once: they are to stay in a cache.
_DIFFERENCES = 1 << 18
# A multiple of the columns that torch sums at a time on any processor.
_VECTOR = 64


def _search(x: Tensor, y: Tensor) -> Tensor:
    """The index of the nearest row of y for each row of x, by differences; of equals the first."""
    dtype = _arguments.accumulator(x.dtype)
    # Dimensions come before rows: sums along the last of few elements are slow.
    x, y = (one.detach().to(dtype).transpose(-1, -2).contiguous() for one in (x, y))
    if _registry.is_watched():
        # A compiler makes one loop of a block, and would of many make many.
        return _least_of(x, y)[1]
    rows, columns = x.shape[-1], y.shape[-1]
    each = max(1, math.prod(x.shape[:-1]))
    wide = max(1, min(columns, _DIFFERENCES // each))
    tall = max(1, min(rows, _DIFFERENCES // (each * wide)))
    parts = [_search_block(x[..., first : first + tall], y, wide) for first in range(0, rows, tall)]
    return torch.cat(parts, -1) if parts else x.new_empty((*x.shape[:-2], 0), dtype=torch.int64)


def _search_block(x: Tensor, y: Tensor, wide: int) -> Tensor:
    """Of x (*, D, N) and y (*, D, M), so many columns of y at a time."""
    best, index = None, None
    for first in range(0, y.shape[-1], wide):
        least, at = _least_of(x, y[..., first : first + wide])
        if best is None:
            best, index = least, at
        else:
            # NaN is less than any number, as torch's minimum has it.
            is_closer = (least < best) | least.isnan()
            best, index = torch.where(is_closer, least, best), torch.where(is_closer, at + first, index)
    return index


def _least_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of x (*, D, N) and y (*, D, M) the squared distances (*, N) to the nearest columns of y, and which these are."""
    if y.is_cpu:
        # Whole vectors of columns: torch sums the rest in another order, and equal columns would differ.
        rest = -y.shape[-1] % _VECTOR
        y = torch.cat((y, y[..., -1:].expand(*y.shape[:-1], rest)), -1)
    apart = x[..., :, None] - y[..., None, :]
    return apart.mul_(apart).sum(-3).min(-1)


def root(squared: Tensor) -> Tensor:
    """Of squared distances; where they are 0, so is the gradient."""
    is_apart = squared > 0
    return torch.where(is_apart, torch.where(is_apart, squared, 1.0).sqrt(), squared)


# x (B, N, D) and y (B, M, D) of any strides, M and D at least 1. The squared distance of each row of x to the nearest
# row of y (B, N) in the accumulator, and its index (B, N), int64.
define("nearest(Tensor x, Tensor y, str backend) -> (Tensor, Tensor)")
# For the gradient of the squared distances (B, N) those of x and y, contiguous, in their dtype; `needs` has bit 0 set
# if x's is wanted, bit 1 y's, and one that is not is of no elements. No backend has a kernel of its own.
define("nearest_backward(Tensor grad, Tensor x, Tensor y, Tensor index, int needs) -> (Tensor, Tensor)")


@implement("nearest")
def _(x, y, backend):
    return _registry.kernels(backend, "nearest").nearest(x, y)


@implement("nearest_backward")
def _(grad, x, y, index, needs):
    batch, rows, dimensions = x.shape
    columns = y.shape[1]
    wide = _arguments.accumulator(x.dtype)
    index = (index + torch.arange(0, batch * columns, columns, device=x.device)[:, None]).reshape(-1)
    apart = x.to(wide) - y.reshape(batch * columns, dimensions)[index].reshape(x.shape)
    apart = (apart * (2.0 * grad.to(wide)).unsqueeze(-1)).reshape(batch * rows, dimensions)
    of_x = apart.to(x.dtype).reshape(x.shape) if needs & 1 else x.new_empty(0)
    if not needs & 2:
        return of_x, y.new_empty(0)
    total = apart.new_zeros((batch * columns, dimensions))
    if total.is_cuda:
        # Sorts by index, where index_add_ would add in whatever order its threads come.
        total.index_put_((index,), apart.neg_(), accumulate=True)
    else:
        total.index_add_(0, index, apart, alpha=-1)
    return of_x, total.to(y.dtype).reshape(y.shape)


@torch.library.register_fake("aefast::nearest", lib=LIBRARY)
def _(x, y, backend):
    shape = x.shape[:2]
    return x.new_empty(shape, dtype=_arguments.accumulator(x.dtype)), x.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("aefast::nearest_backward", lib=LIBRARY)
def _(grad, x, y, index, needs):
    return x.new_empty(x.shape if needs & 1 else (0,)), y.new_empty(y.shape if needs & 2 else (0,))


class _Nearest(torch.autograd.Function):
    """`call` is (backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, x, y, call):
        backend, launchers = call
        if launchers is not None:
            squared, index = launchers.nearest(x, y)
        else:
            with below_autograd():
                squared, index = torch.ops.aefast.nearest.default(x, y, backend)
        ctx.save_for_backward(x, y, index)
        ctx.mark_non_differentiable(index)
        return squared, index

    @staticmethod
    def backward(ctx, grad, _):
        x, y, index = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(lambda x, y: squared_to(x, y, index), (x, y), needs, grad)
        else:
            given = torch.ops.aefast.nearest_backward.default(
                grad, x, y, index, int(needs[0]) + 2 * int(needs[1])
            )
            gradients = [one if need else None for one, need in zip(given, needs, strict=True)]
        return *gradients, None


_apply = direct_apply(_Nearest)


@torch.library.impl(LIBRARY, "nearest", "Autograd")
def _(x, y, backend):
    if _registry.is_transformed():
        return squared_reference(x, y)
    if _registry.needs_gradient(x, y):
        return _Nearest.apply(x, y, (backend, None))
    with below_autograd():
        return torch.ops.aefast.nearest.default(x, y, backend)


def squared_nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`squared_reference`, on the backend that serves it."""
    backend = _registry.choose("nearest", x, y)
    if backend == "eager":
        return squared_reference(x, y)
    shape = x.shape[:-1]
    if x.dim() != 3:
        batch = math.prod(x.shape[:-2])
        x, y = (one.reshape(batch, *one.shape[-2:]) for one in (x, y))
    if not _registry.is_direct(backend, x, y):
        squared, index = torch.ops.aefast.nearest.default(x, y, backend)
    else:
        launchers = _registry.kernels(backend, "nearest")
        if _registry.needs_gradient(x, y):
            squared, index = _apply(x, y, (backend, launchers))
        else:
            squared, index = launchers.nearest(x, y)
    if len(shape) != 2:
        squared, index = squared.reshape(shape), index.reshape(shape)
    return squared, index


def operands(op: str, x: Any, y: Any, least: int = 0) -> tuple[Tensor, Tensor]:
    """x (*, N, D) and y (*, M, D), checked, N being at least `least`; under autocast in float32."""
    for name, value in (("x", x), ("y", y)):
        _arguments.check_tensor(name, value, op)
        _arguments.check_floating(name, value, op)
        _arguments.check_dense(name, value, op)
        if value.dim() < 2 or value.shape[-1] < 1:
            raise InputError(
                f"{op}: {name} must be (*, points, dimensions) of at least one dimension, "
                f"got shape {_arguments.shape_of(value)}"
            )
        if value.shape[-2] < (least if name == "x" else 1):
            raise InputError(
                f"{op}: {name} must have at least one point, got shape {_arguments.shape_of(value)}"
            )
    x, y = _pairwise.without_autocast(x, y)
    _pairwise.check_dimensions(op, "y", y, "x", x)
    if y.shape[:-2] != x.shape[:-2]:
        raise InputError(
            f"{op}: y must have the leading dimensions of x, {_arguments.shape_of(x)[:-2]}, "
            f"got shape {_arguments.shape_of(y)}"
        )
    return x, y


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean distance of each row of x to the nearest row of y, and which row that is.

    ``distance[i] = min_j ‖x_i - y_j‖``. No matrix of distances exists: memory grows with N + M. Of rows of y at the
    same distance it is the one of the lowest index.

    Differentiable in x and y through the distance, along the row that is nearest; where the distance is 0 the gradient
    is 0. The index has none. x and y are saved, and must not be modified in place before the backward.

    Distances are computed from the differences of coordinates and have no error of cancellation, however far from 0
    the data lie. So are those that decide which row is nearest, but on GPUs above 32 dimensions, except in float64:
    there products of centred rows decide, and of rows whose squared distances differ by no more than float32 rounds at
    the size of ‖x_i - c‖² + ‖y_j - c‖², c being the mean of y, any may be taken. The distance is that of the row taken.

    Args:
        x: (*, N, D), one point a row: float32, bfloat16, float16 or float64, any strides. Half precision is computed
            in float32, and so is everything under autocast.
        y: (*, M, D), M at least 1, of the leading dimensions, dtype and device of x.

    Returns:
        The distances (*, N), in the units of x, in float32, or float64 for float64; and the indices (*, N), int64. With
        NaN in x_i, or anywhere in y, distance i is NaN. Of a distance that is not finite the index is any.

    Raises:
        InputError: a shape, dtype or device is not as above, or, on the CPU in eager mode, x or y is not finite and a
            distance is NaN for it; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, y) and _arguments.are_stand_ins(x, y):
        return _arguments.deferred(nearest, locals())
    x, y = operands("nearest", x, y)
    squared, index = squared_nearest(x, y)
    distance = root(squared)
    _pairwise.check_finite("nearest", distance, x=x, y=y)
    return distance, index


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Clouds over shapes and strides: no batch, no rows, one row, one dimension, primes, more rows and dimensions than
    a tile has, rows of y that are equal, rows of x that are in y, and data far from 0.

    No two different rows of y are nearly as near to a row of x: which of them a rounding error decides."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def even(*shape: int) -> Tensor:
        return torch.randint(-15, 16, shape, generator=generator).mul_(2).to(device, dtype)

    # In half precision too no point lies between two others.
    yield {"x": even(23, 1) + 0.25, "y": even(17, 1)}
    for rows, columns, dimensions in ((31, 17, 2), (37, 41, 3), (150, 131, 16), (67, 29, 67)):
        yield {"x": draw(rows, dimensions), "y": draw(columns, dimensions)}
    yield {"x": draw(1, 3), "y": draw(1, 3)}
    yield {"x": draw(1, 5), "y": draw(300, 5)}
    yield {"x": draw(45, 7), "y": draw(1, 7)}
    yield {"x": draw(0, 3), "y": draw(4, 3)}
    yield {"x": draw(0, 5, 3), "y": draw(0, 4, 3)}
    yield {"x": draw(3, 19, 3), "y": draw(3, 23, 3)}
    yield {"x": draw(2, 3, 5, 40), "y": draw(2, 3, 7, 40)}
    repeated = draw(6, 3)
    yield {"x": torch.cat((draw(5, 3), repeated)), "y": repeated.repeat(4, 1)}
    yield {"x": draw(11, 4).expand(3, 11, 4), "y": draw(3, 9, 4)}
    yield {"x": draw(4, 13, 9).transpose(1, 2), "y": draw(4, 44, 13)[:, ::4]}
    yield {"x": draw(21, 50)[:, ::10] + 8, "y": draw(5, 33).t() + 8}
    yield {"x": draw(9, 257) + 8, "y": draw(1, 257).expand(6, 257) + 8}


def cost(backward: bool, x: Tensor, y: Tensor) -> _registry.Cost:
    """Each operand is read once and each result written once; a pair takes a product. The backward reads the operands
    and indices again and writes both gradients."""
    rows = x.numel() // max(1, x.shape[-1])
    wide = _arguments.accumulator(x.dtype).itemsize
    moved = (x.numel() + y.numel()) * x.element_size() * (1 + 2 * backward)
    results = rows * (wide + 8) * (1 + backward)
    return _registry.Cost(moved + results, 2 * rows * y.shape[-2] * x.shape[-1], 0)


OP = _registry.register(_registry.Op("nearest", nearest, reference, samples, cost))
