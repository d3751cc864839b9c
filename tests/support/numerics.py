"""The numerical checks that every op passes on every backend.

The truth is the op's reference in float64 on inputs rounded to the dtype under test. A result passes if its
largest error is at most twice that of plain PyTorch in the same dtype plus twice the rounding noise: the
spacing of the dtype at the largest true value.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import aefast
from aefast.ops._registry import Op, refusal

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# In float64 the truth carries rounding of the same size as the result: sums of up to 1030 terms in another
# order differ by a random walk of as many steps, sqrt(1030) / 2 spacings.
_FLOAT64_NOISE = 16.0


def require_backend(name: str, op: str, device: str, dtype: torch.dtype) -> None:
    """Skips the test, with the reason, where the backend cannot run."""
    import pytest

    reason = refusal(name, op, device, dtype)
    if reason:
        pytest.skip(f"backend {name}: {reason}")


def cast(arguments: Any, dtype: torch.dtype) -> Any:
    """`arguments` with each floating-point tensor cast, its strides kept."""

    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(one, arguments)


def leaves(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


def with_gradients(arguments: Any) -> Any:
    """`arguments` with tensors that require gradients, on the same strides."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # detach() keeps strides, expanded ones too, where clone() would not.
        return value.detach().requires_grad_()

    return pytree.tree_map(one, arguments)


def outputs_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def run(function: Any, arguments: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    """The outputs of `function`, and its gradients with respect to all tensors in `arguments`."""
    arguments = with_gradients(arguments)
    outputs = outputs_of(function(**arguments))
    gradients = torch.autograd.grad(
        outputs, leaves(arguments), [grad.to(out.dtype) for grad, out in zip(upstream, outputs, strict=True)]
    )
    return [*(out.detach() for out in outputs), *gradients]


def largest_error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    error = (found.double().cpu() - truth.cpu()).abs()
    return float("inf") if error.isnan().any() else error.max().item()


def check(
    op: Op, backend: str, sample: dict[str, Any], dtype: torch.dtype, expand_grad: bool = False
) -> None:
    """That output and gradients of `op` on `backend` hold the bound for `sample`, given in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    shapes = [out.shape for out in outputs_of(op.reference(**sample))]
    device = leaves(sample)[0].device
    upstream = [
        (
            torch.randn((), generator=generator).expand(shape)
            if expand_grad
            else torch.randn(shape, generator=generator)
        )
        .to(dtype)
        .to(device)
        for shape in shapes
    ]
    truth = run(op.reference, cast(sample, torch.float64), [grad.double() for grad in upstream])
    eager = run(op.reference, sample, upstream)
    with aefast.backend(backend):
        found = run(op.function, sample, upstream)
    for index, (ours, theirs, true) in enumerate(zip(found, eager, truth, strict=True)):
        assert ours.dtype == theirs.dtype
        scale = true.abs().max().item() if true.numel() else 0.0
        noise = torch.finfo(dtype).eps * scale * (_FLOAT64_NOISE if dtype == torch.float64 else 1.0)
        bound = 2 * largest_error(theirs, true) + 2 * noise
        error = largest_error(ours, true)
        names = {
            key: tuple(value.shape) if isinstance(value, Tensor) else value for key, value in sample.items()
        }
        assert error <= bound, f"{op.name} on {backend}, result {index}: error {error} > {bound} for {names}"
