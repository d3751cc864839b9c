"""One case of the benchmark, its correctness gate, and its measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aefast.bench import timing

MODES = ("fwd", "fwdbwd")


@dataclass(frozen=True)
class Case:
    """An op at one shape: ``make()`` gives a fresh set of inputs, ``variants`` take such a set."""

    op: str
    id: str
    labels: dict[str, Any]
    make: Callable[[], list[Tensor]]
    output_shape: tuple[int, ...]
    variants: dict[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Result:
    """What was measured of a case in one mode; `failure` says why there are no timings."""

    id: str
    op: str
    mode: str
    labels: dict[str, Any]
    errors: dict[str, float]
    timings: dict[str, timing.Timing]
    failure: str | None

    @property
    def speedup(self) -> float | None:
        """Eager's median time over aefast's."""
        if self.failure:
            return None
        return self.timings["eager"].median / self.timings["aefast"].median

    @property
    def overhead(self) -> float | None:
        """Seconds by which aefast's median call is longer than eager's."""
        if self.failure:
            return None
        return self.timings["aefast"].median - self.timings["eager"].median


def training_inputs(
    device: torch.device, *shapes: Sequence[int], scales: Sequence[float], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Normal draws that require gradients, the n-th scaled by ``scales[n]``."""
    return [
        (torch.randn(shape, device=device, dtype=dtype) * scale).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def _forward(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(*inputs)]


def _forward_backward(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


_RUN = {"fwd": _forward, "fwdbwd": _forward_backward}


def _errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest error of each result, relative to that result's largest true value."""
    errors = []
    for ours, true in zip(found, truth, strict=True):
        scale = true.abs().max().clamp_min(1e-300)
        error = ((ours.double() - true).abs().max() / scale).item()
        errors.append(float("inf") if error != error else error)
    return errors


def measure(case: Case, mode: str, seconds: float) -> Result:
    """Checks every variant against float64, then times them in turn.

    A variant passes if the error of its output, and of each gradient, is at most twice eager's plus twice the
    spacing of the dtype.
    """
    inputs = case.make()
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    device, dtype = inputs[0].device, inputs[0].dtype
    upstream = torch.randn(case.output_shape, device=device, dtype=dtype)
    run = _RUN[mode]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = run(case.variants["eager"], exact_inputs, upstream.double())
    found = {
        name: _errors(run(function, inputs, upstream), truth) for name, function in case.variants.items()
    }
    errors = {name: max(values) for name, values in found.items()}
    del truth, exact_inputs
    noise = torch.finfo(dtype).eps
    failing = [
        name
        for name, values in found.items()
        if not all(ours <= 2 * eager + 2 * noise for ours, eager in zip(values, found["eager"], strict=True))
    ]
    timings = {}
    if not failing:
        sets = [inputs, *(case.make() for _ in range(timing.input_sets(nbytes) - 1))]

        def call(function: Callable[..., Tensor]) -> Callable[[int], object]:
            def once(index: int) -> None:
                run(function, sets[index % len(sets)], upstream)
                timing.synchronize(device)

            return once

        timings = timing.interleaved(
            {name: call(function) for name, function in case.variants.items()}, seconds=seconds
        )
    failure = None
    if failing:
        failure = ", ".join(
            f"{name}: errors {_listed(found[name])}, eager's {_listed(found['eager'])}" for name in failing
        )
    return Result(f"{case.id}-{mode}", case.op, mode, case.labels, errors, timings, failure)


def _listed(errors: list[float]) -> str:
    return ", ".join(f"{error:.1e}" for error in errors)
