"""What the processes of a run do in its tests: a module that new processes import too."""

import os

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from aefast.data import Dataset
from aefast.models import Autoencoder, InfoVAE, SparseAutoencoder
from aefast.nn import MMDLoss
from aefast.train import Callback, TrainConfig, Trainer, TrainingError


class Branches(nn.Module):
    """An encoder of 16 features with running statistics, and a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.used = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.unused = nn.Linear(16, 10)

    def forward(self, x):
        return self.used(x)


MODELS = {
    "autoencoder": (Autoencoder, {"hidden": (8,)}),
    "infovae": (InfoVAE, {"hidden": (8,), "mmd_weight": 5.0}),
    "branches": (lambda **sizes: Autoencoder(**sizes, encoder=Branches()), {}),
    "sparse": (SparseAutoencoder, {"sparsity": "l1"}),
}


class _Stop(Callback):
    """This process asks for the end once a line of a step is logged."""

    def __init__(self, step):
        self.step = step

    def on_log(self, trainer, record):
        if record["step"] == self.step:
            trainer.stop()


class _Groups(Callback):
    """How many processes an MMD was of while the model was trained."""

    def on_log(self, trainer, record):
        self.found = [dist.get_world_size(m.group) for m in trainer.model.modules() if isinstance(m, MMDLoss)]


class _Signal(Callback):
    """This process gets a signal once a line of a step is logged."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_log(self, trainer, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


def loader(rank, generator):
    """Batches of 8 of 48 samples of a process of its own, in the order that a generator draws."""
    samples = torch.arange(48.0)[:, None].repeat(1, 16) / 48 + rank
    return torch.utils.data.DataLoader(samples, batch_size=8, shuffle=True, generator=generator)


def trainer(directory, model="autoencoder", callbacks=(), data=None, plots=False, grouped=False, **options):
    """On 6 batches an epoch, all whole, and 32 held-out samples; `grouped`, its MMD is of all processes beforehand."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    samples = torch.rand(224, 3, generator=generator) @ torch.rand(3, 16, generator=generator) / 3
    config = TrainConfig(
        **{"epochs": 3, "batch_size": 32, "log_every": 2, "device": "cpu", "lr": 1e-2, **options}
    )
    torch.manual_seed(0)
    make, of_model = MODELS[model]
    made = make(input_size=16, latent=4, **of_model)
    if grouped:
        made.mmd.group = dist.group.WORLD
    if data is None:
        data = Dataset("low-rank", samples, (4, 4), held_out=32)
    made = Trainer(made, data, config, directory, callbacks=callbacks, console=Console(quiet=True))
    if not plots:
        made._plot = lambda: None
    return made


def train(rank, ranks, meeting, directory, resume, signals, options):
    """A process of a run, which gets `signals[rank]`, (signal, step), if there is one; keeps what it ends with.

    With `stops` for an option, (rank, step), that process asks for the end; with `own_batches` each has a loader of its
    own samples.
    """
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    groups = _Groups()
    callbacks = [groups, *([_Signal(*signals[rank])] if rank in signals else [])]
    stopping, step = options.pop("stops", (None, None))
    if rank == stopping:
        callbacks.append(_Stop(step))
    seen = []
    if options.pop("own_batches", False):
        options["data"] = loader(rank, torch.Generator().manual_seed(rank))
    made = trainer(directory, callbacks=callbacks, **options)
    gradients = made.step._gradients

    def noted(batch):
        seen.append(batch[0][:, 0].clone())
        return gradients(batch)

    made.step._gradients = noted
    try:
        result = made.fit(resume=resume, compare=False)
        ending = {"step": result.step, "interrupted": result.interrupted}
    except TrainingError as error:
        ending = {"error": str(error)}
    ending["is_drawn"] = (directory / "plots" / "loss.png").exists()
    weights = torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])
    left = [dist.get_world_size(m.group) for m in made.model.modules() if isinstance(m, MMDLoss) and m.group]
    ending |= {"weights": weights, "groups": groups.found, "groups_left": left, "seen": seen}
    torch.save(ending, directory.with_name(f"{directory.name}-{rank}.pt"))
    # Tearing a broken group down may wait for the process that is lost.
    os._exit(0)
