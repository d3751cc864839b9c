"""The KL divergence of discrete distributions."""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _divergence, _registry
from aefast.ops._divergence import check_operands, define_divergence


def reference(p: Tensor, q: Tensor, *, dim: int = -1, reduction: str = "mean") -> Tensor:
    """`kl_discrete` in plain PyTorch."""
    return _arguments.reduce(_reference(p.movedim(dim, -1), q.movedim(dim, -1)), reduction)


def _reference(p: Tensor, q: Tensor) -> Tensor:
    """Of each row: (*, C) to (*)."""
    wide = _arguments.accumulator(p.dtype)
    p, q = p.to(wide), q.to(wide)
    # Neither value nor gradient of what p = 0 leaves out may reach the others.
    is_out = p == 0
    p, q = p.masked_fill(is_out, 1.0), q.masked_fill(is_out, 1.0)
    return (p * (p.log() - q.log())).sum(-1)


_NAMES = ("p", "q")
_rows = define_divergence("kl_discrete", _NAMES, _reference)


def kl_discrete(p: Tensor, q: Tensor, *, dim: int = -1, reduction: str = "mean") -> Tensor:
    """KL(p ‖ q) = Σ p log(p / q) over `dim` (Kullback and Leibler, Annals of Mathematical Statistics 22, 1951).

    Where p is 0 the term is 0 and has no gradient; where p is not, and q is 0, it is infinite. Neither p nor q is
    checked or made to sum to 1.

    Args:
        p: probabilities of any shape with at least one dimension: float32, bfloat16, float16 or float64, any strides.
        q: the shape, dtype and device of p.
        dim: the dimension that a distribution lies along.
        reduction: over the other dimensions: "mean", "sum" or "none".

    Returns:
        The divergence in nats: a scalar, or for "none" the shape of p without `dim`; in float32 for half precision.

    Raises:
        InputError: a shape, dtype, device, name or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(p, q) and _arguments.are_stand_ins(p, q):
        return _arguments.deferred(kl_discrete, locals())
    check_operands("kl_discrete", _NAMES, p, q)
    if isinstance(dim, bool) or not isinstance(dim, Integral) or not -p.dim() <= dim < p.dim():
        raise InputError(f"kl_discrete: dim must be from {-p.dim()} to {p.dim() - 1}, got {dim!r}")
    _arguments.check_reduction(reduction, "kl_discrete")
    # A view of each would be a node of the graph.
    if dim % p.dim() != p.dim() - 1:
        p, q = p.movedim(dim, -1), q.movedim(dim, -1)
    return _arguments.reduce(_rows(p, q), reduction)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Distributions over shapes and strides, some with zeros in p or in both."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).add(0.01).to(device, dtype)

    for shape in ((0, 5), (4, 0), (1, 1), (7, 1), (31, 17), (64, 16), (3, 1031), (2, 5, 24), (24,)):
        yield {"p": draw(*shape), "q": draw(*shape), "reduction": "none"}
    sparse = draw(9, 20)
    sparse[:, ::3] = 0.0
    both = draw(9, 20)
    both[:, ::6] = 0.0
    yield {"p": sparse, "q": both, "reduction": "mean"}
    yield {"p": draw(18, 33).t(), "q": draw(66, 18)[::2], "reduction": "sum"}
    yield {"p": draw(4, 11, 6), "q": draw(4, 11, 6), "dim": 1, "reduction": "none"}
    yield {"p": draw(1, 12).expand(9, 12), "q": draw(9, 1).expand(9, 12), "dim": -2, "reduction": "mean"}


def cost(backward: bool, p: Tensor, q: Tensor, dim: int = -1, **settings: Any) -> _registry.Cost:
    return _divergence.cost(backward, p, dim, 2)


OP = _registry.register(_registry.Op("kl_discrete", kl_discrete, reference, samples, cost))
