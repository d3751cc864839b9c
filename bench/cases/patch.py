"""A training step of models that others wrote, as they are and patched by `aefast.patch`: pythae's with its default
networks, and a stack of torch's layers."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from aefast.bench import timing, variants
from aefast.bench.case import (
    NOISE_SEED,
    STEPS_SECONDS,
    Case,
    Learner,
    Trial,
    collect,
    dtypes,
    noise_of_aefast,
    without_kinks,
)
from aefast.bench.cases.train import gaussian_cost, step_cost
from aefast.bench.timing import Variant
from aefast.ops._registry import OPS, Cost
from aefast.patch import patch

INPUTS, HIDDEN, LATENT = 784, 512, 16
QUICK_BATCH = 256


class Objective(nn.Module):
    """The loss of `model` for a batch (B, features)."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Tensor) -> Tensor:
        return self.loss(self.model, batch)


@dataclass(frozen=True)
class PatchCase(Case):
    """``make_objective()`` gives a model with fresh weights; what it computes is the truth in float64."""

    make_objective: Callable[[], Objective]
    cost: Cost
    absent: dict[str, str]

    @property
    def modes(self) -> tuple[str, ...]:
        return ("step",)

    def trial(self, mode: str) -> Trial:
        model = self.make_objective().to(self.device, self.dtype)
        exact = copy.deepcopy(model).double()
        checked = without_kinks(exact, self._batch, None)
        ours = variants.backends("mlp", self.device, self.dtype)
        models = {name: copy.deepcopy(model) for name in (*ours, "eager")}
        for name in ours:
            patch(models[name])
        learners = {name: Learner.of_loss(one.parameters(), one) for name, one in models.items()}
        contexts = {name: ours.get(name, contextlib.nullcontext) for name in learners}

        def results(name: str) -> list[Tensor]:
            with contexts[name](), noise_of_aefast():
                return learners[name].results(checked)

        missing = dict(self.absent)
        found = collect({name: lambda name=name: results(name) for name in learners}, missing)
        with noise_of_aefast():
            torch.manual_seed(NOISE_SEED)
            loss = exact(checked.double())
        truth = [loss.detach(), *torch.autograd.grad(loss, list(exact.parameters()))]
        count = max(len(found), timing.input_sets(checked.numel() * checked.element_size(), self.device))
        batches = [self._batch() for _ in range(count)]

        def timed(name: str) -> Variant:
            step = learners[name].step
            return Variant(lambda index: step(batches[index % count]), contexts[name])

        has_flips = torch.finfo(self.dtype).eps > 1e-6
        all_timed = {name: timed(name) for name in found}
        return Trial(truth, found, all_timed, count, missing, self.cost, has_flips, STEPS_SECONDS)

    def _batch(self) -> Tensor:
        return torch.rand(self.sizes["batch"], INPUTS, device=self.device).to(self.dtype)


def cases(device: torch.device, quick: bool) -> Iterator[PatchCase]:
    batches = (QUICK_BATCH,) if quick else (64, QUICK_BATCH, 1024)
    has_pythae = importlib.util.find_spec("pythae") is not None
    absent = {} if has_pythae else {"pythae's models": "pythae is not installed"}
    for dtype, batch in itertools.product(dtypes(device), batches):
        yield stack(batch, dtype, device, absent)
        if not has_pythae:
            continue
        yield pythae("VAE", batch, dtype, device)
        yield pythae("VAE", batch, dtype, device, reconstruction_loss="bce")
        yield pythae("WAE_MMD", batch, dtype, device)
        yield pythae("INFOVAE_MMD", batch, dtype, device)


def stack(batch: int, dtype: torch.dtype, device: torch.device, absent: dict[str, str]) -> PatchCase:
    def make_objective() -> Objective:
        layers = nn.Sequential(
            *(nn.Linear(INPUTS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, LATENT)),
            *(nn.Linear(LATENT, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, INPUTS), nn.Sigmoid()),
        )
        model = nn.ModuleDict({"layers": layers, "loss": nn.MSELoss()})
        return Objective(model, lambda model, batch: model["loss"](model["layers"](batch), batch))

    widths = (INPUTS, HIDDEN, LATENT, HIDDEN, INPUTS)
    cost = step_cost(batch, pairwise(widths), dtype, 2 * HIDDEN + INPUTS)
    return _case("gelu", batch, dtype, device, make_objective, cost, absent)


def pythae(name: str, batch: int, dtype: torch.dtype, device: torch.device, **options: object) -> PatchCase:
    def make_objective() -> Objective:
        from pythae import models

        config_class = getattr(models, f"{name}Config" if name == "VAE" else f"{name}_Config")
        model = getattr(models, name)(config_class(input_dim=(INPUTS,), latent_dim=LATENT, **options))
        return Objective(model, lambda model, batch: model({"data": batch}).loss)

    cost = gaussian_cost(batch, INPUTS, HIDDEN, LATENT, dtype)
    if name != "VAE":
        codes = torch.empty(batch, LATENT, dtype=dtype, device="meta")
        pairs = OPS["mmd"].cost(True, codes, codes, kernel="imq")
        cost = Cost(cost.bytes + pairs.bytes, cost.flops + pairs.flops, cost.exps + pairs.exps)
    kind = "-".join(["pythae", name.lower().removesuffix("_mmd"), *map(str, options.values())])
    return _case(kind, batch, dtype, device, make_objective, cost, {})


def _case(
    kind: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    make_objective: Callable[[], Objective],
    cost: Cost,
    absent: dict[str, str],
) -> PatchCase:
    return PatchCase(
        "patch",
        kind,
        f"{INPUTS}-{HIDDEN}-{LATENT}-b{batch}",
        {"batch": batch, "inputs": INPUTS, "features": INPUTS},
        dtype,
        device,
        make_objective=make_objective,
        cost=cost,
        absent=absent,
    )
