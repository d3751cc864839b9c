"""A stack of dense layers. The kernels are linear_act.py's; what is fused across layers is the backward:

    g_l = (g_{l+1} @ W_{l+1}) * act'_l   one GEMM, act' in its epilogue
    dbias_l = g_l.sum(0)                 sums over 64 rows from the same epilogue, then column_sum_kernel

so that no layer but the last reads or writes a gradient outside a GEMM.
"""

import torch

from ..activation import STORES_DERIVATIVE
from .linear_act import (
    apply_derivative,
    forward,
    gemm,
    new_partials,
    on_device,
    outermost_gradient,
    plan,
    product,
    sum_partials,
)

__all__ = ["mlp", "mlp_backward"]


def inner_gradient(g, weight, saved, activation, need_bias):
    """(g @ weight) * act' of the layer below, and the column sums of that.

    g (M, N), weight (N, K). saved (M, K): act' for STORES_DERIVATIVE, else the output of the layer below;
    unused for identity.
    """
    M, K = g.shape[0], weight.shape[1]
    below = torch.empty((M, K), dtype=g.dtype, device=g.device)
    if below.numel() == 0:
        return below, torch.zeros(K, dtype=g.dtype, device=g.device) if need_bias else None
    partials = new_partials(M, K, g) if need_bias else None
    saved = None if activation == "identity" else saved.contiguous()
    chosen = plan("dgrad_act", g, weight)
    if chosen.fused:
        gemm(
            g,
            weight,
            below,
            chosen,
            saved=saved,
            partials=partials,
            activation=activation,
        )
    else:
        torch.mm(g, weight, out=below)
        if saved is not None or partials is not None:
            apply_derivative(below, saved, None if saved is None else below, partials, activation)
    return below, sum_partials(partials, g.dtype) if need_bias else None


def mlp(x, weights, biases, activations, save):
    """x (M, K) through all layers: their outputs, then the derivatives stored; without save the last output."""
    outputs, derivatives = [], []
    with on_device(x):
        for weight, bias, activation in zip(weights, biases, activations.split(","), strict=True):
            x, derivative = forward(x, weight, bias, activation, save)
            outputs.append(x)
            derivatives.append(derivative)
    if not save:
        return outputs[-1:]
    return outputs + [derivative for derivative in derivatives if derivative is not None]


def mlp_backward(grad, x, weights, saved, activations, needs):
    """The gradients needed, of x, weights and biases. Ends at the lowest layer that anything needs."""
    layers, activations = len(weights), activations.split(",")
    need_x, *rest = (need == "1" for need in needs)
    need_weights, need_biases = rest[:layers], rest[layers:]
    outputs, stored = saved[:layers], iter(saved[layers:])
    # What the activation's derivative is computed from.
    values = [
        next(stored) if activation in STORES_DERIVATIVE else output
        for activation, output in zip(activations, outputs, strict=True)
    ]
    dweights, dbiases = [None] * layers, [None] * layers
    needed = [i for i in range(layers) if need_x or need_weights[i] or need_biases[i]]
    lowest = min(needed, default=layers)
    if lowest == layers:
        return []

    with on_device(grad):
        top = layers - 1
        need_g = need_x or lowest < top or need_weights[top]
        g, dbiases[top] = outermost_gradient(grad, values[top], activations[top], need_g, need_biases[top])
        for layer in range(top, lowest - 1, -1):
            if need_weights[layer]:
                dweights[layer] = product("wgrad", g.t(), outputs[layer - 1] if layer else x)
            if layer > lowest:
                below = layer - 1
                g, dbiases[below] = inner_gradient(
                    g,
                    weights[layer],
                    values[below],
                    activations[below],
                    need_biases[below],
                )
        dx = product("dgrad", g, weights[0]) if need_x else None
    return [gradient for gradient in (dx, *dweights, *dbiases) if gradient is not None]
