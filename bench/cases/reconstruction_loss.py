"""`reconstruction_loss` beside PyTorch's own losses, and beside its operators for the kinds that it has none of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes
from aefast.nn import ReconstructionLoss

# (batch, features): flat images of 28 × 28, a wide batch of small samples, and 64 images of 3 × 128 × 128.
SHAPES = ((256, 784), (4096, 784), (16384, 64), (64, 49152))
QUICK_SHAPES = ((4096, 784),)
KINDS: dict[str, dict[str, Any]] = {
    "mse": {},
    "l1": {},
    "bce_with_logits": {},
    "huber": {"delta": 0.5},
    "charbonnier": {"eps": 1e-3},
    "bce": {},
    "lp": {"p": 1.5},
    "rmse": {},
}
# The kinds measured at every shape, and those measured at the main shape alone.
MAIN_KINDS = ("mse", "l1", "bce_with_logits", "huber")
MAIN_SHAPE = (4096, 784)


class BinaryCrossEntropy(torch.autograd.Function):
    """The mean, with logarithms of at least -100 as ``F.binary_cross_entropy`` has them, whose loops on the CPU are of
    single numbers."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(input, target)
        of_0, of_1 = torch.log1p(-input).clamp_(min=-100.0), torch.log(input).clamp_(min=-100.0)
        return -of_0.lerp_(of_1, target).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        input, target = ctx.saved_tensors
        variance = torch.addcmul(input, input, input, value=-1.0).clamp_(min=1e-12)
        return (input - target).div_(variance).mul_(grad / input.numel()), None


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for shape in QUICK_SHAPES if quick else SHAPES:
            for kind in KINDS:
                if kind in MAIN_KINDS or (shape == MAIN_SHAPE and not quick):
                    yield case(kind, *shape, dtype, device, not quick and shape == MAIN_SHAPE)


def case(
    kind: str,
    batch: int,
    features: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    options = KINDS[kind]

    def make() -> list[Tensor]:
        input = torch.randn(batch, features, device=device)
        if kind == "bce":
            input = input.sigmoid()
        # Pixels, of which no gradient is wanted.
        target = torch.rand(batch, features, device=device)
        return [input.to(dtype).requires_grad_(), target.to(dtype)]

    def aefast(input: Tensor, target: Tensor) -> Tensor:
        return AF.reconstruction_loss(input, target, kind, **options)

    eager = module = ReconstructionLoss(kind, **options).eager()
    if kind == "bce" and device.type == "cpu":
        eager = BinaryCrossEntropy.apply
    return OpCase(
        "reconstruction_loss",
        kind,
        f"b{batch}-d{features}",
        {"batch": batch, "features": features},
        dtype,
        device,
        make=make,
        aefast=aefast,
        eager=eager,
        compilable=module,
        arguments=lambda input, target: {"input": input, "target": target, "kind": kind},
        is_compiled=is_compiled,
    )
