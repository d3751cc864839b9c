"""`reparameterize` with its KL divergence beside the textbook's lines, over batch and latent sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes, training_inputs
from aefast.ops import _philox

# (batch, latent size): the latents of the usual models, and one that no cache holds.
SHAPES = ((256, 16), (4096, 16), (65536, 16), (4096, 64), (8192, 256), (1024, 1023))
QUICK_SHAPES = ((256, 16), (8192, 256))
COMPILED = ((256, 16), (8192, 256))
SEED = 11


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, size in QUICK_SHAPES if quick else SHAPES:
            yield case(batch, size, dtype, device, not quick and (batch, size) in COMPILED)


def case(
    batch: int, size: int, dtype: torch.dtype, device: torch.device, is_compiled: bool = False
) -> OpCase:
    def aefast(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return AF.reparameterize(mu, logvar)

    def eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return textbook(mu, logvar, torch.randn_like(mu))

    def given_noise() -> tuple[Callable[..., Any], Callable[..., Any]]:
        noise = _philox.normals(torch.tensor(SEED, device=device), torch.Size((batch, size)), torch.float64)

        def given_aefast(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
            return AF.reparameterize(mu, logvar, seed=SEED)

        def given_eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
            return textbook(mu, logvar, noise.to(mu.dtype))

        return given_aefast, given_eager

    return OpCase(
        "reparameterize",
        "",
        f"b{batch}-d{size}",
        {"batch": batch, "features": size},
        dtype,
        device,
        make=lambda: training_inputs(device, dtype, (batch, size), (batch, size), scales=(1.0, 0.5)),
        aefast=aefast,
        eager=eager,
        arguments=lambda mu, logvar: {"mu": mu, "logvar": logvar},
        given_noise=given_noise,
        is_compiled=is_compiled,
    )


def textbook(mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A sample and the divergence's mean over the batch, as Kingma and Welling's appendix has it; sums in float32."""
    z = mu + torch.exp(0.5 * logvar) * noise
    wide_mu, wide_logvar = (mu, logvar) if mu.dtype == torch.float64 else (mu.float(), logvar.float())
    kl = -0.5 * torch.sum(1 + wide_logvar - wide_mu.pow(2) - wide_logvar.exp(), dim=1)
    return z, kl.mean()
