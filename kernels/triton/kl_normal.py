"""The KL divergence of normal distributions with diagonal covariance to N(0, I): reparameterize.py without a sample."""

import math

import torch

from .linear_act import on_device
from .reparameterize import backward, forward

__all__ = ["kl_normal", "kl_normal_backward"]


def kl_normal(mu, logvar):
    """mu and logvar (B, D) of any strides -> the divergence of each row (B,)."""
    with on_device(mu):
        return forward(mu, logvar, None, -math.inf, math.inf)[1]


def kl_normal_backward(grad, mu, logvar):
    """The gradients of mu and logvar for grad (B,) of any stride."""
    with on_device(mu):
        gradients = torch.empty((2, *mu.shape), dtype=mu.dtype, device=mu.device)
        backward(None, grad, None, mu, logvar, None, -math.inf, math.inf, gradients)
    return gradients[0], gradients[1]
