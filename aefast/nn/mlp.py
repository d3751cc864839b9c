"""A whole dense stack in one op."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.nn._hooks import OF_ALL_MODULES
from aefast.nn.linear_act import LinearAct, check_positive_int, eager_activation
from aefast.ops import _arguments


class MLP(nn.Module):
    """Dense layers with activations between them, evaluated as one op.

    Layer i is the child named ``str(2 * i)``: the numbers that ``nn.Sequential(nn.Linear, activation,
    nn.Linear, activation, …)`` gives its linear layers. The state dict (``0.weight``, ``0.bias``,
    ``2.weight``, …) therefore loads from that twin and into it. The children hold the parameters. The
    forward pass evaluates all of them in one op and calls them in turn, more slowly, only when one was replaced
    or there are hooks to call.

    Args:
        features: sizes from the input to the output, at least two of them.
        activation: activation of all layers but the last.
        output_activation: activation of the last layer.
        bias: whether the layers add learnt biases.
        negative_slope: slope of leaky_relu below 0.
        alpha: scale of elu below 0.

    Shape:
        input (\\*, features[0]), output (\\*, features[-1]).

    Raises:
        InputError: fewer than two sizes, a size that is not a positive integer, an unknown activation, or a
            negative_slope or alpha that is negative or not finite.
    """

    def __init__(
        self,
        features: Sequence[int],
        activation: str = "relu",
        output_activation: str = "identity",
        *,
        bias: bool = True,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(features, (str, bytes)) or not isinstance(features, Sequence) or len(features) < 2:
            raise InputError(f"features={features!r}: expected a sequence of at least two layer sizes")
        self.features = tuple(
            check_positive_int(size, f"features[{index}]") for index, size in enumerate(features)
        )
        _arguments.check_activation("activation", activation, "MLP")
        _arguments.check_activation("output_activation", output_activation, "MLP")
        _arguments.check_activation_parameters(negative_slope, alpha, "MLP")
        self.negative_slope = float(negative_slope)
        self.alpha = float(alpha)
        layers = len(self.features) - 1
        self.activations = (activation,) * (layers - 1) + (output_activation,)
        for index, (fan_in, fan_out) in enumerate(pairwise(self.features)):
            layer = LinearAct(
                fan_in,
                fan_out,
                bias,
                self.activations[index],
                negative_slope=negative_slope,
                alpha=alpha,
                device=device,
                dtype=dtype,
            )
            self.add_module(str(2 * index), layer)

    @property
    def layers(self) -> tuple[LinearAct, ...]:
        """The layers from the input to the output."""
        return tuple(self._modules.values())

    def _is_plain(self) -> bool:
        """Whether the children do nothing but what one op over their parameters does.

        Parametrizations change a child's class; pruning, spectral norm and observers hang hooks on it.
        """
        layers = self._modules.values()
        if len(layers) != len(self.activations) or any(OF_ALL_MODULES):
            return False
        for layer, activation in zip(layers, self.activations, strict=True):
            if (
                type(layer) is not LinearAct
                or "forward" in vars(layer)
                or layer._forward_pre_hooks
                or layer._forward_hooks
                or layer._backward_pre_hooks
                or layer._backward_hooks
                or layer.activation != activation
                or layer.negative_slope != self.negative_slope
                or layer.alpha != self.alpha
            ):
                return False
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = self._modules.values()
        if not self._is_plain():
            for layer in layers:
                x = layer(x)
            return x
        return AF.mlp(
            x,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            self.activations,
            negative_slope=self.negative_slope,
            alpha=self.alpha,
        )

    def reconstruction_loss(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        kind: str = "mse",
        *,
        p: float | None = None,
        eps: float = 1e-3,
        delta: float = 1.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> torch.Tensor:
        """`aefast.functional.reconstruction_loss` of the output for x, which never exists as a whole.

        The last layer and the loss are one op, `aefast.functional.linear_reconstruction_loss`, unless a layer was
        replaced or carries hooks.

        Args:
            x: (\\*, features[0]).
            target: (\\*, features[-1]), what the output is compared with.
            kind, p, eps, delta: the loss.
            reduction: "mean", "sum" or "batchmean".
            loss_weight: what the result is multiplied by.
        """
        options = {"p": p, "eps": eps, "delta": delta, "reduction": reduction, "loss_weight": loss_weight}
        if not self._is_plain():
            return AF.reconstruction_loss(self(x), target, kind, **options)
        *hidden, last = self._modules.values()
        parameters = {"negative_slope": self.negative_slope, "alpha": self.alpha}
        if hidden:
            x = AF.mlp(
                x,
                [layer.weight for layer in hidden],
                [layer.bias for layer in hidden],
                self.activations[:-1],
                **parameters,
            )
        return AF.linear_reconstruction_loss(
            *(x, last.weight, last.bias, target, kind),
            output_activation=self.activations[-1],
            **options,
            **parameters,
        )

    def eager(self) -> nn.Sequential:
        """The same stack in plain PyTorch, with copies of the parameters and the same state dict keys.

        An output activation of "identity" adds no module.
        """
        modules: list[nn.Module] = []
        for layer, activation in zip(self.layers, self.activations, strict=True):
            modules.append(layer.eager_linear())
            modules.append(eager_activation(activation, negative_slope=self.negative_slope, alpha=self.alpha))
        if self.activations[-1] == "identity":
            modules.pop()
        return nn.Sequential(*modules).train(self.training)
