"""The squared maximum mean discrepancy of two samples as a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.nn.linear_act import check_positive_int
from aefast.ops import _arguments, _pairwise, _registry
from aefast.ops._pairwise import WAE_SCALES


class MMDLoss(nn.Module):
    """``factor * MMD²(x, y)``: `aefast.functional.mmd`, which has the kernels' formulas.

    The class methods make the losses of public code, with its kernels, widths, estimator and factor.

    Args:
        kernel: "rbf", "laplacian", "imq", "rational_quadratic" or "energy".
        bandwidth: a number above 0 in the units of x, several for the sum of their kernels, or None for multiples of
            what the data say.
        estimator: "unbiased" or "biased".
        alpha: of rational_quadratic.
        group: a torch.distributed process group for the MMD of all its ranks' rows; may be set at any time.
        factor: what the MMD is multiplied by.

    Shape:
        x (N, D) and y (M, D), one point a row; the loss is a scalar.

    Raises:
        InputError: an unknown kernel or estimator, or a number out of its range.
    """

    def __init__(
        self,
        kernel: str = "rbf",
        bandwidth: float | Sequence[float] | None = None,
        estimator: str = "unbiased",
        alpha: float = 1.0,
        group: Any = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        _pairwise.kernel_of("MMDLoss", kernel, bandwidth, alpha)
        _pairwise.check_estimator("MMDLoss", estimator)
        _arguments.check_number("factor", factor, "MMDLoss")
        self.kernel = kernel
        self.bandwidth = tuple(bandwidth) if isinstance(bandwidth, Sequence) else bandwidth
        self.estimator = estimator
        self.alpha = alpha
        self.group = group
        self.factor = factor

    @classmethod
    def wae(
        cls, latent: int, *, sigma: float = 1.0, scales: Sequence[float] = WAE_SCALES, group: Any = None
    ) -> MMDLoss:
        """The penalty of Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018, section 4.

        Unbiased, with kernels C / (C + u), C = 2 latent sigma² s for each of the scales s.

        Args:
            latent: D, the size of the codes.
            sigma: standard deviation of the prior N(0, sigma² I).
            scales: s.
            group: as in `MMDLoss`.
        """
        return cls("imq", bandwidth=_prior_bandwidths("wae", latent, "sigma", sigma, scales), group=group)

    @classmethod
    def pythae(
        cls,
        latent: int,
        kernel: str = "imq",
        *,
        kernel_bandwidth: float = 1.0,
        scales: Sequence[float] | None = WAE_SCALES,
        group: Any = None,
    ) -> MMDLoss:
        """The MMD of WAE_MMD and INFOVAE_MMD in pythae 0.1.2, whose options have these names and defaults.

        Unbiased. With C = 2 latent kernel_bandwidth², "rbf" is exp(-u / C), and "imq" is s C / (s C + u) summed over
        the scales s.

        Args:
            latent: D, the size of the codes; its latent_dim.
            kernel: "imq" or "rbf"; its kernel_choice.
            kernel_bandwidth: the prior's standard deviation.
            scales: s; None for 1 alone. rbf has none.
            group: as in `MMDLoss`.
        """
        if kernel not in ("imq", "rbf"):
            raise InputError(f"MMDLoss.pythae: kernel must be imq or rbf, got {kernel!r}")
        # exp(-u / C) has 2 b² = C, C / (C + u) has b² = C.
        scales = (0.5,) if kernel == "rbf" else (1.0,) if scales is None else scales
        bandwidth = _prior_bandwidths("pythae", latent, "kernel_bandwidth", kernel_bandwidth, scales)
        return cls(kernel, bandwidth=bandwidth, group=group)

    @classmethod
    def infovae(cls, latent: int, *, group: Any = None) -> MMDLoss:
        """The MMD in the code of Zhao, Song, Ermon, InfoVAE (arXiv:1706.02262), and in what was made from it.

        Biased, with the kernel exp(-u / latent²).

        Args:
            latent: D, the size of the codes.
            group: as in `MMDLoss`.
        """
        check_positive_int(latent, "latent")
        return cls("rbf", bandwidth=latent / math.sqrt(2.0), estimator="biased", group=group)

    @classmethod
    def geomloss(cls, loss: str = "gaussian", *, blur: float = 0.05, group: Any = None) -> MMDLoss:
        """What ``geomloss.SamplesLoss(loss, blur=blur)`` computes of samples of equal weights.

        Half of the biased MMD², with the kernel exp(-u / (2 blur²)), exp(-√u / blur) or -√u.

        Args:
            loss: "gaussian", "laplacian" or "energy".
            blur: the kernel's width; energy has none.
            group: as in `MMDLoss`.
        """
        kernels = {"gaussian": "rbf", "laplacian": "laplacian", "energy": "energy"}
        if not isinstance(loss, str) or loss not in kernels:
            raise InputError(f"MMDLoss.geomloss: loss must be one of {', '.join(kernels)}, got {loss!r}")
        return cls(kernels[loss], bandwidth=blur, estimator="biased", group=group, factor=0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = AF.mmd(
            x,
            y,
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            estimator=self.estimator,
            alpha=self.alpha,
            group=self.group,
        )
        return value if self.factor == 1 else self.factor * value

    def eager(self) -> nn.Module:
        """The same in plain PyTorch, of a single process, by matrices of kernel values."""
        return EagerMMD(self.kernel, self.bandwidth, self.estimator, self.alpha, self.factor)

    def __deepcopy__(self, memo: dict[int, Any]) -> MMDLoss:
        """With the same process group, which cannot be copied."""
        options = {
            name: getattr(self, name) for name in ("bandwidth", "estimator", "alpha", "group", "factor")
        }
        return type(self)(self.kernel, **options).train(self.training)

    def extra_repr(self) -> str:
        return _shown(self)


# Kernel values that are formed at once.
_BLOCK = 1 << 19


def rows_at_once(x: torch.Tensor, columns: int) -> int:
    """How many rows of kernel values, `columns` each, code without kernels of its own best forms at a time.

    A processor's caches hold blocks of rows; a compiler makes one loop of all of them.
    """
    if x.device.type == "cpu" and not _registry.is_watched():
        return max(1, _BLOCK // max(1, columns))
    return max(1, x.shape[0])


def squarings(rates: Sequence[float]) -> list[tuple[float, int]]:
    """The rates in rising order, each with how often exp(-c u) of the one before has to be squared to be its own.

    Once and twice are worth it; 0 stands for an exponential of its own.
    """
    rising = sorted(rates)
    octaves = [round(math.log2(rate / before), 9) for before, rate in pairwise(rising)]
    return list(zip(rising, [0, *(int(one) if one in (1.0, 2.0) else 0 for one in octaves)], strict=True))


def next_exponential(before: torch.Tensor, u: torch.Tensor, rate: float, squares: int) -> torch.Tensor:
    """exp(-rate u), for `squares` above 0 written over the one before; see `squarings`."""
    if squares == 0:
        return torch.mul(u, -rate).exp_()
    for _ in range(squares):
        before.square_()
    return before


class EagerMMD(nn.Module):
    """`MMDLoss` as it is written without it, for speed: distances come from products of matrices."""

    def __init__(
        self,
        kernel: str,
        bandwidth: float | Sequence[float] | None,
        estimator: str,
        alpha: float,
        factor: float,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.estimator = estimator
        self.alpha = alpha
        self.factor = factor
        self._rates = _pairwise.kernel_of("MMDLoss", kernel, bandwidth, alpha).rates

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wide = _arguments.accumulator(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._discrepancy(x.to(wide), y.to(wide))

    def _discrepancy(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.bandwidth is None and self._rates:
            scale = _pairwise.mean_squared_distance(torch.cat((x, y))).rsqrt()
            x, y = scale * x, scale * y
        value = self.across(x, y) * (-2.0 / (x.shape[0] * y.shape[0]))
        is_unbiased = self.estimator == "unbiased"
        for points in (x, y):
            count = points.shape[0]
            value = value + self.within(points, is_unbiased) / (count * (count - is_unbiased))
        return value if self.factor == 1 else self.factor * value

    def across(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The sum of the kernel values of all pairs of a row of x and one of y."""
        return _sum([self._gram(part, y).sum() for part in x.split(rows_at_once(x, y.shape[0]))])

    def within(self, points: torch.Tensor, is_without_diagonal: bool) -> torch.Tensor:
        """The sum of the kernel values of all pairs of rows, but a row's with itself if they are not wanted."""
        rows = rows_at_once(points, points.shape[0])
        sums = []
        for first, part in enumerate(points.split(rows)):
            gram = self._gram(part, part)
            # Where a point meets itself no gradient flows.
            itself = gram.detach().diagonal().sum() if is_without_diagonal else 0.0
            sums.append(gram.sum() - itself)
            later = points[(first + 1) * rows :]
            if later.shape[0] > 0:
                # With the pairs in their other order, which have the same values.
                sums.append(2.0 * self._gram(part, later).sum())
        return _sum(sums)

    def _gram(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The kernel values (N, M) of all pairs of rows."""
        if self.kernel == "energy":
            return -torch.cdist(x, y)
        if self.kernel == "laplacian":
            return self._exponentials(torch.cdist(x, y))
        norms = x.square().sum(1)[:, None] + y.square().sum(1)
        u = torch.addmm(norms, x, y.t(), alpha=-2.0).clamp_(min=0.0)
        if self.kernel == "rbf":
            return self._exponentials(u)
        if self.kernel == "imq":
            return _sum([(1.0 + rate * u).reciprocal_() for rate in self._rates])
        return _sum([(1.0 + rate * u).pow(-self.alpha) for rate in self._rates])

    def _exponentials(self, u: torch.Tensor) -> torch.Tensor:
        """Σ exp(-c u) over the rates c."""
        if u.requires_grad:
            # The backward of a square takes as long as that of an exponential.
            return _sum([torch.exp(-rate * u) for rate in self._rates])
        (least, _), *others = squarings(self._rates)
        term = torch.mul(u, -least).exp_()
        total = term.clone()
        for rate, squares in others:
            term = next_exponential(term, u, rate, squares)
            total += term
        return total

    def extra_repr(self) -> str:
        return _shown(self)


def _sum(values: list[torch.Tensor]) -> torch.Tensor:
    return sum(values[1:], start=values[0])


def _shown(loss: MMDLoss | EagerMMD) -> str:
    """The options that are not the defaults, after the kernel and the estimator."""
    parts = [loss.kernel, loss.estimator]
    if loss.bandwidth is not None and loss.kernel != "energy":
        several = loss.bandwidth if isinstance(loss.bandwidth, tuple) else (loss.bandwidth,)
        parts.append(f"bandwidth={' '.join(f'{one:g}' for one in several)}")
    if loss.kernel == "rational_quadratic":
        parts.append(f"alpha={loss.alpha:g}")
    if loss.factor != 1:
        parts.append(f"factor={loss.factor:g}")
    return ", ".join(parts)


def _prior_bandwidths(
    preset: str, latent: object, name: str, deviation: object, scales: object
) -> tuple[float, ...]:
    """b of b² = 2 latent deviation² s, for each of the scales s.

    2 latent deviation² is the mean squared distance of two draws from N(0, deviation² I).
    """
    check_positive_int(latent, "latent")
    if isinstance(scales, str) or not isinstance(scales, Sequence) or not scales:
        raise InputError(f"MMDLoss.{preset}: scales must be a sequence of numbers above 0, got {scales!r}")
    for argument, value in ((name, deviation), *(("scales", scale) for scale in scales)):
        _arguments.check_number(argument, value, f"MMDLoss.{preset}")
        if value <= 0:
            raise InputError(f"MMDLoss.{preset}: {argument} must be above 0, got {value!r}")
    return tuple(deviation * math.sqrt(2.0 * latent * scale) for scale in scales)
