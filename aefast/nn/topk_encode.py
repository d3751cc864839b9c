"""The encoder of a TopK sparse autoencoder."""

from __future__ import annotations

import torch

import aefast.functional as AF
from aefast.errors import InputError
from aefast.nn.linear_act import DenseParameters, check_positive_int


class TopKEncoder(DenseParameters):
    """The k largest of ``x @ weight.T + bias``: `aefast.functional.topk_encode`, or `batch_topk_encode`.

    Initialisation and state dict (``weight``, ``bias``) are those of `torch.nn.Linear`.

    Args:
        in_features: size of the last dimension of the input.
        latents: how many there are to choose from.
        k: how many are chosen of a sample, or with `of_batch` on average of a batch.
        bias: whether the layer adds a learnt bias.
        of_batch: whether the largest of a whole batch are chosen.

    Shape:
        input (\\*, in_features); values and indices (\\*, k), with `of_batch` as many columns as the fullest row has.

    Raises:
        InputError: k is more than latents, or a size is not a positive integer or does not fit into memory.
    """

    def __init__(
        self,
        in_features: int,
        latents: int,
        k: int,
        bias: bool = True,
        *,
        of_batch: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int(in_features, "in_features")
        check_positive_int(latents, "latents")
        if check_positive_int(k, "k") > latents:
            raise InputError(f"k={k!r}: expected at most latents, {latents}")
        super().__init__(
            in_features, latents, bias, f"in_features={in_features}, latents={latents}", device, dtype
        )
        self.k = k
        self.of_batch = of_batch

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encode = AF.batch_topk_encode if self.of_batch else AF.topk_encode
        return encode(x, self.weight, self.bias, k=self.k)

    def extra_repr(self) -> str:
        latents, in_features = self.weight.shape
        return (
            f"in_features={in_features}, latents={latents}, k={self.k}, bias={self.bias is not None}, "
            f"of_batch={self.of_batch}"
        )
