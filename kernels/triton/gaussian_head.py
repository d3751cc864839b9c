"""A dense layer to [mu | logvar], a sample of it and its divergence: linear_act.py's products and reparameterize.py's
kernels. In the backward one kernel writes the gradient of both halves side by side, where the products read it."""

import torch

from ..activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from . import reparameterize
from .linear_act import compatible, linear_act, linear_act_backward, on_device

__all__ = ["compatible", "gaussian_head", "gaussian_head_backward"]


def gaussian_head(h, weight, bias, seed, low, high):
    """h (M, K), weight (2 D, K), bias (2 D,) or None, seed an int64 scalar -> z (M, D), the divergence of each row
    (M,), and [mu | logvar] (M, 2 D)."""
    moments, _ = linear_act(h, weight, bias, "identity", False)
    z, kl = reparameterize.reparameterize(*moments.chunk(2, 1), seed, low, high)
    return z, kl, moments


def gaussian_head_backward(grad_z, grad_kl, grad_moments, h, weight, moments, seed, low, high, needs):
    """(dh | None, dweight | None, dbias | None). Of the gradients that arrive, of any strides, each may be None."""
    if not needs & (NEED_X | NEED_WEIGHT | NEED_BIAS):
        return None, None, None
    grad = grad_moments
    if grad_z is not None or grad_kl is not None:
        grad = torch.empty_like(moments)
        with on_device(h):
            reparameterize.backward(
                grad_z, grad_kl, halves(grad_moments), *moments.chunk(2, 1), seed, low, high, halves(grad)
            )
    return linear_act_backward(grad, h, weight, None, "identity", needs)


def halves(t):
    """(M, 2 D) -> (2, M, D), its left half and its right."""
    return None if t is None else t.unflatten(1, (2, -1)).movedim(1, 0)
