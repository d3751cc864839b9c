"""The decoder of a sparse autoencoder."""

from __future__ import annotations

import torch
from torch import nn

import aefast.functional as AF
from aefast.nn.linear_act import check_positive_int


class SparseDecoder(nn.Module):
    """``bias + Σ_f h_f weight[f]`` of codes h that are mostly zero: `aefast.functional.sparse_decode`.

    Rows of the weight are drawn at random with length 1; the bias is 0.

    Args:
        latents: how many directions there are.
        out_features: size of a direction.
        bias: whether the layer adds a learnt bias.

    Shape:
        values and indices (\\*, k), or a dense code (\\*, latents); the result (\\*, out_features).

    Attributes:
        weight: (latents, out_features): row f is the direction of latent f.
        bias: (out_features,), or None.

    Raises:
        InputError: a size that is not a positive integer.
    """

    def __init__(
        self,
        latents: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int(latents, "latents")
        check_positive_int(out_features, "out_features")
        self.weight = nn.Parameter(torch.empty(latents, out_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions of length 1, and set the bias to 0."""
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, values: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Of a sparse code, or without indices of a dense one."""
        if indices is None:
            return AF.linear_act(values, self.weight.t(), self.bias, "identity")
        return AF.sparse_decode(values, indices, self.weight, self.bias)

    def extra_repr(self) -> str:
        latents, out_features = self.weight.shape
        return f"latents={latents}, out_features={out_features}, bias={self.bias is not None}"
