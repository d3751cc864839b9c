"""One case of the benchmark, its correctness gate, and its measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aefast.bench import memory, timing
from aefast.bench.ceilings import Ceilings
from aefast.ops._registry import OPS

MODES = ("fwd", "fwdbwd")


@dataclass(frozen=True)
class Case:
    """An op at one shape: ``make()`` gives a fresh set of inputs, ``variants`` take such a set.

    ``arguments(*inputs)`` are those of the op's function, from which its cost is known.

    ``kinks(*inputs)``, where an activation has a kink, is true, broadcast to the output, for the outputs whose
    gradient rounding decides: those that depend on a pre-activation beside the kink.
    """

    op: str
    id: str
    labels: dict[str, Any]
    make: Callable[[], list[Tensor]]
    output_shape: tuple[int, ...]
    arguments: Callable[..., dict[str, Any]]
    variants: dict[str, Callable[..., Tensor]]
    kinks: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Result:
    """What was measured of a case in one mode; `failure` says why there are no timings.

    ``floor``: the seconds that the device's ceilings leave no call below, bound by ``floor_kind``. ``peak_bytes``: of
    tensors allocated during a call, for each variant.
    """

    id: str
    op: str
    mode: str
    labels: dict[str, Any]
    errors: dict[str, float]
    timings: dict[str, timing.Timing]
    peak_bytes: dict[str, int]
    floor: float
    floor_kind: str
    failure: str | None

    @property
    def speedup(self) -> float | None:
        """Eager's median time over aefast's."""
        if self.failure:
            return None
        return self.timings["eager"].median / self.timings["aefast"].median

    @property
    def speedup_interval(self) -> tuple[float, float] | None:
        """As `interval`."""
        if self.failure:
            return None
        return interval(self.timings["eager"].samples, self.timings["aefast"].samples)

    @property
    def floor_share(self) -> float | None:
        """The share of its floor's speed that aefast's median call reaches."""
        return None if self.failure else self.floor / self.timings["aefast"].median

    @property
    def overhead(self) -> float | None:
        """Seconds by which aefast's median call is longer than eager's."""
        if self.failure:
            return None
        return self.timings["aefast"].median - self.timings["eager"].median


def interval(eager: Sequence[float], aefast: Sequence[float]) -> tuple[float, float]:
    """Where the median of the rounds' ratios eager / aefast lies, at 95 % confidence."""
    ratios = sorted(theirs / ours for theirs, ours in zip(eager, aefast, strict=True))
    # How many of n draws lie below the median is a binomial variable, here by its normal approximation.
    half, spread = len(ratios) / 2, 0.98 * len(ratios) ** 0.5
    return ratios[max(0, math.floor(half - spread))], ratios[min(len(ratios) - 1, math.ceil(half + spread))]


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


# Pre-activations, of the order of 1, are uncertain by less; a sum of 4096 float32 products is by some 3e-6.
KINK_WIDTH = 1e-5

_RUN = {"fwd": _forward, "fwdbwd": _forward_backward}


def _errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest error of each result, relative to that result's largest true value."""
    errors = []
    for ours, true in zip(found, truth, strict=True):
        scale = true.abs().max().clamp_min(1e-300)
        error = ((ours.double() - true).abs().max() / scale).item()
        errors.append(float("inf") if error != error else error)
    return errors


def measure(case: Case, mode: str, seconds: float, ceilings: Ceilings) -> Result:
    """Checks every variant against float64, then times them in turn and measures their memory.

    A variant passes if the error of its output, and of each gradient, is at most twice eager's plus twice the
    spacing of the dtype. Outputs at a kink get no gradient in that check.
    """
    inputs = case.make()
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    device, dtype = inputs[0].device, inputs[0].dtype
    upstream = torch.randn(case.output_shape, device=device, dtype=dtype)
    run = _RUN[mode]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gate_upstream = upstream
    if case.kinks is not None:
        with torch.no_grad():
            gate_upstream = upstream.masked_fill(case.kinks(*exact_inputs), 0.0)
    truth = run(case.variants["eager"], exact_inputs, gate_upstream.double())
    found = {
        name: _errors(run(function, inputs, gate_upstream), truth) for name, function in case.variants.items()
    }
    errors = {name: max(values) for name, values in found.items()}
    del truth, exact_inputs
    noise = torch.finfo(dtype).eps
    failing = [
        name
        for name, values in found.items()
        if not all(ours <= 2 * eager + 2 * noise for ours, eager in zip(values, found["eager"], strict=True))
    ]
    timings, peak_bytes = {}, {}
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
        peak_bytes = {
            name: memory.peak_bytes(call(function), device) for name, function in case.variants.items()
        }
    failure = None
    if failing:
        failure = ", ".join(
            f"{name}: errors {_listed(found[name])}, eager's {_listed(found['eager'])}" for name in failing
        )
    cost = OPS[case.op].cost(mode == "fwdbwd", **case.arguments(*inputs))
    return Result(
        f"{case.id}-{mode}",
        case.op,
        mode,
        case.labels,
        errors,
        timings,
        peak_bytes,
        *ceilings.floor(cost),
        failure,
    )


def _listed(errors: list[float]) -> str:
    return ", ".join(f"{error:.1e}" for error in errors)
