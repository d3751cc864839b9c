"""A dense layer and its activation in one op."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.activation import ACTIVATIONS
from aefast.ops import _arguments

# What a 32-bit index holds: kernels count in it, and no layer of such a width fits into memory.
_LARGEST_INT = 2**31 - 1


def check_activation(name: object, argument: str = "activation") -> str:
    """Return `name` if it is one of `ACTIVATIONS`; raise `InputError` naming `argument` otherwise."""
    if isinstance(name, str) and name in ACTIVATIONS:
        return name
    hint = _arguments.did_you_mean(name, ACTIVATIONS)
    raise InputError(f"{argument}={name!r}: expected one of {', '.join(ACTIVATIONS)}{hint}")


def check_positive_int(value: object, argument: str) -> int:
    """Return `value` if it is an int from 1 to 2**31 - 1; raise `InputError` naming `argument` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{argument}={value!r}: expected a positive integer")
    if value > _LARGEST_INT:
        raise InputError(f"{argument}={value!r}: expected a positive integer of at most {_LARGEST_INT:,}")
    return value


def eager_activation(name: str, *, negative_slope: float = 0.01, alpha: float = 1.0) -> nn.Module:
    """The plain PyTorch module of the activation called `name`."""
    make = {
        "identity": nn.Identity,
        "relu": nn.ReLU,
        "leaky_relu": lambda: nn.LeakyReLU(negative_slope),
        "elu": lambda: nn.ELU(alpha),
        "selu": nn.SELU,
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "softplus": nn.Softplus,
    }
    return make[check_activation(name)]()


class DenseParameters(nn.Module):
    """The weight (rows, in_features) and bias (rows,) of a dense layer, initialised as `torch.nn.Linear` does.

    Args:
        in_features: columns of the weight.
        rows: rows of the weight.
        bias: whether there is a bias.
        sizes: what an error calls the sizes, as the caller's own arguments.
    """

    def __init__(
        self,
        in_features: int,
        rows: int,
        bias: bool,
        sizes: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        try:
            self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
            if bias:
                self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
            else:
                self.register_parameter("bias", None)
        except RuntimeError as error:
            # torch has a type of its own for this on GPUs only.
            if not re.search("memory|Storage size", str(error)):
                raise
            raise InputError(f"{sizes}: a layer of this size does not fit into memory") from error
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(−1/√in_features, 1/√in_features), in the order `nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def eager_linear(self) -> nn.Linear:
        """A `torch.nn.Linear` holding copies of this layer's weight and bias."""
        return self._copied_into(nn.Linear)

    def _copied_into(self, linear_class: type[nn.Linear]) -> nn.Linear:
        linear = nn.utils.skip_init(
            linear_class,
            self.in_features,
            self.weight.shape[0],
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        # Not by the state dict, which has other keys where they are parametrized.
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)


class LinearAct(DenseParameters):
    """``activation(x @ weight.T + bias)`` in one op: `torch.nn.Linear` followed by an activation.

    Initialisation and state dict (``weight``, ``bias``) are those of `torch.nn.Linear`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether the layer adds a learnt bias.
        activation: one of `aefast.kernels.activation.ACTIVATIONS`.
        negative_slope: slope of leaky_relu below 0; the other activations ignore it.
        alpha: scale of elu below 0; the other activations ignore it.

    Shape:
        input (\\*, in_features), output (\\*, out_features).

    Attributes:
        weight: (out_features, in_features).
        bias: (out_features,), or None.

    Raises:
        InputError: an unknown activation, a negative_slope or alpha that is negative or not finite, or a size
            that is not a positive integer or does not fit into memory.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "relu",
        *,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int(in_features, "in_features")
        check_positive_int(out_features, "out_features")
        _arguments.check_activation("activation", activation, "LinearAct")
        _arguments.check_activation_parameters(negative_slope, alpha, "LinearAct")
        sizes = f"in_features={in_features}, out_features={out_features}"
        super().__init__(in_features, out_features, bias, sizes, device, dtype)
        self.out_features = out_features
        self.activation = activation
        self.negative_slope = float(negative_slope)
        self.alpha = float(alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return AF.linear_act(
            x,
            self.weight,
            self.bias,
            self.activation,
            negative_slope=self.negative_slope,
            alpha=self.alpha,
        )

    def eager(self) -> nn.Sequential:
        """The layer in plain PyTorch, as ``nn.Sequential(nn.Linear, activation)``, with copied values."""
        activation = eager_activation(self.activation, negative_slope=self.negative_slope, alpha=self.alpha)
        return nn.Sequential(self.eager_linear(), activation)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope:g}"
        if self.activation == "elu":
            text += f", alpha={self.alpha:g}"
        return text
