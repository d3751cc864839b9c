"""The numerical checks that every op passes on every backend.

The truth is the op's reference in float64 on inputs rounded to the dtype under test. A result passes if its
largest error is at most twice that of plain PyTorch in the same dtype plus twice the rounding noise: the
spacing of the dtype at the largest true value, or the change of a gradient when each upstream value moves by one
spacing, whichever is larger. The latter counts where terms cancel in a sum: PyTorch's own error in one number is
but one draw of it. Where an op says how large its terms are, the spacing at their sum is rounding noise too.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import aefast
from aefast.ops import _arguments
from aefast.ops._registry import Op, refusal

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# (dtype, a scale of points whose squared distances are normal numbers but for a few, the relative error that those few
# are good for)
TINY_POINTS = ((torch.float32, 3e-18, 5e-5), (torch.float64, 1e-17, 1e-12), (torch.float64, 1e-140, 1e-12))

# In float64 the truth carries rounding of the same size as the result: sums of up to 1030 terms in another
# order differ by a random walk of as many steps, sqrt(1030) / 2 spacings.
_FLOAT64_NOISE = 16.0


def in_turn(samples: Iterable[dict[str, Any]], dtype: torch.dtype) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where samples take seconds: all of them in float32, and a third in any other dtype, not the same in each."""
    first = None if dtype == torch.float32 else DTYPES.index(dtype) % 3
    for index, sample in enumerate(samples):
        if first is None or index % 3 == first:
            yield index, sample


def require_backend(name: str, op: str, device: str, dtype: torch.dtype) -> None:
    """Skips the test, with the reason, where the backend cannot run."""
    import pytest

    reason = refusal(name, op, device, dtype)
    if reason:
        pytest.skip(f"backend {name}: {reason}")


def cast(arguments: Any, dtype: torch.dtype) -> Any:
    """`arguments` with each floating-point tensor cast, its strides kept."""

    def one(value: Any) -> Any:
        return value.to(dtype) if is_differentiable(value) else value

    return pytree.tree_map(one, arguments)


def is_differentiable(value: Any) -> bool:
    """A seed is a tensor, and is not."""
    return isinstance(value, Tensor) and value.is_floating_point()


def of_every_size(dtype: torch.dtype) -> Tensor:
    """0 and numbers of both signs, from the least normal one to the largest."""
    info = torch.finfo(dtype)
    sizes = [info.tiny, 1.0, 20.0, 88.0, 1e4, 1e10, 1e14, 1e19, 1e30, info.max]
    sizes = torch.tensor([size for size in sizes if size <= info.max], dtype=torch.float64)
    return torch.cat((torch.zeros(1), sizes, -sizes)).to(dtype)


def leaves(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if is_differentiable(leaf)]


def with_gradients(arguments: Any) -> Any:
    """`arguments` with tensors that require gradients, on the same strides."""

    def one(value: Any) -> Any:
        if not is_differentiable(value):
            return value
        # detach() keeps strides, expanded ones too, where clone() would not.
        return value.detach().requires_grad_()

    return pytree.tree_map(one, arguments)


def outputs_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


class Called:
    """The outputs of `function`, and their gradients with respect to all tensors in `arguments`."""

    def __init__(self, function: Any, arguments: dict[str, Any]) -> None:
        arguments = with_gradients(arguments)
        self.inputs = leaves(arguments)
        self.outputs = outputs_of(function(**arguments))

    def results(self, upstream: list[Tensor], again: bool = False) -> list[Tensor]:
        """Outputs, then gradients. Asked `again` for another upstream, it does not run the function anew."""
        given = [grad.to(out.dtype) for grad, out in zip(upstream, self.outputs, strict=True)]
        gradients = torch.autograd.grad(self.outputs, self.inputs, given, retain_graph=again)
        return [*(out.detach() for out in self.outputs), *gradients]


def run(function: Any, arguments: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    return Called(function, arguments).results(upstream)


def largest_error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    error = (found.double().cpu() - truth.cpu()).abs()
    return float("inf") if error.isnan().any() else error.max().item()


def rounding_noise(
    called: Called, upstream: list[Tensor], truth: list[Tensor], dtype: torch.dtype
) -> list[float]:
    """For each result in `truth`, which the reference, `called` in float64, gives for `upstream`."""
    eps = torch.finfo(dtype).eps
    noise = [eps * true.abs().max().item() if true.numel() else 0.0 for true in truth]
    if dtype == torch.float64:
        return [_FLOAT64_NOISE * one for one in noise]
    generator = torch.Generator(upstream[0].device).manual_seed(2)
    draws = 3
    for _ in range(draws):
        moved = [
            grad * (1 + eps * (2 * torch.randint_like(grad, 2, generator=generator) - 1)) for grad in upstream
        ]
        changed = called.results(moved, again=True)
        noise = [max(a, largest_error(b, true)) for a, b, true in zip(noise, changed, truth, strict=True)]
    return noise


def term_noise(op: Op, exact: tuple[Any, list[Tensor]], dtype: torch.dtype) -> list[float]:
    """The spacing of the accumulator at the sums of the magnitudes of an op's terms, for each result."""
    sample, upstream = exact
    sizes = op.terms(**sample)
    largest = max(grad.abs().max().item() for grad in upstream)
    eps = torch.finfo(_arguments.accumulator(dtype)).eps * (_FLOAT64_NOISE if dtype == torch.float64 else 1.0)
    outputs, gradients = sizes[: len(upstream)], sizes[len(upstream) :]
    return [*(eps * size for size in outputs), *(eps * largest * size for size in gradients)]


def check(
    op: Op, backend: str, sample: dict[str, Any], dtype: torch.dtype, expand_grad: bool = False
) -> None:
    """That output and gradients of `op` on `backend` hold the bound for `sample`, given in `dtype`."""
    check_draws(op, backend, [sample], dtype, expand_grad)


def check_draws(
    op: Op, backend: str, draws: list[dict[str, Any]], dtype: torch.dtype, expand_grad: bool = False
) -> None:
    """`check` for samples that differ in their values alone, with the largest error and bound of all of them.

    A result of few elements says little of the errors of either side in one draw.
    """
    generator = torch.Generator().manual_seed(1)
    errors: list[float] = []
    bounds: list[float] = []
    for sample in draws:
        eager = Called(op.reference, sample)
        upstream = [
            torch.randn(() if expand_grad else out.shape, generator=generator)
            .expand(out.shape)
            .to(dtype)
            .to(out.device)
            for out in eager.outputs
        ]
        exact = cast(sample, torch.float64), [grad.double() for grad in upstream]
        called = Called(op.reference, exact[0])
        truth = called.results(exact[1], again=True)
        noises = rounding_noise(called, exact[1], truth, dtype)
        if op.terms is not None:
            noises = [max(pair) for pair in zip(noises, term_noise(op, exact, dtype), strict=True)]
        plain = eager.results(upstream)
        with aefast.backend(backend):
            found = run(op.function, sample, upstream)
        errors = errors or [0.0] * len(truth)
        bounds = bounds or [0.0] * len(truth)
        for index, (ours, theirs, true, noise) in enumerate(zip(found, plain, truth, noises, strict=True)):
            assert ours.dtype == theirs.dtype
            errors[index] = max(errors[index], largest_error(ours, true))
            bounds[index] = max(bounds[index], 2 * largest_error(theirs, true) + 2 * noise)
    names = {
        key: tuple(value.shape) if isinstance(value, Tensor) else value for key, value in draws[0].items()
    }
    for index, (error, bound) in enumerate(zip(errors, bounds, strict=True)):
        assert error <= bound, f"{op.name} on {backend}, result {index}: error {error} > {bound} for {names}"
