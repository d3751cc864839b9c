"""The decoder of a sparse autoencoder, whose code is values and indices; the kernels are those of latents.py."""

from ..activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from .latents import dots, latent_sums, weighted_sum
from .linear_act import on_device, outermost_gradient

__all__ = ["sparse_decode", "sparse_decode_backward"]


def sparse_decode(values, indices, weight, bias):
    """bias + Σ_j values[n, j] weight[indices[n, j]] -> (N, D). values and indices (N, k), weight (F, D), bias (D,) or
    None."""
    with on_device(weight):
        return weighted_sum(values, indices, weight, bias)


def sparse_decode_backward(grad, values, indices, weight, needs):
    """(dvalues | None, dweight | None, dbias | None); needs: the sum of NEED_X, for the values, NEED_WEIGHT and
    NEED_BIAS."""
    with on_device(grad):
        dvalues = dots(grad, indices, weight) if needs & NEED_X else None
        dweight = None
        if needs & NEED_WEIGHT:
            dweight, _ = latent_sums(values, indices, grad, weight.shape[0], False)
        dbias = outermost_gradient(grad, None, "identity", False, True)[1] if needs & NEED_BIAS else None
    return dvalues, dweight, dbias
