"""Whole epochs of a VAE on real data: batches drawn and gathered, steps taken, losses added up, by aefast's parts, by
loops as people write them in PyTorch, and by pythae's trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aefast.bench import variants
from aefast.bench.case import (
    LEARNING_RATE,
    NOISE_SEED,
    Case,
    Trial,
    collect,
    dtypes,
    noise_of_aefast,
)
from aefast.bench.cases.train import gaussian_cost, pythae_twin
from aefast.bench.timing import Variant
from aefast.bench.variants import COMPILED, Rival
from aefast.data import Batches
from aefast.data.bundled import digits, patches
from aefast.models import VAE
from aefast.ops._registry import Cost
from aefast.train.step import CapturedStep, make_optimizer

HIDDEN, LATENT = 512, 16
# Samples and batch of the data that are cut from photographs, 28 × 28 pixels each.
PATCHES, BATCH = 20_000, 256
DIGITS_BATCH = 64
# The loss that is compared is the mean of so many epochs but the first, on the same batches and noise; pythae's trainer
# draws its own. By then rounding alone has driven runs apart: single epochs differ by up to 3 %, and such a mean by up
# to 0.5 %.
CHECKED_EPOCHS = 8
TOLERANCE = 0.01

# Trains for an epoch, of that number; the mean loss of its batches.
Loop = Callable[[int], Tensor]


@dataclass(frozen=True)
class EpochCase(Case):
    """``load()`` gives the samples (N, features) in float32, on the CPU."""

    load: Callable[[], Tensor]

    @property
    def modes(self) -> tuple[str, ...]:
        return ("epoch",)

    def trial(self, mode: str) -> Trial:
        samples = self.load().to(self.device, self.dtype)
        model = self._model()
        rivals, missing = self._loaded_rivals(mode)
        ours = variants.backends("mlp", self.device, self.dtype)
        loops = {name: self._fused(model, samples, "fp32") for name in ours}
        if self.dtype == torch.float32:
            loops["aefast[bf16]"] = self._fused(model, samples, "bf16")
        loops["eager"] = self._eager(model, samples, make_optimizer)
        loops["eager, unfused Adam"] = self._eager(model, samples, torch.optim.Adam)
        if self.is_compiled:
            loops[COMPILED] = self._eager(model, samples, make_optimizer, is_compiled=True)
        with tempfile.TemporaryDirectory() as folder:
            makers = {
                name: lambda make=make: make(model, samples, self.sizes["batch"], folder)
                for name, make in rivals.items()
            }
            loops |= collect(makers, missing)
        contexts = {name: ours.get(name, contextlib.nullcontext) for name in loops}

        def loss(name: str) -> list[Tensor]:
            torch.manual_seed(NOISE_SEED)
            with contexts[name](), noise_of_aefast():
                losses = [loops[name](epoch) for epoch in range(1, CHECKED_EPOCHS + 1)]
                return [torch.stack(losses[1:]).float().mean()]

        found = collect({name: lambda name=name: loss(name) for name in loops}, missing)
        timed = {
            name: Variant(lambda index, loop=loops[name]: loop(CHECKED_EPOCHS + 1 + index), contexts[name])
            for name in found
        }
        truth = [one.double() for one in found["eager"]] if "eager" in found else []
        return Trial(truth, found, timed, 1, missing, self._cost(), tolerance=TOLERANCE)

    def _batches(self, samples: Tensor) -> Batches:
        rows = torch.arange(len(samples))
        return Batches(samples, rows, batch_size=self.sizes["batch"], seed=NOISE_SEED)

    def _model(self) -> VAE:
        widths = {"input_size": self.sizes["inputs"], "hidden": (HIDDEN,), "latent": LATENT}
        return VAE(**widths, device=self.device, dtype=self.dtype)

    def _fused(self, like: VAE, samples: Tensor, precision: str) -> Loop:
        model = self._model()
        model.load_state_dict(like.state_dict())
        step = CapturedStep(
            model.train(), make_optimizer(model.parameters(), LEARNING_RATE), precision=precision
        )
        return _loop(self._batches(samples), lambda batch: sum(step(batch).values()))

    def _eager(
        self,
        like: VAE,
        samples: Tensor,
        make: Callable[..., torch.optim.Optimizer],
        is_compiled: bool = False,
    ) -> Loop:
        twin = like.eager_twin()
        optimizer = make(twin.parameters(), lr=LEARNING_RATE)

        def loss(batch: Tensor) -> Tensor:
            return like.eager_loss(twin, batch)

        if is_compiled:
            loss = variants.compiled(loss, self.device)

        def step(batch: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            value = loss(batch)
            value.backward()
            optimizer.step()
            return value.detach()

        return _loop(self._batches(samples), step)

    def _cost(self) -> Cost:
        sizes = self.sizes
        step = gaussian_cost(sizes["batch"], sizes["inputs"], HIDDEN, LATENT, self.dtype)
        steps = -(-sizes["samples"] // sizes["batch"])
        return Cost(*(steps * one for one in (step.bytes, step.flops, step.exps)))


def cases(device: torch.device, quick: bool) -> Iterator[EpochCase]:
    on_cuda = device.type == "cuda"
    # A last batch of other size would be compiled too, which on CUDA takes minutes.
    count = PATCHES // BATCH * BATCH if on_cuda else PATCHES
    for dtype in dtypes(device):
        case = vae("patches", count, 28 * 28, BATCH, dtype, device, lambda: patches(28, count).samples)
        yield dataclasses.replace(case, is_compiled=not (quick and on_cuda))
        if not quick:
            yield vae("digits", 1797, 64, DIGITS_BATCH, dtype, device, lambda: digits().samples)


def vae(
    data: str,
    count: int,
    features: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    load: Callable[[], Tensor],
) -> EpochCase:
    return EpochCase(
        "epochs",
        "vae",
        f"{features}-{HIDDEN}-{LATENT}-b{batch}-{data}",
        {"batch": batch, "inputs": features, "features": features, "samples": count},
        dtype,
        device,
        rivals={"pythae": Rival("pythae", lambda: _pythae_loop, ("epoch",))},
        load=load,
    )


def _loop(batches: Batches, step: Callable[[Tensor], Tensor]) -> Loop:
    def epoch(number: int) -> Tensor:
        losses = [step(batch) for batch in batches.epoch(number)]
        return torch.stack(losses).mean()

    return epoch


def _pythae_loop(like: VAE, samples: Tensor, batch: int, folder: str) -> Loop:
    """Epochs of pythae's trainer as it comes, with Adam, its loader and its progress bar, which goes nowhere."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as TheirVAE
    from pythae.models import VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    features = samples.shape[1]
    config = VAEConfig(input_dim=(features,), latent_dim=LATENT, reconstruction_loss="mse")
    model, _ = pythae_twin(TheirVAE, config, like)
    training = BaseTrainerConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        learning_rate=LEARNING_RATE,
        no_cuda=samples.device.type == "cpu",
    )
    data = BaseDataset(samples, torch.zeros(len(samples)))
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            trainer = BaseTrainer(model, data, training_config=training)
            trainer.prepare_training()
    finally:
        logging.disable(logging.NOTSET)

    def epoch(number: int) -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):
            loss = trainer.train_step(number)
            trainer.callback_handler.on_epoch_end(training_config=training)
        return torch.tensor(loss)

    return epoch
