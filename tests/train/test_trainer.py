"""Training runs: what they write, how they stop, and that they go on as if they had not."""

import dataclasses
import errno
import io
import json
import math
import os
import signal
import stat
import sys
import time
import types

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn

from aefast import _library
from aefast.bench import memory
from aefast.data import Dataset
from aefast.errors import InputError
from aefast.models import (
    VAE,
    Autoencoder,
    DenoisingAutoencoder,
    InfoVAE,
    SparseAutoencoder,
    SparseConfig,
    StochasticAutoencoder,
    _base,
    from_pretrained,
)
from aefast.train import (
    Callback,
    CapturedStep,
    CheckpointError,
    TensorBoard,
    TrainConfig,
    Trainer,
    TrainingError,
)
from aefast.train import trainer as trainer_module
from aefast.train.checkpoint import _checksum
from aefast.train.interrupt import Interrupt
from aefast.train.metrics import MetricsLog, Window, held_out_measures, peak_of, read_metrics, variance_of
from aefast.train.processes import Processes
from aefast.train.step import EagerStep, make_optimizer
from support.training import SPARSE, interrupt_after, interrupt_in_validation, losses, metrics, weights


def test_a_run_leaves_everything(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", epochs=4, lr=1e-2, plots=True)
    result = trainer.fit(compare=False)
    assert (result.step, result.interrupted, result.comparison) == (28, None, None)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "plots",
    ]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-0000000007.safetensors",
        "step-0000000028.safetensors",
    ]
    trained = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
    assert torch.equal(weights(run), trained)
    assert json.loads((run / "config.json").read_text())["metadata"]["training"]["lr"] == 1e-2


def test_metrics_have_a_line_a_log_step(make_trainer, tmp_path, dataset):
    make_trainer(tmp_path, epochs=2).fit(compare=False)
    records = metrics(tmp_path)
    # Every third step, and the seventh, with which an epoch ends.
    assert [(record["step"], record["epoch"]) for record in records] == [
        (3, 1),
        (6, 1),
        (7, 1),
        (9, 2),
        (12, 2),
        (14, 2),
    ]
    assert [record["step"] for record in records if "val_loss" in record] == [7, 14]
    for record in records:
        assert record["loss"] == record["mse"] > 0
        assert record["samples_per_s"] > 0
    model = from_pretrained(tmp_path)
    held_out = dataset.samples[dataset.split()[1]]
    with torch.no_grad():
        error = model(held_out).loss.item()
    assert records[-1]["val_loss"] == pytest.approx(error, rel=1e-5)
    assert records[-1]["val_psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-5)
    assert records[-1]["val_loss"] < records[2]["val_loss"]


def test_metrics_tell_the_rate_of_the_last_step(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, epochs=2, lr=0.01, schedule="linear", warmup_steps=4)
    trainer.fit(compare=False)
    # A step of each line sets the optimizer's from the schedule, and 10 steps after the warm-up bring it to 0.
    shares = {step: 1 - (step - 1 - 4) / 10 for step in (6, 7, 9, 12, 14)} | {3: 3 / 4}
    for record in metrics(tmp_path):
        assert record["lr"] == pytest.approx(0.01 * shares[record["step"]])
    assert record["lr"] == pytest.approx(trainer.step.optimizer.param_groups[0]["lr"])


def test_window_means_weigh_samples(monkeypatch):
    seconds = 10.0
    monkeypatch.setattr("time.perf_counter", lambda: seconds)
    window = Window()
    window.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)}, 3)
    window.add({"a": torch.tensor(5.0), "b": torch.tensor(8.0)}, 1)
    assert window.means() == {"a": 2.0, "b": 5.0}
    copy = Window()
    state = json.loads(json.dumps(window.state()))
    copy.restore(state, torch.device("cpu"))
    # Those before took a time that nobody knows.
    assert copy.samples_per_s() is None
    copy.add({"a": torch.tensor(2.0), "b": torch.tensor(0.0)}, 1)
    assert copy.means() == {"a": 2.0, "b": 4.0}
    seconds += 2.0
    assert copy.samples_per_s() == 0.5
    # The sums are those of all processes: one of them goes on with them.
    other = Processes()
    other.rank = 1
    copy = Window(other)
    copy.restore(state, torch.device("cpu"))
    copy.add({"a": torch.tensor(7.0), "b": torch.tensor(1.0)}, 2)
    assert copy.means() == {"a": 7.0, "b": 1.0}


@pytest.mark.parametrize(
    ("low", "high", "peak"),
    [(0.2, 0.8, 1.0), (0.0, 1.0, 1.0), (-1.0, 3.0, 4.0), (0.0, 255.0, 255.0), (7.0, 7.0, 1.0)],
)
def test_psnr_refers_to_the_range_of_the_data(low, high, peak):
    batches = [torch.tensor([[low, low]]), torch.tensor([[high, low], [low, low]])]
    assert peak_of(batches) == pytest.approx(peak)


def test_the_variance_is_of_all_batches_together():
    samples = 1e5 + torch.randn(23, 3, generator=torch.Generator().manual_seed(0))
    expected = samples.double().var(0, unbiased=False).mean().item()
    for size in (1, 5, 23):
        assert variance_of(samples.split(size), Processes()) == pytest.approx(expected, rel=1e-9)
        assert variance_of(samples[:1].expand(23, 3).split(size), Processes()) == 0.0


def test_measures_are_told_in_db():
    means = {"loss": 3.0, "mse": 0.01, "noisy_mse": 0.04, "elbo": -7.0}
    assert held_out_measures(means, 1.0) == pytest.approx(
        {"loss": 3.0, "psnr": 20.0, "noisy_psnr": 13.9794, "elbo": -7.0}
    )
    assert held_out_measures({"loss": 0.0, "mse": 0.0}, 1.0) == {"loss": 0.0}
    assert held_out_measures({"mse": 0.01}, 10.0) == pytest.approx({"psnr": 40.0})


STOCHASTIC = {
    "vae": (VAE, {"likelihood": "gaussian", "kl_warmup_steps": 15}),
    "infovae": (InfoVAE, {"likelihood": "gaussian", "kl_weight": 0.5, "kl_warmup_steps": 15}),
    "denoising": (DenoisingAutoencoder, {"noise": "masking", "noise_block": 2, "image_shape": (1, 4, 4)}),
    "stochastic": (StochasticAutoencoder, {}),
}
MEASURES = {
    "vae": {"val_loss", "val_reconstruction", "val_kl", "val_psnr", "val_elbo"},
    "infovae": {"val_loss", "val_reconstruction", "val_kl", "val_psnr", "val_elbo", "val_mmd"},
    "denoising": {"val_loss", "val_psnr", "val_noisy_psnr"},
    "stochastic": {"val_loss", "val_psnr"},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_models_with_noise_go_on_bit_for_bit(make_trainer, tmp_path, monkeypatch, name):
    model, options = STOCHASTIC[name]
    which = {"model": model, "model_options": options}
    make_trainer(tmp_path / "whole", **which).fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        assert make_trainer(tmp_path / "parts", **which).fit(compare=False).step == 10
    trainer = make_trainer(tmp_path / "parts", **which)
    trainer.fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    if name in ("vae", "infovae"):
        assert trainer.model.training_steps == 21
        assert from_pretrained(tmp_path / "parts").training_steps == 21


@pytest.mark.parametrize("name", STOCHASTIC)
def test_models_with_noise_tell_their_measures(make_trainer, tmp_path, dataset, name):
    model, options = STOCHASTIC[name]
    trainer = make_trainer(tmp_path, model=model, model_options=options, plots=True, epochs=2)
    result = trainer.fit(compare=False)
    records = [record for record in metrics(tmp_path) if "val_loss" in record]
    assert len(records) == 2
    for record in records:
        assert {key for key in record if key.startswith("val_")} == MEASURES[name]
        assert record["loss"] == pytest.approx(
            sum(record[term] for term in ("mse", "reconstruction", "kl", "mmd") if term in record)
        )
    assert result.held_out == {key.removeprefix("val_"): records[-1][key] for key in MEASURES[name]}

    # The noise of every validation is that of the run's seed.
    held_out = dataset.samples[dataset.split()[1]]
    torch.manual_seed(0)
    with torch.no_grad():
        expected = from_pretrained(tmp_path).evaluate(held_out)
    assert result.held_out["loss"] == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert result.held_out["psnr"] == pytest.approx(-10 * math.log10(expected["mse"]), rel=1e-5)
    if name == "denoising":
        assert records[0]["val_noisy_psnr"] == records[1]["val_noisy_psnr"]
    share, colours = ink(tmp_path / "plots" / "reconstructions.png")
    assert share > 0.01
    assert colours > 20


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_resumed_run_without_steps_left_tells_what_was_measured(make_trainer, tmp_path, name):
    model, options = STOCHASTIC[name]
    which = {"model": model, "model_options": options, "epochs": 1}
    first = make_trainer(tmp_path, **which).fit(compare=False)
    assert make_trainer(tmp_path, **which).fit(resume=True, compare=False).held_out == first.held_out


@pytest.mark.parametrize("name", STOCHASTIC)
def test_models_with_noise_are_compared(make_trainer, tmp_path, monkeypatch, name):
    monkeypatch.setattr("aefast.train.compare.RUN_SECONDS", 0.002)
    model, options = STOCHASTIC[name]
    trainer = make_trainer(tmp_path, model=model, model_options=options, epochs=1)
    assert trainer.fit().comparison.aefast > 0
    if name in ("vae", "infovae"):
        assert trainer.model.training_steps == 7


@pytest.mark.parametrize(
    ("precision", "instructions", "is_told"),
    [("bf16", "avx2", True), ("bf16", "amx", False), ("bf16", "avx512bf16", False), ("fp32", "avx2", False)],
)
def test_a_precision_that_changes_nothing_is_told(
    make_trainer, tmp_path, monkeypatch, capsys, precision, instructions, is_told
):
    if _library.load("cpu") is not None:
        pytest.skip("needs the CPU library")
    library = types.SimpleNamespace(instruction_set=lambda: instructions)
    trainer = make_trainer(tmp_path, epochs=1, precision=precision)
    trainer.console = Console()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "ops", types.SimpleNamespace(aefast_cpu=library))
        told = _library.keeps_to_float32()
    monkeypatch.setattr(_library, "keeps_to_float32", lambda: told)
    trainer.fit(compare=False)
    text = "notice: precision='bf16' leaves aefast's products in float32 on this processor (kernels: avx2)"
    assert (text in capsys.readouterr().out) == is_told


def test_a_run_leaves_the_model_in_eval_mode(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, epochs=2)
    frozen = trainer.model.encoder.layers[0].eval()
    interrupt_after(monkeypatch, 3)
    assert trainer.fit(compare=False).interrupted is not None
    assert not any(one.training for one in trainer.model.modules())
    seen = []
    trainer.callbacks.append(ModesSeen(seen))
    trainer.fit(resume=True, compare=False)
    assert not any(one.training for one in trainer.model.modules())
    expected = {one: one is not frozen for one in trainer.model.modules()}
    assert seen == [expected, expected]


class ModesSeen(Callback):
    def __init__(self, seen):
        self.seen = seen

    def on_epoch_end(self, trainer, record):
        self.seen.append({one: one.training for one in trainer.model.modules()})


def test_a_run_that_fails_leaves_the_model_in_eval_mode(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, lr=1e30)
    with pytest.raises(TrainingError):
        trainer.fit(compare=False)
    assert not any(one.training for one in trainer.model.modules())


def test_other_losses_are_not_compared_with(make_trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_base, "MODELS", {**_base.MODELS})

    @_base.register("doubled")
    class Doubled(VAE):
        def forward(self, x):
            output = super().forward(x)
            terms = {name: 2 * term for name, term in output.terms.items()}
            return dataclasses.replace(output, loss=2 * output.loss, terms=terms)

    trainer = make_trainer(tmp_path, model=Doubled, epochs=1)
    trainer.console = Console()
    result = trainer.fit()
    assert result.comparison is None
    assert "elbo" not in result.held_out
    assert "notice: no comparison with eager PyTorch, since Doubled has" in capsys.readouterr().out
    assert type(from_pretrained(tmp_path)) is Doubled


@pytest.mark.parametrize("accumulate", [1, 2])
def test_terms_that_are_no_parts_of_the_loss_leave_it_as_it_is(
    make_trainer, tmp_path, monkeypatch, accumulate
):
    monkeypatch.setattr(_base, "MODELS", {**_base.MODELS})

    @_base.register("watched")
    class Watched(VAE):
        def forward(self, x):
            output = super().forward(x)
            terms = {"kl": output.terms["kl"], "active_units": output.loss.new_tensor(4.0)}
            return dataclasses.replace(output, terms=terms)

    for name, model in (("plain", VAE), ("watched", Watched)):
        make_trainer(tmp_path / name, model=model, accumulate=accumulate).fit(compare=False)
    plain, watched = losses(tmp_path / "plain"), losses(tmp_path / "watched")
    assert [one["loss"] for one in watched] == pytest.approx([one["loss"] for one in plain], rel=1e-6)
    assert [one["kl"] for one in watched] == pytest.approx([one["kl"] for one in plain], rel=1e-6)
    assert all(one["active_units"] == 4.0 for one in watched)


def test_a_denoiser_is_validated_by_a_forward_of_its_own(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(_base, "MODELS", {**_base.MODELS})

    @_base.register("shifted")
    class Shifted(DenoisingAutoencoder):
        def forward(self, x):
            output = super().forward(x)
            return dataclasses.replace(output, loss=output.loss + 100.0)

    trainer = make_trainer(tmp_path, model=Shifted, epochs=1)
    held_out = trainer.fit(compare=False).held_out
    assert held_out["loss"] > 100.0
    assert losses(tmp_path)[-1]["loss"] > 100.0
    assert "noisy_psnr" not in held_out


def test_noisy_vectors_are_plotted_too(make_trainer, tmp_path, dataset):
    data = Dataset("vectors", dataset.samples, (16,))
    make_trainer(tmp_path, model=DenoisingAutoencoder, data=data, epochs=1, plots=True).fit(compare=False)
    share, colours = ink(tmp_path / "plots" / "reconstructions.png")
    assert share > 0.01
    assert colours > 20


def test_metrics_log_knows_its_size_after_a_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    log = MetricsLog(path, size=12)
    assert log.size == 12
    log.write({"step": 3})
    assert log.size == path.stat().st_size == 24
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


def test_validation_noise_is_its_own(make_trainer, tmp_path, monkeypatch):
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, x: encode(self, x + 0.1 * torch.randn_like(x)))
    trainer = make_trainer(tmp_path)
    before = torch.get_rng_state()
    first = trainer._validate(Interrupt())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert trainer._validate(Interrupt()) == first
    assert trainer.model.training


def ink(path):
    """Share of the picture's pixels that are not white, and how many colours it has."""
    pixels = imread(path)[..., :3]
    return (pixels.min(axis=-1) < 0.95).mean(), len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.mark.parametrize(
    "shape", [(4, 4), (16,), (1, 4, 4), (2, 8)], ids=["grey", "vector", "channels-first", "wide"]
)
def test_plots_show_something(make_trainer, tmp_path, dataset, shape):
    data = Dataset("shaped", dataset.samples, shape)
    make_trainer(tmp_path, data=data, epochs=2, plots=True).fit(compare=False)
    for name in ("reconstructions.png", "loss.png"):
        share, colours = ink(tmp_path / "plots" / name)
        assert share > 0.01
        assert colours > 20


def test_plots_of_colour_images(make_trainer, tmp_path):
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(60, 3 * 5 * 5, generator=generator)
    # Of flat samples the model tells what images they are.
    for shape, options in (((3, 5, 5), {}), ((5, 5, 3), {}), ((75,), {"image_shape": (3, 5, 5)})):
        data = Dataset("colour", samples, shape)
        make_trainer(tmp_path, data=data, model_options=options, epochs=1, plots=True).fit(
            compare=False, overwrite=True
        )
        pixels = imread(tmp_path / "plots" / "reconstructions.png")[..., :3]
        assert (np.ptp(pixels, axis=-1) > 0.3).mean() > 0.05


def test_without_matplotlib_a_run_says_so_and_ends_well(make_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = make_trainer(tmp_path, epochs=1, plots=True)
    trainer.console = Console(width=1000)
    assert trainer.fit(compare=False).step == 7
    assert 'pip install "aefast[train]"' in capsys.readouterr().out


def test_progress_bar_on_a_terminal(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    trainer.fit(compare=False)
    shown = trainer.console.file.getvalue()
    last = metrics(tmp_path)[-1]
    assert "epoch 3/3" in shown
    assert "100%" in shown
    assert f"loss {last['loss']:.5f} · held out {last['val_loss']:.5f}" in shown
    assert "samples/s" in shown


def test_the_same_seed_gives_the_same_run(make_trainer, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_trainer(tmp_path / name, seed=seed).fit(compare=False)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("stop", [1, 4, 7, 8, 13, 20])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_bit_for_bit(make_trainer, tmp_path, monkeypatch, stop, number):
    make_trainer(tmp_path / "whole").fit(compare=False)

    with monkeypatch.context() as patch:
        interrupt_after(patch, stop, number)
        result = make_trainer(tmp_path / "parts").fit(compare=False)
    assert result.interrupted is number
    assert result.step == stop
    from_pretrained(tmp_path / "parts")

    torch.manual_seed(99)
    result = make_trainer(tmp_path / "parts").fit(resume=True, compare=False)
    assert (result.step, result.interrupted) == (21, None)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_interrupted_again_and_again(make_trainer, tmp_path, monkeypatch):
    make_trainer(tmp_path / "whole").fit(compare=False)
    for _ in range(10):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2)
            make_trainer(tmp_path / "parts").fit(resume=True, compare=False)
    make_trainer(tmp_path / "parts").fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_interrupted_validation_is_done_by_the_resumed_run(make_trainer, tmp_path, monkeypatch, capsys):
    make_trainer(tmp_path / "whole").fit(compare=False)
    trainer = make_trainer(tmp_path / "parts")
    interrupt_in_validation(monkeypatch, trainer, 14)
    assert trainer.fit(compare=False).step == 14
    assert [record["step"] for record in metrics(tmp_path / "parts")][-1] == 12
    resumed = make_trainer(tmp_path / "parts")
    resumed.console = Console(width=1000)
    resumed.fit(resume=True, compare=False)
    # What the resumed run measured first, it had not trained itself.
    records = {record["step"]: record for record in metrics(tmp_path / "parts")}
    assert "samples_per_s" not in records[14] and records[21]["samples_per_s"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 2/3")]
    assert len(lines) == 1 and "held out" in lines[0] and "samples/s" not in lines[0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("stop", [10, "validation"])
def test_a_run_of_steps_that_was_interrupted_at_its_end_is_validated(
    make_trainer, tmp_path, monkeypatch, stop
):
    options = {"steps": 10, "keep_best": True}
    make_trainer(tmp_path / "whole", **options).fit(compare=False)
    with monkeypatch.context() as patch:
        trainer = make_trainer(tmp_path / "parts", **options)
        if stop == "validation":
            interrupt_in_validation(patch, trainer, 10)
        else:
            interrupt_after(patch, stop)
        assert trainer.fit(compare=False).interrupted is signal.SIGINT
    result = make_trainer(tmp_path / "parts", **options).fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert result.held_out["loss"] == metrics(tmp_path / "whole")[-1]["val_loss"]
    assert torch.equal(weights(tmp_path / "parts" / "best"), weights(tmp_path / "whole" / "best"))
    # And once is enough.
    make_trainer(tmp_path / "parts", **options).fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_that_gets_fewer_steps_than_it_took_is_left_as_it_is(
    make_trainer, tmp_path, monkeypatch, capsys
):
    make_trainer(tmp_path / "whole", steps=12).fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        make_trainer(tmp_path / "parts", steps=12).fit(compare=False)
    for options in ({"steps": 5}, {"epochs": 1}):
        trainer = make_trainer(tmp_path / "parts", **options)
        trainer.console = Console()
        assert trainer.fit(resume=True, compare=False).step == 8
        assert "nothing left to train" in capsys.readouterr().out
    make_trainer(tmp_path / "parts", steps=12).fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_that_gets_more_steps_logs_no_empty_line(make_trainer, tmp_path):
    """Its first part ended within an epoch, with a line that was due."""
    make_trainer(tmp_path, steps=6).fit(compare=False)
    make_trainer(tmp_path, steps=9).fit(resume=True, compare=False)
    assert [record["step"] for record in metrics(tmp_path)] == [3, 6, 7, 9]
    assert all(record["loss"] > 0 for record in metrics(tmp_path))


def test_a_loss_of_three_terms_goes_on_bit_for_bit(make_trainer, tmp_path, monkeypatch):
    """Added in one order, and told in it."""
    which = {"model": InfoVAE, "model_options": {"kl_weight": 0.3, "mmd_weight": 3.0}, "log_every": 7}
    make_trainer(tmp_path / "whole", **which).fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        make_trainer(tmp_path / "parts", **which).fit(compare=False)
    make_trainer(tmp_path / "parts", **which).fit(resume=True, compare=False)
    assert [list(one.items()) for one in losses(tmp_path / "parts")] == [
        list(one.items()) for one in losses(tmp_path / "whole")
    ]


def test_a_trainer_that_has_trained_starts_no_other_run(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.fit(compare=False)
    kept = losses(tmp_path)
    with pytest.raises(InputError, match="overwrite=True, resume=False: this Trainer has taken 7 steps"):
        trainer.fit(overwrite=True, compare=False)
    assert losses(tmp_path) == kept and list((tmp_path / "checkpoints").iterdir())


def test_a_stopped_trainer_goes_on(make_trainer, tmp_path):
    class Stop(Callback):
        def on_log(self, trainer, record):
            if record["step"] == 3:
                trainer.stop()

    trainer = make_trainer(tmp_path)
    trainer.callbacks = [Stop()]
    assert trainer.fit(compare=False).step < 7
    assert trainer.fit(resume=True, compare=False).step == 21


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file", "elsewhere"),
    ],
)
def test_errors_of_others_are_not_of_the_folder(make_trainer, tmp_path, error):
    class Fail(Callback):
        def on_log(self, trainer, record):
            raise error

    trainer = make_trainer(tmp_path)
    trainer.callbacks = [Fail()]
    with pytest.raises(OSError) as raised:
        trainer.fit(compare=False)
    assert raised.value is error


@pytest.mark.parametrize("told", [(errno.ENOSPC, "disk full"), ("disk full",)])
@pytest.mark.parametrize("what", ["plot", "tensorboard", "rename"])
def test_a_disk_that_is_full_is_the_folders(make_trainer, tmp_path, monkeypatch, told, what):
    def fail(*arguments, **options):
        raise OSError(*told)

    trainer = make_trainer(tmp_path, epochs=1, plots=True)
    if what == "plot":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
        file = tmp_path / "plots" / "reconstructions.png"
    elif what == "tensorboard":
        file = tmp_path / "tensorboard"
        monkeypatch.setattr(pytest.importorskip("torch.utils.tensorboard").SummaryWriter, "flush", fail)
        trainer.callbacks = [TensorBoard(file)]
    else:
        fsync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda one: fail() if stat.S_ISDIR(os.fstat(one).st_mode) else fsync(one)
        )
        file = f"{tmp_path / 'checkpoints'}/step-0000000007.safetensors"
    with pytest.raises(InputError, match=rf"cannot read or write {file} \(disk full\)"):
        trainer.fit(compare=False)


@pytest.mark.parametrize("held_out", [0, 230, -1])
def test_a_split_leaves_something_to_both_sides(make_trainer, tmp_path, dataset, held_out):
    with pytest.raises(InputError, match=f"held_out={held_out}: expected from 1 to below .* 230"):
        make_trainer(tmp_path, data=dataclasses.replace(dataset, held_out=held_out))
    single = Dataset("one", torch.ones(1, 16), (16,))
    with pytest.raises(InputError, match="data='one': expected at least 2 samples to split, got 1"):
        make_trainer(tmp_path, data=single)


def test_a_torn_line_of_metrics_is_cut(make_trainer, tmp_path, monkeypatch):
    """As a machine that lost its power leaves it, whose checkpoint is whole."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        make_trainer(tmp_path).fit(compare=False)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    make_trainer(tmp_path).fit(resume=True, compare=False)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    # The line that was torn is lost, and no other.
    assert [record["step"] for record in records] == [3, 6, 9, 12, 14, 15, 18, 21]


def test_handlers_that_python_did_not_set_give_way_to_the_default(monkeypatch):
    """It tells None of them, and cannot put them back."""
    put = []

    def set_handler(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")
        put.append((number, handler))

    monkeypatch.setattr(signal, "signal", set_handler)
    with Interrupt():
        pass
    assert put[2:] == [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL)]


@pytest.mark.parametrize("stop", [4, 14])
def test_noise_goes_on_bit_for_bit(make_trainer, tmp_path, monkeypatch, stop):
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, x: encode(self, x + 0.1 * torch.randn_like(x)))
    make_trainer(tmp_path / "whole").fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        assert make_trainer(tmp_path / "parts").fit(compare=False).step == stop
    make_trainer(tmp_path / "parts").fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_lines_after_the_checkpoint_are_cut(make_trainer, tmp_path):
    """A killed run has logged more than its checkpoint knows."""
    make_trainer(tmp_path, epochs=2).fit(compare=False)
    before = losses(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "epoch": 9, "loss": 1.0}\n{"step": 10')
    make_trainer(tmp_path, epochs=3).fit(resume=True, compare=False)
    assert losses(tmp_path)[: len(before)] == before
    assert [record["step"] for record in metrics(tmp_path)] == [3, 6, 7, 9, 12, 14, 15, 18, 21]


def test_more_epochs_extend_a_finished_run(make_trainer, tmp_path):
    make_trainer(tmp_path / "whole", epochs=5).fit(compare=False)
    make_trainer(tmp_path / "parts", epochs=2).fit(compare=False)
    make_trainer(tmp_path / "parts", epochs=5).fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_nothing_left_to_train(make_trainer, tmp_path, capsys):
    make_trainer(tmp_path).fit(compare=False)
    before = weights(tmp_path)
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.console = Console()
    assert trainer.fit(resume=True, compare=False).step == 21
    assert "nothing left to train" in capsys.readouterr().out
    assert torch.equal(weights(tmp_path), before)


@pytest.fixture
def always_saved(monkeypatch):
    """With `checkpoint_seconds` of next to nothing, there is a checkpoint after each step, however long one takes."""
    monkeypatch.setattr("aefast.train.trainer.SAVES_APART", 0)


def test_a_checkpoint_at_least_every_so_often(make_trainer, tmp_path, monkeypatch, always_saved):
    saved = []
    trainer = make_trainer(tmp_path, epochs=1, checkpoint_seconds=1e-9)
    original = trainer.store.save
    monkeypatch.setattr(
        trainer.store, "save", lambda checkpoint: saved.append(checkpoint.step) or original(checkpoint)
    )
    trainer.fit(compare=False)
    assert saved == [1, 2, 3, 4, 5, 6, 7, 7]
    assert [path.name for path in trainer.store.paths()] == [
        "step-0000000006.safetensors",
        "step-0000000007.safetensors",
    ]


def test_checkpoints_that_take_long_are_further_apart(make_trainer, tmp_path, monkeypatch):
    """A step takes a second, and a checkpoint five."""
    now, saved = [0.0], []

    def timed(function, seconds):
        def call(*args):
            now[0] += seconds
            return function(*args)

        return call

    trainer = make_trainer(tmp_path, epochs=10, checkpoint_seconds=2)
    save = timed(trainer.store.save, 5)
    monkeypatch.setattr("aefast.train.trainer.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(CapturedStep, "__call__", timed(CapturedStep.__call__, 1))
    monkeypatch.setattr(
        trainer.store, "save", lambda checkpoint: saved.append(checkpoint.step) or save(checkpoint)
    )
    trainer.fit(compare=False)
    assert saved == [2, 52, 70]


def test_the_process_that_writes_decides_when(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, checkpoint_seconds=1e-9)
    trainer._started = time.monotonic() - 1
    saved = []
    monkeypatch.setattr(trainer, "_save", lambda: saved.append(trainer.processes.rank))
    for trainer.processes.rank in (1, 0):
        assert trainer._goes_on(types.SimpleNamespace(signal=None), may_save=True)
    assert saved == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 5}, "latent=5: expected 4"),
        ({"batch_size": 16}, "batch_size=16: expected 32"),
        ({"seed": 3}, "seed=3: expected 0"),
        ({"lr": 0.5}, "lr=0.5: expected 0.001"),
        ({"schedule": "cosine"}, "schedule='cosine': expected 'constant'"),
        ({"warmup_steps": 2}, "warmup_steps=2: expected 0"),
        ({"precision": "bf16"}, "precision='bf16': expected 'fp32'"),
        ({"clip_norm": 1.0}, "clip_norm=1.0: expected None"),
        ({"accumulate": 2}, "accumulate=2: expected 1"),
        ({"ema_decay": 0.9}, "ema_decay=0.9: expected None"),
        (
            {"data": Dataset("other", torch.rand(230, 16), (16,))},
            "data='other': these are not the data that the run in .* was started with: expected 230 samples of 16 "
            "features, got as many with other values; resume with those, or choose another folder",
        ),
        (
            {"data": Dataset("wide", torch.rand(1030, 17), (17,))},
            "data='wide': .*: expected 230 samples of 16 features, got 1,030 samples of 17 features;",
        ),
    ],
)
def test_resuming_with_other_options_is_refused(make_trainer, tmp_path, options, message):
    make_trainer(tmp_path).fit(compare=False)
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, **options).fit(resume=True, compare=False)


def test_resuming_nothing_starts_afresh(make_trainer, tmp_path, capsys):
    make_trainer(tmp_path / "plain").fit(compare=False)
    trainer = make_trainer(tmp_path / "resumed")
    trainer.console = Console()
    trainer.fit(resume=True, compare=False)
    assert "no checkpoint" in capsys.readouterr().out
    assert losses(tmp_path / "resumed") == losses(tmp_path / "plain")


def test_a_run_is_not_overwritten_unasked(make_trainer, tmp_path):
    make_trainer(tmp_path).fit(compare=False)
    before = weights(tmp_path)
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        make_trainer(tmp_path, seed=1).fit(compare=False)
    assert torch.equal(weights(tmp_path), before)
    make_trainer(tmp_path, seed=1, epochs=1).fit(overwrite=True, compare=False)
    assert not torch.equal(weights(tmp_path), before)
    assert [record["step"] for record in metrics(tmp_path)] == [3, 6, 7]


def test_a_run_is_replaced_when_another_has_something_to_write(make_trainer, tmp_path, dataset):
    def board():
        return [TensorBoard(tmp_path / "tensorboard")]

    pytest.importorskip("tensorboard")
    before = make_trainer(tmp_path, keep_best=True)
    before.callbacks = board()
    before.fit(compare=False)
    kept = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    outside = Dataset("outside", dataset.samples + 2, (16,))
    unsuitable = make_trainer(
        tmp_path, data=outside, model=VAE, model_options={"likelihood": "bernoulli"}, epochs=1
    )
    unsuitable.callbacks = board()
    with pytest.raises(InputError, match="bernoulli"):
        unsuitable.fit(overwrite=True, compare=False)
    diverging = make_trainer(tmp_path, lr=1e30, epochs=1)
    with pytest.raises(TrainingError, match="The run that was to be replaced is still there"):
        diverging.fit(overwrite=True, compare=False)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == kept
    after = make_trainer(tmp_path, epochs=1)
    after.callbacks = board()
    after.fit(overwrite=True, compare=False)
    assert [record["step"] for record in metrics(tmp_path)] == [3, 6, 7]
    assert not (tmp_path / "best").exists() and len(list((tmp_path / "tensorboard").iterdir())) == 1


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    elif how == "emptied":
        content.clear()
    elif how == "flipped":
        content[-5] ^= 1
    path.write_bytes(content)


def test_a_checksum_is_of_names_too():
    values = torch.arange(3.0)
    assert _checksum("{}", {"model/a": values}) != _checksum("{}", {"model/b": values})


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_its_predecessor(make_trainer, tmp_path, capsys, how):
    make_trainer(tmp_path / "whole").fit(compare=False)
    make_trainer(tmp_path / "parts", epochs=2).fit(compare=False)
    older, newer = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    damage(newer, how)
    trainer = make_trainer(tmp_path / "parts")
    trainer.console = Console(width=1000)
    trainer.fit(resume=True, compare=False)
    out = capsys.readouterr().out
    assert f"{newer} is damaged" in out
    assert f"going on from {older.name}" in out
    assert newer.with_name(f"{newer.name}.damaged").exists()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped"])
def test_damage_without_a_predecessor_is_an_error(make_trainer, tmp_path, how):
    make_trainer(tmp_path).fit(compare=False)
    paths = sorted((tmp_path / "checkpoints").iterdir())
    for path in paths:
        damage(path, how)
    with pytest.raises(CheckpointError, match="no older one that is whole") as error:
        make_trainer(tmp_path).fit(resume=True, compare=False)
    assert str(paths[-1]) in str(error.value)
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths


@pytest.mark.parametrize(("version", "what"), [(1, "older"), (3, "newer")])
def test_a_checkpoint_of_another_format_is_named(make_trainer, tmp_path, monkeypatch, version, what):
    with monkeypatch.context() as patch:
        patch.setattr("aefast.train.checkpoint.FORMAT_VERSION", version)
        make_trainer(tmp_path, epochs=1).fit(compare=False)
    with pytest.raises(InputError, match=rf"format_version={version} is {what} than this aefast reads \(2\)"):
        make_trainer(tmp_path).fit(resume=True, compare=False)


@pytest.mark.parametrize("where", ["log", "epoch end", "weights"])
def test_divergence_stops_and_keeps_the_last_checkpoint(make_trainer, tmp_path, monkeypatch, where):
    bad_step = {"log": 10, "epoch end": 14, "weights": 21}[where]
    trainer = make_trainer(tmp_path)
    original = CapturedStep.__call__

    def call(self, batch):
        terms = original(self, batch)
        if trainer.steps_taken + 1 == bad_step:
            if where == "weights":
                with torch.no_grad():
                    next(self.model.parameters())[0, 0] = torch.inf
            else:
                terms = {name: term * torch.nan for name, term in terms.items()}
        return terms

    monkeypatch.setattr(CapturedStep, "__call__", call)
    if where == "weights":
        monkeypatch.setattr(trainer, "_validate", lambda interrupt: {"loss": 0.5})
    with pytest.raises(TrainingError, match=r"no longer finite.*lower lr=0.001.*step-0000000007"):
        trainer.fit(compare=False)
    assert [path.name for path in trainer.store.paths()] == ["step-0000000007.safetensors"]
    assert weights(tmp_path).isfinite().all()


@pytest.mark.parametrize("what", ["the loss term mse", "a weight"])
def test_no_checkpoint_has_what_is_not_finite(make_trainer, tmp_path, monkeypatch, always_saved, what):
    """At a step that is not logged and ends no epoch."""
    trainer = make_trainer(tmp_path, checkpoint_seconds=1e-9)
    original = CapturedStep.__call__

    def call(self, batch):
        terms = original(self, batch)
        if trainer.steps_taken + 1 != 8:
            return terms
        if what == "a weight":
            with torch.no_grad():
                next(self.model.parameters())[0, 0] = torch.inf
            return terms
        return {name: term * torch.nan for name, term in terms.items()}

    monkeypatch.setattr(CapturedStep, "__call__", call)
    with pytest.raises(TrainingError, match=rf"{what} is no longer finite at step 8 .*step-0000000007"):
        trainer.fit(compare=False)
    assert trainer.store.paths()[-1].name == "step-0000000007.safetensors"


def test_noise_of_validation_seeds_no_other_device(make_trainer, tmp_path, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    trainer = make_trainer(tmp_path)
    del seeded[:]
    before, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with trainer._validation_noise():
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_processes_draw_noise_of_their_own(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    seeds = set()
    for trainer.processes.rank in range(3):
        seeds.add(trainer._seed())
    assert len(seeds) == 3


def test_a_weight_that_no_loss_shows_stops_the_epoch(make_trainer, tmp_path, monkeypatch):
    original = CapturedStep.__call__

    def call(self, batch):
        terms = original(self, batch)
        if trainer.steps_taken == 13:
            with torch.no_grad():
                # relu makes a 0 of what this leads to.
                trainer.model.encoder.layers[0].bias[0] = -torch.inf
        return terms

    monkeypatch.setattr(CapturedStep, "__call__", call)
    trainer = make_trainer(tmp_path)
    with pytest.raises(TrainingError, match=r"a weight is no longer finite at step 14 .*step-0000000007"):
        trainer.fit(compare=False)
    assert metrics(tmp_path)[-1]["step"] < 14


def test_metrics_are_json_only(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"val_loss": float("nan")})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_second_signal_ends_the_process_at_once():
    child = os.fork()
    if child == 0:
        with Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal is signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_comparison_leaves_the_model_alone(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("aefast.train.compare.RUN_SECONDS", 0.002)
    trainer = make_trainer(tmp_path)
    result = trainer.fit(compare=True)
    trained = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
    assert torch.equal(weights(tmp_path), trained)
    comparison = result.comparison
    assert comparison.ratio == comparison.aefast / comparison.eager
    assert 0.02 < comparison.ratio < 50


def test_comparison_times_equal_work(make_trainer, tmp_path, monkeypatch):
    """Both sides train on the same full-size batches, and start from the same weights."""
    seen = {"fused": [], "eager": []}
    first = {}

    def record(name, step_class, module):
        original = step_class.__call__

        def call(self, batch):
            if name not in first:
                first[name] = {k: v.clone() for k, v in module(self).state_dict().items()}
            seen[name].append(batch)
            return original(self, batch)

        monkeypatch.setattr(step_class, "__call__", call)

    from aefast.train import compare

    monkeypatch.setattr(compare, "RUN_SECONDS", 0.002)
    trainer = make_trainer(tmp_path)
    record("fused", compare.CapturedStep, lambda step: step.model)
    record("eager", compare.EagerStep, lambda step: step.twin)
    compare.compare_with_eager(trainer.model, trainer._sample_batches(), 1e-3)
    assert len(seen["fused"]) == len(seen["eager"]) >= 6 + compare.ROUNDS
    assert {id(batch) for batch in seen["fused"]} == {id(batch) for batch in seen["eager"]}
    assert {len(batch) for batch in seen["fused"]} == {32}
    assert first["fused"].keys() == first["eager"].keys()
    for name, value in first["fused"].items():
        assert torch.equal(value, first["eager"][name])


EXTRAS = {
    "schedule": "cosine",
    "warmup_steps": 4,
    "clip_norm": 0.1,
    "accumulate": 2,
    "ema_decay": 0.9,
    "keep_best": True,
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_with_everything_goes_on_bit_for_bit(make_trainer, tmp_path, monkeypatch, precision):
    options = {**EXTRAS, "precision": precision}
    make_trainer(tmp_path / "whole", **options).fit(compare=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        assert make_trainer(tmp_path / "parts", **options).fit(compare=False).step == 10
    make_trainer(tmp_path / "parts", **options).fit(resume=True, compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert torch.equal(weights(tmp_path / "parts" / "best"), weights(tmp_path / "whole" / "best"))


def test_what_is_kept_is_the_average(make_trainer, tmp_path, dataset):
    trainer = make_trainer(tmp_path, lr=1e-2, ema_decay=0.99)
    trainer.fit(compare=False)
    average = torch.cat([one.flatten() for one in trainer.step.ema])
    last = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert torch.equal(weights(tmp_path), average)
    assert not torch.equal(average, last)
    model = from_pretrained(tmp_path)
    with torch.no_grad():
        error = model(dataset.samples[trainer.held_out.rows]).loss.item()
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(error, rel=1e-5)


def test_a_run_of_steps(make_trainer, tmp_path):
    """It ends within an epoch, is validated there, and goes on from there."""
    result = make_trainer(tmp_path / "parts", steps=10).fit(compare=False)
    assert result.step == 10
    assert [record["step"] for record in metrics(tmp_path / "parts")] == [3, 6, 7, 9, 10]
    assert [r["step"] for r in metrics(tmp_path / "parts") if "val_loss" in r] == [7, 10]
    make_trainer(tmp_path / "parts", steps=17).fit(resume=True, compare=False)
    make_trainer(tmp_path / "whole", steps=17).fit(compare=False)
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def fake_validation(monkeypatch, trainer, found):
    values = iter(found)
    monkeypatch.setattr(trainer, "_validate", lambda interrupt: {"loss": next(values)})


def test_patience_ends_a_run(make_trainer, tmp_path, monkeypatch):
    options = {"epochs": 9, "patience": 2, "keep_best": True}
    trainer = make_trainer(tmp_path, **options)
    fake_validation(monkeypatch, trainer, [5.0, 3.0, 4.0, 3.5])
    result = trainer.fit(compare=False)
    assert (result.stopped_early, result.step) == (True, 4 * 7)
    best = json.loads((tmp_path / "best" / "config.json").read_text())["metadata"]["training"]
    assert best["step"] == 2 * 7
    assert not torch.equal(weights(tmp_path / "best"), weights(tmp_path))
    # What has been ended stays so.
    trainer = make_trainer(tmp_path, **options)
    assert trainer.fit(resume=True, compare=False).step == 4 * 7
    # With more patience it goes on, and knows what the best was, which an equal loss is not.
    trainer = make_trainer(tmp_path, **{**options, "patience": 4})
    fake_validation(monkeypatch, trainer, [3.2, 3.0])
    assert trainer.fit(resume=True, compare=False).step == 6 * 7
    trainer = make_trainer(tmp_path, **{**options, "patience": 6})
    fake_validation(monkeypatch, trainer, [2.0, 2.5, 2.5])
    assert trainer.fit(resume=True, compare=False).step == 9 * 7
    best = json.loads((tmp_path / "best" / "config.json").read_text())["metadata"]["training"]
    assert best["step"] == 7 * 7


def test_epochs_can_be_validated_on_the_way(make_trainer, tmp_path):
    options = {"epochs": 2, "log_every": 3, "validate_every": 5}
    make_trainer(tmp_path / "often", **options).fit(compare=False)
    lines = metrics(tmp_path / "often")
    # Of 7 steps an epoch.
    assert [line["step"] for line in lines] == [3, 5, 6, 7, 9, 10, 12, 14]
    assert [line["step"] for line in lines if "val_loss" in line] == [5, 7, 10, 14]
    make_trainer(tmp_path / "seldom", **{**options, "validate_every": None}).fit(compare=False)
    assert torch.equal(weights(tmp_path / "often"), weights(tmp_path / "seldom"))
    seldom = {line["step"]: line for line in losses(tmp_path / "seldom") if "val_loss" in line}
    for line in losses(tmp_path / "often"):
        if line["step"] in (7, 14):
            assert line["val_loss"] == seldom[line["step"]]["val_loss"]


def test_a_validation_on_the_way_at_the_end_of_an_epoch_is_one(make_trainer, tmp_path):
    make_trainer(tmp_path, epochs=2, log_every=100, validate_every=7).fit(compare=False)
    assert [line["step"] for line in metrics(tmp_path)] == [7, 14]


def test_a_validation_on_the_way_that_is_interrupted_is_made_by_the_run_that_goes_on(
    make_trainer, tmp_path, monkeypatch
):
    options = {"epochs": 2, "validate_every": 5}
    trainer = make_trainer(tmp_path / "parts", **options)
    with monkeypatch.context() as patch:
        interrupt_in_validation(patch, trainer, 5)
        assert trainer.fit(compare=False).step == 5
    assert not any("val_loss" in line for line in metrics(tmp_path / "parts"))
    make_trainer(tmp_path / "parts", **options).fit(resume=True, compare=False)
    make_trainer(tmp_path / "whole", **options).fit(compare=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_patience_counts_validations_on_the_way(make_trainer, tmp_path, monkeypatch):
    options = {"epochs": 9, "patience": 2, "validate_every": 2, "keep_best": True}
    trainer = make_trainer(tmp_path, **options)
    ends = []
    trainer.callbacks.append(
        type("Ends", (Callback,), {"on_epoch_end": lambda *given: ends.append(given[2]["step"])})()
    )
    fake_validation(monkeypatch, trainer, [5.0, 3.0, 2.0, 2.5, 2.0, 1.0])
    result = trainer.fit(compare=False)
    # After steps 2, 4, 6, 7 and 8, none of which is validated twice.
    assert (result.stopped_early, result.step, ends) == (True, 8, [7])
    assert [line["step"] for line in metrics(tmp_path) if "val_loss" in line] == [2, 4, 6, 7, 8]
    trainer = make_trainer(tmp_path, **{**options, "patience": 3})
    fake_validation(monkeypatch, trainer, [9.0])
    assert trainer.fit(resume=True, compare=False).step == 10


def test_lines_of_sparse_models_tell_what_is_dead(make_trainer, tmp_path):
    for sparsity, options in SPARSE.items():
        options = {"sparsity": sparsity, **options}
        if sparsity != "kl":
            options["dead_after"] = 64
        config = SparseConfig(input_size=16, latent=24, **options)

        def model(config=config, **sizes):
            return SparseAutoencoder(config)

        trainer = make_trainer(tmp_path / sparsity, model=model, epochs=2)
        trainer.fit(compare=False)
        lines = metrics(tmp_path / sparsity)
        assert all(("dead" in line) == (sparsity != "kl") for line in lines)
        if "dead" in lines[-1]:
            assert lines[-1]["dead"] == lines[-1]["val_dead"] == trainer.model.dead.float().mean().item()


def test_as_many_checkpoints_stay_as_are_wanted(make_trainer, tmp_path, always_saved):
    trainer = make_trainer(tmp_path, keep_last=3, checkpoint_seconds=1e-9)
    trainer.fit(compare=False)
    assert [int(path.stem[5:]) for path in trainer.store.paths()] == [19, 20, 21]


def test_callbacks_see_the_run(make_trainer, tmp_path):
    class Recorder(Callback):
        def __init__(self):
            self.seen = []

        def on_start(self, trainer):
            self.seen.append(("start", trainer.steps_taken))

        def on_log(self, trainer, record):
            self.seen.append(("log", record["step"]))

        def on_epoch_end(self, trainer, record):
            self.seen.append(("epoch", record["step"]))
            if record["epoch"] == 2:
                trainer.stop()

        def on_end(self, trainer, result):
            self.seen.append(("end", result.step))

    trainer = make_trainer(tmp_path)
    recorder = Recorder()
    trainer.callbacks.append(recorder)
    assert trainer.fit(compare=False).stopped_early
    assert recorder.seen == [
        ("start", 0),
        *(("log", step) for step in (3, 6, 7)),
        ("epoch", 7),
        *(("log", step) for step in (9, 12, 14)),
        ("epoch", 14),
        ("end", 14),
    ]


def test_callbacks_that_would_not_be_called_are_refused(make_trainer, tmp_path):
    class Stepper(Callback):
        # A value is nobody's mistake.
        on_time = True

        def on_epoch_ends(self, trainer, record):
            pass

    trainer = make_trainer(tmp_path / "run")
    expected = (
        r"callbacks: Stepper\.on_epoch_ends would never be called, expected one of on_start, on_log, on_epoch_end, "
        r"on_end; did you mean 'on_epoch_end'\?"
    )
    arguments = (trainer.model, trainer.source._data, trainer.config, tmp_path / "run")
    with pytest.raises(InputError, match=expected):
        Trainer(*arguments, callbacks=[Stepper()])
    for one, message in ((Stepper, "the class Stepper"), (print, "builtin_function_or_method")):
        with pytest.raises(InputError, match=f"callbacks: expected a Callback, got {message}"):
            Trainer(*arguments, callbacks=[one])
    trainer.callbacks.append(Stepper())
    with pytest.raises(InputError, match=expected):
        trainer.fit()
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_metrics(make_trainer, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(tmp_path / "run", epochs=2)
    trainer.callbacks.append(TensorBoard(tmp_path / "board"))
    trainer.fit(compare=False)
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    written = metrics(tmp_path / "run")
    for name in ("loss", "mse", "samples_per_s", "epoch"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(record["step"], pytest.approx(record[name])) for record in written]
    assert [event.step for event in events.Scalars("val_loss")] == [7, 14]


@pytest.mark.parametrize(("longer", "given"), [({"epochs": 4}, "epochs=4"), ({"steps": 28}, "steps=28")])
def test_a_falling_rate_holds_a_resumed_run_to_its_length(make_trainer, tmp_path, capsys, longer, given):
    make_trainer(tmp_path, schedule="linear").fit(compare=False)
    message = (
        f"{given}: expected the 21 steps over which the linear schedule of the run in .* falls to 0, got 28"
    )
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, schedule="linear", **longer).fit(resume=True, compare=False)
    same = make_trainer(tmp_path, schedule="linear")
    same.console = Console(width=1000)
    same.fit(resume=True, compare=False)
    told = capsys.readouterr().out
    assert "has reached epoch 3; its linear schedule has fallen to 0 there" in told
    assert "a larger number" not in told


def test_what_cannot_be_trained_is_named(tmp_path, dataset):
    def start(model=None, data=dataset, config=None):
        if model is None:
            model = Autoencoder(input_size=16, hidden=(8,), latent=4)
        return trainer_module.Trainer(model, data, config or TrainConfig(device="cpu"), tmp_path)

    parametrized, frozen = (Autoencoder(input_size=16, hidden=(8,), latent=4) for _ in range(2))
    nn.utils.parametrizations.weight_norm(parametrized.encoder.layers[0])
    frozen.requires_grad_(False)
    for arguments, message in (
        ({"model": nn.Linear(16, 16)}, "model: expected one of aefast.models, got Linear$"),
        (
            {"model": torch.compile(Autoencoder(input_size=16))},
            r"model: .* got OptimizedModule; compile it by model.compile\(\)",
        ),
        (
            {"config": TrainConfig(device="cpu", drop_last=True)},
            "dataset: expected at least 256 samples to train on, a whole batch, got 207",
        ),
        ({"config": {"epochs": 2}}, "config: expected a TrainConfig, got dict"),
        ({"model": frozen}, "model: expected parameters to train, all of them are frozen"),
        (
            {"model": Autoencoder(input_size=16).double()},
            "model: expected parameters of float32.*got float64",
        ),
        ({"model": parametrized}, "model: expected the parameters of a Autoencoder by their names.*missing"),
        (
            {"data": torch.rand(30, 16)},
            r"dataset: expected a Dataset.*got an array of shape \(30, 16\); aefast\.data\.Dataset\(.*x\.flatten\(1\)",
        ),
        ({"data": np.zeros((30, 16))}, r"dataset: expected a Dataset.*got an array of shape \(30, 16\)"),
    ):
        with pytest.raises(InputError, match=message):
            start(**arguments)


def test_tied_weights_are_saved_and_gone_on_with(make_trainer, tmp_path):
    def tie(trainer):
        trainer.model.decoder.layers[0].bias = trainer.model.encoder.layers[0].bias
        trainer.step = CapturedStep(
            trainer.model, make_optimizer(trainer.model.parameters(), trainer.config.lr)
        )
        return trainer

    tie(make_trainer(tmp_path / "whole", epochs=2)).fit(compare=False)
    tie(make_trainer(tmp_path / "parts", epochs=1)).fit(compare=False)
    tie(make_trainer(tmp_path / "parts", epochs=2)).fit(resume=True, compare=False)
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    found = from_pretrained(tmp_path / "whole")
    assert torch.equal(found.encoder.layers[0].bias, found.decoder.layers[0].bias)


def test_data_that_does_not_fit_the_model(make_trainer, tmp_path, dataset):
    trainer = make_trainer(tmp_path)
    with pytest.raises(InputError, match=r"dataset: expected 16 features a sample.*got 3"):
        trainer_module.Trainer(trainer.model, Dataset("x", torch.rand(9, 3), (3,)), TrainConfig(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0: expected a positive integer"),
        ({"batch_size": -4}, "batch_size=-4"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"log_every": 0}, "log_every=0"),
        ({"lr": 0}, "lr=0: expected a finite number above 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "tpu"}, "device='tpu': expected one of auto, cpu, cuda"),
        ({"steps": 0}, "steps=0: expected a positive integer"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"schedule": "step"}, "schedule='step': expected one of constant, linear, cosine"),
        ({"precision": "half"}, "precision='half': expected one of fp32, bf16, fp16"),
        ({"clip_norm": 0}, "clip_norm=0: expected a finite number above 0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"steps_per_replay": -1}, "steps_per_replay=-1"),
        ({"drop_last": 1}, "drop_last=1: expected true or false"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1: expected a number from 0 to below 1"),
        ({"patience": 0}, "patience=0"),
        ({"validate_every": 0}, "validate_every=0: expected a positive integer"),
        ({"keep_last": 0}, "keep_last=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)


def test_graphs_are_an_option(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, steps_per_replay=0)
    # As on a GPU.
    trainer.device = torch.device("cuda")
    assert [len(group) for group in trainer._groups()] == [1] * 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused():
    with pytest.raises(InputError, match="device='cuda': expected a CUDA device"):
        TrainConfig(device="cuda")
    assert TrainConfig(device="auto").resolve_device().type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.5, 0.0], ids=["data-on-gpu", "data-on-cpu"])
def test_a_run_on_a_gpu_can_be_interrupted_and_goes_on(make_trainer, tmp_path, monkeypatch, share):
    monkeypatch.setattr("aefast.train.source._GPU_SHARE", share)
    monkeypatch.setattr("aefast.train.compare.RUN_SECONDS", 0.002)
    whole = make_trainer(tmp_path / "whole", device="cuda", steps_per_replay=3)
    whole.fit(compare=False)
    assert set(whole.step._recordings) == {1, 3}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        trainer = make_trainer(tmp_path / "parts", device="cuda", steps_per_replay=1)
        assert trainer.batches.samples.is_cuda == (share > 0)
        assert trainer.fit(compare=False).step == 10
    options = {"device": "cuda", "steps_per_replay": 1, "plots": True}
    result = make_trainer(tmp_path / "parts", **options).fit(resume=True)
    assert result.comparison.aefast > 0
    for ours, theirs in zip(losses(tmp_path / "parts"), losses(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=1e-3, atol=1e-4)


def test_a_step_takes_no_more_memory_than_eagers():
    model = Autoencoder(input_size=784, hidden=(512,), latent=16)
    batch = torch.rand(1024, 784)
    peaks = []
    for step in (CapturedStep(model, make_optimizer(model.parameters(), 1e-3)), EagerStep(model, 1e-3)):
        step(batch)
        step.optimizer.zero_grad(set_to_none=True)
        peaks.append(memory.peak_bytes(lambda index, step=step: step(batch), torch.device("cpu")))
    # Workspaces of the products, of a few rows, come and go beside the batch's own tensors.
    assert peaks[0] <= 1.05 * peaks[1]
