"""Losses of a reconstruction, their sum and their gradient, as aefast/ops/reconstruction_loss.py defines them.

Operands are taken in memory order. Programs share the elements in runs of blocks, as many blocks each as leave no more
programs than PROGRAMS; a block's terms are added lane by lane over the run and then as a tree, and one more program
adds up what the others found. So the number of elements and their size alone decide about the order of the sum.
"""

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, accumulator, on_device
from .loss import evaluate
from .rows import sum_columns

__all__ = [
    "reconstruction_loss",
    "reconstruction_loss_backward",
    "reconstruction_loss_elements",
]

BLOCK = 1024  # elements: eight for each of 128 threads, which in half precision are a load of 16 bytes
PROGRAMS = 4096  # thirty for each of a large GPU's multiprocessors
PARTIALS = tl.constexpr(1024)  # that total_kernel adds up at a time


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def loss_block(
    x,
    target,
    gradient,
    start,
    n,
    parameter,
    scale,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of elements from `start` on, 0 beyond n. Arguments as for reconstruction_loss_kernel."""
    offsets = start + tl.arange(0, BLOCK)
    # No mask where none is needed: a mask at an n that 16 does not divide would forbid 16-byte accesses.
    if MASKED:
        inside = offsets < n
        first = widen(tl.load(x + offsets, mask=inside, other=0.0))
        second = widen(tl.load(target + offsets, mask=inside, other=0.0))
    else:
        first, second = widen(tl.load(x + offsets)), widen(tl.load(target + offsets))
    value, slope = evaluate(first, second, parameter, KIND)
    if gradient is not None:
        scaled = (slope * tl.full((), scale, slope.dtype)).to(gradient.dtype.element_ty)
        if MASKED:
            tl.store(gradient + offsets, scaled, mask=inside)
        else:
            tl.store(gradient + offsets, scaled)
    if MASKED:
        value = tl.where(inside, value, 0.0)
    return value


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def reconstruction_loss_kernel(
    x,  # (n,), the input
    target,  # (n,)
    gradient,  # (n,), or None
    partials,  # (programs,) fp32, fp64 for fp64: sums
    n,
    steps,  # blocks of a program
    parameter: tl.float64,
    scale: tl.float64,  # of the gradient
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64-bit: any offset may exceed 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    first = program * steps * BLOCK
    last = tl.minimum(first + tl.cast(steps, tl.int64) * BLOCK, n)
    whole = first + (last - first) // BLOCK * BLOCK
    total = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for start in range(first, whole, BLOCK):
        total += loss_block(x, target, gradient, start, n, parameter, scale, KIND, False, BLOCK)
    if whole < last:
        total += loss_block(x, target, gradient, whole, n, parameter, scale, KIND, True, BLOCK)
    tl.store(partials + program + tl.arange(0, 1), sum_columns(tl.reshape(total, (1, BLOCK)), 1, BLOCK))


@triton.jit
def total_kernel(
    partials,  # (count,)
    value,  # scalar
    count,
    normalizer: tl.float64,
    ROOT: tl.constexpr,  # whether to take the root
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), value.dtype.element_ty)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials + offsets, mask=offsets < count, other=0.0)
    result = sum_columns(tl.reshape(total, (1, BLOCK)), 1, BLOCK) * tl.full((), normalizer, total.dtype)
    if ROOT:
        result = tl.sqrt(result)
    tl.store(value + tl.arange(0, 1), result)


@triton.jit
def reconstruction_loss_elements_kernel(
    grad,  # (n,) or with SCALAR a scalar, fp32, fp64 for fp64; None: the losses themselves
    x,  # (n,)
    target,  # (n,)
    out,  # (n,): the losses, of grad's type, or their gradient
    n,
    parameter: tl.float64,
    normalizer: tl.float64,
    SCALAR: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        first, second = widen(tl.load(x + offsets)), widen(tl.load(target + offsets))
        result, slope = evaluate(first, second, parameter, KIND)
        if grad is not None:
            factor = tl.full((), normalizer, slope.dtype)
            result = slope * (tl.load(grad if SCALAR else grad + offsets) * factor)
        tl.store(out + offsets, result.to(out.dtype.element_ty))
    else:
        inside = offsets < n
        first = widen(tl.load(x + offsets, mask=inside, other=0.0))
        second = widen(tl.load(target + offsets, mask=inside, other=0.0))
        result, slope = evaluate(first, second, parameter, KIND)
        if grad is not None:
            factor = tl.full((), normalizer, slope.dtype)
            upstream = tl.load(grad) if SCALAR else tl.load(grad + offsets, mask=inside, other=0.0)
            result = slope * (upstream * factor)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------


def shares(count, itemsize):
    """(elements of a block, blocks of a program, programs) for so many elements of that size."""
    block = block_of(itemsize)
    blocks = triton.cdiv(count, block)
    steps = max(1, triton.cdiv(blocks, PROGRAMS))
    return block, steps, triton.cdiv(blocks, steps)


def block_of(itemsize):
    return min(BLOCK, 4 * BLOCK // itemsize)


def reconstruction_loss(input, target, kind, parameter, normalizer, root, scale, with_gradient, checked):
    """(normalizer * Σ losses or its root, scale * the derivative by input or nothing). Operands in one layout without
    gaps. `checked` is for where the host waits anyway, and nothing here."""
    n = input.numel()
    block, steps, programs = shares(n, input.itemsize)
    wide = accumulator(input.dtype)
    value = torch.empty((), dtype=wide, device=input.device)
    gradient = torch.empty_like(input) if with_gradient else None
    with on_device(input):
        partials = torch.empty(programs, dtype=wide, device=input.device)
        if n > 0:
            reconstruction_loss_kernel[(programs,)](
                input,
                target,
                gradient,
                partials,
                n,
                steps,
                parameter,
                scale,
                KIND=kind,
                BLOCK=block,
                num_warps=4,
                **COMPILE,
            )
        total_kernel[(1,)](
            partials, value, programs, normalizer, ROOT=root, BLOCK=PARTIALS.value, num_warps=4, **COMPILE
        )
    return value, input.new_empty(0) if gradient is None else gradient


def elements(grad, input, target, out, kind, parameter, normalizer):
    if input.numel() == 0:
        return out
    block = block_of(input.itemsize)
    with on_device(input):
        reconstruction_loss_elements_kernel[(triton.cdiv(input.numel(), block),)](
            grad,
            input,
            target,
            out,
            input.numel(),
            parameter,
            normalizer,
            SCALAR=grad is not None and grad.dim() == 0,
            KIND=kind,
            BLOCK=block,
            num_warps=4,
            **COMPILE,
        )
    return out


def reconstruction_loss_elements(input, target, kind, parameter, checked):
    """The losses, in the accumulator and in input's layout."""
    out = torch.empty_like(input, dtype=accumulator(input.dtype))
    return elements(None, input, target, out, kind, parameter, 1.0)


def reconstruction_loss_backward(grad, input, target, kind, parameter, normalizer):
    """normalizer * grad * the derivative by input, for grad a scalar or of input's layout, in the accumulator."""
    return elements(grad, input, target, torch.empty_like(input), kind, parameter, normalizer)
