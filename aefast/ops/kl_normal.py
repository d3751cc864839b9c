"""The KL divergence of normal distributions with diagonal covariance to N(0, I)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.ops import _arguments, _divergence, _registry
from aefast.ops._divergence import check_operands, define_divergence


def reference(mu: Tensor, logvar: Tensor, *, reduction: str = "mean") -> Tensor:
    """`kl_normal` in plain PyTorch."""
    return _arguments.reduce(divergence(mu, logvar), reduction)


def divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """Of each row: (*, D) to (*)."""
    wide = _arguments.accumulator(mu.dtype)
    mu, logvar = mu.to(wide), logvar.to(wide)
    return 0.5 * (mu * mu + (logvar.exp() - 1.0 - logvar)).sum(-1)


_NAMES = ("mu", "logvar")
_rows = define_divergence("kl_normal", _NAMES, divergence)


def kl_normal(mu: Tensor, logvar: Tensor, *, reduction: str = "mean") -> Tensor:
    """KL(N(mu, diag(exp(logvar))) ‖ N(0, I)) = 1/2 Σ (mu² + exp(logvar) - 1 - logvar), over the last dimension.

    Kingma and Welling, Auto-Encoding Variational Bayes (arXiv:1312.6114), appendix B. `reparameterize` gives the same
    with a sample, in the same pass. It is infinite where exp(logvar) overflows, above 88.7 in float32.

    Args:
        mu: (*, D), the means: float32, bfloat16, float16 or float64, any strides.
        logvar: (*, D), the logarithms of the variances: the shape, dtype and device of mu.
        reduction: over the leading dimensions: "mean", "sum" or "none".

    Returns:
        The divergence in nats: a scalar, or (*) for "none"; in float32 for half precision.

    Raises:
        InputError: a shape, dtype, device or name is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(mu, logvar) and _arguments.are_stand_ins(mu, logvar):
        return _arguments.deferred(kl_normal, locals())
    check(mu, logvar, reduction, "kl_normal")
    return _arguments.reduce(_rows(mu, logvar), reduction)


def check(mu: Any, logvar: Any, reduction: Any, op: str) -> None:
    """That (mu, logvar) are the parameters of normal distributions, and `reduction` is one."""
    check_operands(op, _NAMES, mu, logvar, ", (*, D)")
    _arguments.check_reduction(reduction, op)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Means and log-variances over shapes and strides: empty, one-wide, prime, long rows, halves of one matrix."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    for shape in ((0, 5), (4, 0), (1, 1), (7, 1), (31, 17), (64, 16), (3, 1031), (2, 5, 24), (24,)):
        yield {"mu": draw(*shape), "logvar": draw(*shape), "reduction": "none"}
    head = draw(37, 40)
    yield {"mu": head[:, :20], "logvar": head[:, 20:], "reduction": "mean"}
    yield {"mu": draw(18, 33).t(), "logvar": draw(66, 18)[::2], "reduction": "sum"}
    yield {"mu": draw(1, 12).expand(9, 12), "logvar": draw(9, 1).expand(9, 12), "reduction": "mean"}


def cost(backward: bool, mu: Tensor, logvar: Tensor, **settings: Any) -> _registry.Cost:
    return _divergence.cost(backward, mu, -1, 1)


OP = _registry.register(_registry.Op("kl_normal", kl_normal, reference, samples, cost))
