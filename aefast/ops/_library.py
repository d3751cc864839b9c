"""The torch.library namespace ``aefast`` and what its ops share."""

import torch

LIBRARY = torch.library.Library("aefast", "DEF")


def define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


below_autograd = torch._C._AutoDispatchBelowAutograd


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    """Kernels take matrices of any strides, but vectors without gaps."""
    return None if vector is None else vector.contiguous()
