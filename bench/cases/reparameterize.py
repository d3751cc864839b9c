"""`reparameterize` with its KL divergence beside code in PyTorch of few passes, over batch and latent sizes."""

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
        return in_few_passes(mu, logvar, torch.randn_like(mu))

    def given_noise() -> tuple[Callable[..., Any], Callable[..., Any]]:
        noise = _philox.normals(torch.tensor(SEED, device=device), torch.Size((batch, size)), torch.float64)

        def given_aefast(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
            return AF.reparameterize(mu, logvar, seed=SEED)

        def given_eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
            return in_few_passes(mu, logvar, noise.to(mu.dtype))

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


def in_few_passes(mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A sample, and the divergence's mean over the batch, whose sums are in float32."""
    wide_mu, wide_logvar = widened(mu, logvar)
    std = torch.exp(0.5 * wide_logvar)
    z = torch.addcmul(mu, std.to(mu.dtype), noise)
    return z, divergence(wide_mu, std.square().sum(), wide_logvar)


def widened(*tensors: Tensor) -> list[Tensor]:
    return [one if one.dtype == torch.float64 else one.float() for one in tensors]


def divergence(mu: Tensor, variances: Tensor, logvar: Tensor) -> Tensor:
    """``-½ Σ (1 + logvar - mu² - exp(logvar))``, averaged over the batch, of which `variances` is Σ exp(logvar)."""
    # A dot product would be one running sum, and lose digits.
    return (mu.square().sum() + variances - logvar.sum() - mu.numel()) * (0.5 / len(mu))
