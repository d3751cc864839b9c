"""The encoder of a TopK sparse autoencoder: cuBLAS's products and the largest of each row, for some rows at a time."""

import torch

from ..activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from .latents import latent_sums, weighted_sum
from .linear_act import on_device
from .selection import select

__all__ = ["topk_encode", "topk_encode_backward"]

# Of the pre-activations that there are at once, and their least rows: the selection has a thread block for each, of
# which a large GPU runs some 800 at a time.
BYTES, ROWS = 1 << 27, 1024


def topk_encode(x, weight, bias, k):
    """The k largest of each row of x @ weight.T + bias -> values and indices (N, k). x (N, D), weight (F, D), bias (F,)
    or None."""
    N = x.shape[0]
    with on_device(x):
        values = torch.empty((N, k), dtype=x.dtype, device=x.device)
        indices = torch.empty((N, k), dtype=torch.int64, device=x.device)
        rows = max(ROWS, BYTES // (weight.shape[0] * x.itemsize))
        for first in range(0, N, rows):
            pre = torch.nn.functional.linear(x[first : first + rows], weight, bias)
            select(pre, values[first : first + rows], indices[first : first + rows])
    return values, indices


def topk_encode_backward(grad, indices, x, weight, needs):
    """(dx | None, dweight | None, dbias | None); needs: the sum of NEED_X, NEED_WEIGHT and NEED_BIAS."""
    dx, dweight, dbias = None, None, None
    with on_device(grad):
        if needs & NEED_X:
            dx = weighted_sum(grad, indices, weight, None)
        if needs & (NEED_WEIGHT | NEED_BIAS):
            # Of the bias alone there are no rows to sum.
            rows = x if needs & NEED_WEIGHT else x[:, :0]
            dweight, dbias = latent_sums(grad, indices, rows, weight.shape[0], bool(needs & NEED_BIAS))
    return dx, dweight if needs & NEED_WEIGHT else None, dbias
