"""The gradient that a loss kept in its forward, times the gradient of the loss and the normaliser it lacks."""

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, on_device, power_of_two
from .rows import unit_of

__all__ = ["loss_gradient"]

BLOCK_BYTES = 4096  # of a program: two loads of 16 bytes for each of 128 threads


@triton.jit
def loss_gradient_kernel(
    gradient,  # (samples, n), the samples one after another in memory
    grad,  # (samples,), of stride_grad, fp32, fp64 for fp64; with SINGLE a scalar
    out,  # like gradient
    blocks,  # of a sample
    n,  # in units
    stride_grad,
    normalizer: tl.float64,
    SINGLE: tl.constexpr,  # whether there is one sample
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64-bit: any offset may exceed 2^31 elements.
    n = tl.cast(n, tl.int64) * UNIT
    program = tl.program_id(0)
    if SINGLE:
        start = program.to(tl.int64) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        at = offsets
    else:
        sample = (program // blocks).to(tl.int64)
        grad += sample * stride_grad
        start = (program % blocks).to(tl.int64) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        at = sample * n + offsets
    factor = (tl.load(grad).to(tl.float64) * normalizer).to(grad.dtype.element_ty)
    if start + BLOCK <= n:
        # No mask: a mask at an n that 16 does not divide would forbid 16-byte accesses.
        value = widen(tl.load(gradient + at)) * factor
        tl.store(out + at, value.to(out.dtype.element_ty))
    else:
        value = widen(tl.load(gradient + at, mask=offsets < n, other=0.0)) * factor
        tl.store(out + at, value.to(out.dtype.element_ty), mask=offsets < n)


def shares(n, itemsize, samples):
    """(elements of a block, unit of n) for samples of n elements."""
    block = BLOCK_BYTES // itemsize
    if samples == 1:
        return block, 1
    # All samples begin where the first does, modulo 16 bytes.
    return power_of_two(n, 32, block), unit_of(itemsize, n)


def loss_gradient(gradient, grad, normalizer):
    """gradient dense, in whatever order of its dimensions; grad a scalar, or (B,) for a gradient (B, ...) with the
    first dimension outermost. The result is gradient * (grad * normalizer), in the layout of gradient."""
    out = torch.empty_like(gradient)
    if gradient.numel() == 0:
        return out
    samples = grad.numel()
    n = gradient.numel() // samples
    block, unit = shares(n, gradient.itemsize, samples)
    blocks = triton.cdiv(n, block)
    with on_device(gradient):
        loss_gradient_kernel[(samples * blocks,)](
            gradient,
            grad,
            out,
            blocks,
            n // unit,
            grad.stride(0) if grad.dim() else 0,
            normalizer,
            SINGLE=samples == 1,
            UNIT=unit,
            BLOCK=block,
            num_warps=4,
            **COMPILE,
        )
    return out
