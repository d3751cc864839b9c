"""Training on data that stays in files, and on batches that something else makes."""

import importlib
import random
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from aefast.data import Blocks, DataError, Dataset, FileRows, load
from aefast.errors import InputError
from aefast.models import VAE, Autoencoder
from aefast.train import TrainConfig, Trainer
from aefast.train.source import Source
from support.processes import environment, run
from support.training import interrupt_after, losses, weights

# The package has a function of this name.
load_module = importlib.import_module("aefast.data.load")


@pytest.fixture
def shards(tmp_path, dataset, monkeypatch):
    """The samples of `dataset` in five files, which no memory holds, in blocks of 8 rows."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate(np.array_split(dataset.samples.numpy().reshape(-1, 4, 4), 5)):
        np.save(folder / f"{number}.npy", part)
    monkeypatch.setattr(load_module, "available_bytes", lambda: 0)
    monkeypatch.setattr(load_module, "block_rows_of", lambda row_bytes: 8)
    monkeypatch.setattr("aefast.data.blocks.WINDOW_BLOCKS", 4)
    return folder


@pytest.mark.parametrize("model", [Autoencoder, VAE])
@pytest.mark.parametrize("stop", [1, 4, 7, 12])
def test_a_run_on_shards_goes_on_bit_for_bit(make_trainer, tmp_path, monkeypatch, shards, model, stop):
    data = load(shards)
    assert isinstance(data.samples, FileRows)
    make_trainer(tmp_path / "whole", data=data, model=model, plots=True).fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        assert make_trainer(tmp_path / "parts", data=data, model=model).fit(compare=False).step == stop
    make_trainer(tmp_path / "parts", data=load(shards), model=model).fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert (tmp_path / "whole" / "plots" / "reconstructions.png").exists()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_memory_does_not_change_a_resumed_run(make_trainer, tmp_path, monkeypatch, shards, schedule):
    make_trainer(tmp_path / "whole", data=load(shards), schedule=schedule).fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        make_trainer(tmp_path / "parts", data=load(shards), schedule=schedule).fit(compare=False)
    monkeypatch.setattr(load_module, "available_bytes", lambda: 1 << 40)
    data = load(shards)
    assert isinstance(data.samples, torch.Tensor)
    trainer = make_trainer(tmp_path / "parts", data=data, schedule=schedule)
    assert isinstance(trainer.batches.rows, torch.Tensor)
    # Blocks and rows may hold out different numbers of samples.
    trainer.source.training.rows = trainer.source.training.rows[:-40]
    trainer.fit(resume=True, compare=False)
    assert isinstance(trainer.batches.rows, Blocks)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def loader(dataset, **options):
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(dataset.samples.reshape(-1, 4, 4), torch.zeros(len(dataset))),
        **{"batch_size": 32, "shuffle": True, "generator": generator, **options},
    )


@pytest.fixture
def train_on(dataset):
    """Makes a trainer on batches of whatever kind."""

    def make(data, directory, validation=None, **options):
        config = TrainConfig(**{"epochs": 3, "log_every": 3, "device": "cpu", **options})
        torch.manual_seed(0)
        model = VAE(input_size=16, hidden=(8,), latent=4)
        return Trainer(model, data, config, directory, validation=validation, console=Console(width=200))

    return make


def test_a_loader_trains_without_validation(train_on, tmp_path, dataset, capsys):
    result = train_on(loader(dataset), tmp_path).fit()
    assert result.step == 24
    assert result.held_out == {}
    assert result.comparison.aefast > 0
    records = losses(tmp_path)
    assert [record["step"] for record in records] == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    assert not any(name.startswith("val_") for record in records for name in record)
    assert (tmp_path / "plots" / "loss.png").exists()
    assert not (tmp_path / "plots" / "reconstructions.png").exists()
    assert "epoch 3/3" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_validation_on_data_of_its_own(train_on, tmp_path, dataset, kind):
    validation = (
        dataset if kind == "dataset" else loader(dataset, batch_size=50, shuffle=False, generator=None)
    )
    trainer = train_on(loader(dataset), tmp_path, validation)
    result = trainer.fit(compare=False)
    torch.manual_seed(0)
    with torch.no_grad():
        assert trainer.held_out is not None
        total = sum(len(batch) for batch in trainer.held_out.in_order())
    assert total == len(dataset)
    assert set(result.held_out) == {"loss", "reconstruction", "kl", "psnr", "elbo"}
    assert (tmp_path / "plots" / "reconstructions.png").exists()


def test_a_data_set_with_validation_of_its_own_is_trained_on_whole(train_on, tmp_path, dataset):
    trainer = train_on(dataset, tmp_path, Dataset("other", dataset.samples[:50], (16,)), batch_size=32)
    assert len(trainer.batches.rows) == 230
    assert len(trainer.held_out.rows) == 50
    assert trainer.fit(compare=False).step == 3 * 8


def test_each_process_has_samples(dataset):
    def source(count, processes):
        config = TrainConfig(batch_size=32, device="cpu")
        data = Dataset("few", dataset.samples[:count], (16,))
        return Source(data, dataset, 16, config, torch.device("cpu"), (0, processes))

    assert source(1, 1).steps_per_epoch() == source(2, 2).steps_per_epoch() == 1
    for count, processes in ((0, 1), (1, 2)):
        message = rf"dataset: expected at least {processes} samples to train on.*got {count}"
        with pytest.raises(InputError, match=message):
            source(count, processes)


SOURCES = {
    "own generator": loader,
    "global generator": lambda dataset: loader(dataset, generator=None),
    "list": lambda dataset: list(dataset.samples.split(32)),
    "function": lambda dataset: lambda: iter(dataset.samples.split(32)),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("stop", [1, 3, 8, 12])
def test_a_run_on_batches_goes_on_bit_for_bit(train_on, tmp_path, monkeypatch, dataset, capsys, kind, stop):
    def trainer(name):
        validation = loader(dataset, generator=None)
        return train_on(SOURCES[kind](dataset), tmp_path / name, validation)

    trainer("whole").fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        assert trainer("parts").fit(compare=False).step == stop
    capsys.readouterr()
    trainer("parts").fit(resume=True, compare=False)
    assert (
        f"notice: reading the first {(stop - 1) % 8 + 1} batches of this epoch again"
        in capsys.readouterr().out
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


class Shuffled:
    """Samples in an order that is drawn as an epoch begins, with noise that is drawn with each batch."""

    def __init__(self, dataset, permutation, uniform):
        self.dataset, self.permutation, self.uniform = dataset, permutation, uniform

    def __iter__(self):
        for rows in np.array_split(self.permutation(len(self.dataset)), 8):
            yield self.dataset.samples[torch.as_tensor(rows)] + 0.01 * self.uniform()


SHUFFLED = {
    "numpy": lambda dataset: Shuffled(dataset, np.random.permutation, np.random.random),
    "python": lambda dataset: Shuffled(
        dataset, lambda count: random.sample(range(count), count), random.random
    ),
}


def seed_all(seed):
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture
def interrupted_and_resumed(train_on, tmp_path, monkeypatch, dataset, capsys):
    """Trains on what `make` returns in one go and in two, which end after step `stop`; what the second one says."""

    def train(make, stop):
        def trainer(name, seed):
            seed_all(seed)
            return train_on(make(dataset), tmp_path / name, make(dataset), seed=3)

        trainer("whole", 0).fit(compare=False)
        with monkeypatch.context() as patch:
            interrupt_after(patch, stop)
            assert trainer("parts", 0).fit(compare=False).step == stop
        capsys.readouterr()
        trainer("parts", 1).fit(resume=True, compare=False)
        return capsys.readouterr().out

    return train


@pytest.mark.parametrize("kind", SHUFFLED)
@pytest.mark.parametrize("stop", [1, 3, 8, 12])
def test_orders_of_global_generators_go_on_bit_for_bit(interrupted_and_resumed, tmp_path, kind, stop):
    assert "other batches" not in interrupted_and_resumed(SHUFFLED[kind], stop)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("stop", "differs"), [(3, False), (12, True)])
def test_other_batches_than_before_are_told(interrupted_and_resumed, stop, differs):
    def hidden(dataset):
        generator = np.random.default_rng(0)
        return Shuffled(dataset, generator.permutation, generator.random)

    told = interrupted_and_resumed(hidden, stop)
    notice = (
        "notice: dataset: the iterable gave other batches than before (batch 3 of epoch 1); the run goes on"
    )
    assert (notice in told) == differs
    assert ("other batches" in told) == differs


def test_checkpoints_without_states_of_numpy_are_gone_on_with(monkeypatch, tmp_path, dataset, train_on):
    iterable = importlib.import_module("aefast.data.iterable")
    to_bytes = iterable._to_bytes

    def older(content):
        return to_bytes({key: content[key] for key in content if key not in ("others_before", "last")})

    seed_all(0)
    with monkeypatch.context() as patch:
        patch.setattr(iterable, "_to_bytes", older)
        patch.setattr("aefast.train.trainer.other_states", dict)
        interrupt_after(patch, 12)
        train_on(SHUFFLED["numpy"](dataset), tmp_path).fit(compare=False)
    assert train_on(SHUFFLED["numpy"](dataset), tmp_path).fit(resume=True, compare=False).step == 24


@pytest.mark.parametrize("stop", [3, 8, 12])
def test_validation_on_a_shuffled_part_goes_on_bit_for_bit(train_on, tmp_path, monkeypatch, dataset, stop):
    """One generator for both loaders, and a last batch of other samples that validation drops."""

    def trainer(name):
        generator = torch.Generator().manual_seed(3)
        validation = loader(dataset, batch_size=50, drop_last=True, generator=generator)
        return train_on(loader(dataset, generator=generator), tmp_path / name, validation)

    trainer("whole").fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        assert trainer("parts").fit(compare=False).step == stop
    trainer("parts").fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_generators_of_validation_are_the_runs(train_on, tmp_path, dataset):
    def trainer(name, seed, **options):
        generator = torch.Generator().manual_seed(seed)
        validation = loader(dataset, batch_size=50, drop_last=True, generator=generator)
        return train_on(dataset, tmp_path / name, validation, batch_size=32, **options)

    trainer("whole", 3).fit(compare=False)
    trainer("parts", 3, epochs=1).fit(compare=False)
    trainer("parts", 4).fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_loader_of_another_length_is_another_run(train_on, tmp_path, dataset):
    train_on(loader(dataset), tmp_path, epochs=1).fit(compare=False)
    with pytest.raises(
        InputError,
        match=r"data='DataLoader': .* expected DataLoader of 8 batches, got DataLoader of 10 batches",
    ):
        train_on(loader(dataset, batch_size=24), tmp_path).fit(resume=True, compare=False)


def test_another_split_is_another_run(train_on, tmp_path, dataset):
    def split(held_out):
        return Dataset("x", dataset.samples, (16,), held_out)

    def other(count):
        return Dataset("other", dataset.samples[:count], (16,))

    given = {
        "part": (dataset, None),
        "last 23": (split(23), None),
        "last 40": (split(40), None),
        "other": (dataset, other(50)),
        "shorter": (dataset, other(40)),
        "batches": (dataset, loader(other(50))),
        "loader": (loader(dataset), None),
        "loader, other": (loader(dataset), other(50)),
    }
    for before, after, message in (
        # As many as are drawn.
        ("part", "last 23", "validation: .*: expected a drawn part, got the last 23 samples;"),
        ("last 23", "last 40", "expected the last 23 samples, got the last 40 samples;"),
        ("part", "other", "expected a drawn part, got 50 samples of 16 features;"),
        ("other", "part", "expected 50 samples of 16 features, got a drawn part;"),
        ("other", "shorter", "these are not the held-out samples .* expected 50 samples .*, got 40 samples"),
        ("other", "batches", "expected 50 samples of 16 features, got DataLoader of 2 batches;"),
        ("loader", "loader, other", "validation: .* expected none, got 50 samples of 16 features;"),
        ("part", "loader", "data='DataLoader': .* expected 230 samples .*, got DataLoader of 8 batches;"),
        ("loader", "part", "data='low-rank': .* expected DataLoader of 8 batches, got 230 samples of"),
    ):
        run = tmp_path / before
        if not run.exists():
            train_on(given[before][0], run, given[before][1], epochs=1).fit(compare=False)
        with pytest.raises(InputError, match=message):
            train_on(given[after][0], run, given[after][1]).fit(resume=True, compare=False)


def test_what_is_no_data_is_named(train_on, tmp_path, dataset):
    with pytest.raises(DataError, match="dataset=3: expected a Dataset or an iterable of batches"):
        train_on(3, tmp_path)
    with pytest.raises(DataError, match="validation=3: expected a Dataset or an iterable of batches"):
        train_on(dataset, tmp_path, 3)
    with pytest.raises(InputError, match=r"validation: expected 16 features a sample.*got 2"):
        train_on(dataset, tmp_path, Dataset("x", torch.rand(5, 2), (2,)))
    with pytest.raises(DataError, match=r"dataset: batch 0 of epoch 0: expected shape .* got \(3, 2\)"):
        train_on([torch.rand(3, 2)], tmp_path).fit(compare=False)


def test_the_progress_bar_of_a_source_without_length(train_on, tmp_path, dataset):
    trainer = train_on(SOURCES["function"](dataset), tmp_path, epochs=1)
    trainer.console = Console(force_terminal=True, width=200, file=open(tmp_path / "shown", "w"))  # noqa: SIM115
    assert trainer.fit(compare=False).step == 8
    trainer.console.file.close()
    assert "samples/s" in (tmp_path / "shown").read_text()


LARGE = """
import os, signal, sys, threading
import torch
from rich.console import Console
from aefast.data import load
from aefast.models import Autoencoder
from aefast.train import TrainConfig, Trainer, CapturedStep

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("RssAnon"))

dataset = load(sys.argv[1])
model = Autoencoder(input_size=dataset.features, hidden=(64,), latent=16)
trainer = Trainer(model, dataset, TrainConfig(device="cpu"), sys.argv[2], console=Console(quiet=True))
step, peak = CapturedStep.__call__, 0

def measured(self, batch):
    global peak
    peak = max(peak, anonymous())
    if trainer.steps_taken == 199:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, batch)

CapturedStep.__call__ = measured
assert trainer.fit(compare=False).step == 200
print("peak", peak, type(dataset.samples).__name__, dataset.block_rows)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_large_files_take_little_memory(tmp_path, dtype):
    """A file twice as large as the memory that is free, in which only the header takes space on the disk."""
    path = tmp_path / "large.npy"
    features = 784
    nbytes = 2 * load_module.available_bytes()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False}
    header["shape"] = (nbytes // (features * np.dtype(dtype).itemsize), features)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + nbytes)
    done = run([sys.executable, "-c", LARGE, path, tmp_path / "run"], env=environment())
    assert done.returncode == 0, done.stdout
    _, peak, kind, block_rows = done.stdout.splitlines()[-1].split()
    assert kind == "ArrayRows"
    assert int(block_rows) > 1
    # PyTorch itself takes some 250 MB.
    assert int(peak) < 1500
