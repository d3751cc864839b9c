"""Small real runs: a trainer on a few digits-sized samples."""

import pytest
import torch
from rich.console import Console

from aefast.data import Dataset
from aefast.models import Autoencoder
from aefast.train import TrainConfig, Trainer


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are so small that waking a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def dataset():
    """230 samples of 16 features: 207 to train on, 7 batches of at most 32; 23 held out."""
    generator = torch.Generator().manual_seed(5)
    low_rank = torch.rand(230, 3, generator=generator) @ torch.rand(3, 16, generator=generator)
    return Dataset("low-rank", low_rank / 3, (4, 4))


@pytest.fixture
def make_trainer(dataset):
    """Makes a trainer that writes into a folder, without plots unless asked; options go to TrainConfig.

    `model` is a model's class, and `model_options` what it gets besides its sizes.
    """

    def make(
        directory, *, model=Autoencoder, model_options=None, latent=4, data=dataset, plots=False, **options
    ):
        config = TrainConfig(**{"epochs": 3, "batch_size": 32, "log_every": 3, "device": "cpu", **options})
        torch.manual_seed(config.seed)
        network = model(input_size=data.features, hidden=(8,), latent=latent, **(model_options or {}))
        trainer = Trainer(network, data, config, directory, console=Console(quiet=True))
        if not plots:
            trainer._plot = lambda: None
        return trainer

    return make
