"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aefast import _library
from aefast._random import other_states, seeded, set_other_states
from aefast.data import Batches, Dataset, IterableBatches
from aefast.errors import AefastError, InputError
from aefast.models import Model, SparseAutoencoder
from aefast.models._base import CONFIG_FILE, WEIGHTS_FILE, check_fit, evaluating, laid_out_as
from aefast.nn import MMDLoss
from aefast.train.callbacks import Callback, check_callbacks
from aefast.train.checkpoint import Checkpoint, CheckpointStore
from aefast.train.compare import Comparison, compare_with_eager
from aefast.train.config import TrainConfig
from aefast.train.interrupt import Interrupt
from aefast.train.metrics import MetricsLog, Window, held_out_measures, peak_of, read_metrics, variance_of
from aefast.train.plots import plot_loss, plot_samples
from aefast.train.processes import AgreedInterrupt, Processes, Request
from aefast.train.progress import ProgressView
from aefast.train.schedule import Schedule
from aefast.train.source import Data, Source, described
from aefast.train.step import CapturedStep, loss_of_own_forward, make_optimizer

METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
PLOT_FOLDER = "plots"
BEST_FOLDER = "best"
TENSORBOARD_FOLDER = "tensorboard"

# Spreads (seed, rank) over 64 bits: an odd constant near 2**64 / pi.
_SEED_STRIDE = 0x517CC1B727220A95

# What a name in metrics.jsonl begins with if it is about held-out samples.
HELD_OUT = "val_"

PLOTTED_SAMPLES = 20
COMPARED_BATCHES = 16

# From one checkpoint to the next it takes at least so many times as long as it took to write the one.
SAVES_APART = 10


class TrainingError(AefastError):
    """Training cannot go on."""


def _check_parameters(model: Model) -> None:
    """That batches of float32 can train the model, and what they make of it can be saved."""
    if not any(one.requires_grad for one in model.parameters()):
        raise InputError("model: expected parameters to train, all of them are frozen")
    other = next((one.dtype for one in model.parameters() if one.dtype != torch.float32), None)
    if other is not None:
        raise InputError(
            f"model: expected parameters of float32, as which samples are read, got {str(other).removeprefix('torch.')}"
        )
    model.check_class()
    model.check_names()


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        directory: where its files are.
        step: steps taken over the whole run.
        interrupted: the signal that ended it early, or None.
        comparison: throughput beside eager PyTorch, or None if it was not measured.
        stopped_early: whether it ended for the loss on held-out samples, or because a callback said so.
        held_out: the last measures on held-out samples, by name: "loss" and, in dB, "psnr" of the
            reconstructions; of a denoiser the loss and PSNR of noisy samples once denoised, and in dB "noisy_psnr",
            theirs before; where the loss has several terms, such as "kl", also these, with their weights; of a VAE also
            "elbo", in nats a sample; of an InfoVAE also "mmd", the MMD² of its codes to the prior, without its weight;
            of a sparse autoencoder also "l0", how many latents a sample uses, "explained_variance", 1 - mean squared
            error / variance, if there is any, and but for kl "dead", the part of the latents that counts as dead. Empty
            if the run was interrupted, or had no held-out samples.
    """

    directory: Path
    step: int
    interrupted: signal.Signals | None = None
    comparison: Comparison | None = None
    stopped_early: bool = False
    held_out: dict[str, float] = dataclasses.field(default_factory=dict)


class Trainer:
    """Trains a model on a data set and writes the run into a folder.

    The folder receives ``config.json`` and ``model.safetensors`` (`aefast.models.from_pretrained` loads
    them), ``metrics.jsonl``, ``checkpoints/``, ``plots/`` and, where it is wanted, ``best/``. A line of metrics tells
    the step, the epoch, the last learning rate, the mean loss and its terms since the line before, samples per second,
    and at validations what the model measures on held-out samples, ``val_loss`` and others. A resumed run goes on
    bit for bit as if it had never stopped, on the CPU with the same number of threads. Where batches come from an
    iterable, that takes one that gives the same batches again (`aefast.data.IterableBatches`): checkpoints hold the
    states of PyTorch's, numpy's and Python's global generators, and of no others but those that the iterable shows. If
    the last batch that is read again is another one, the run says so. A new sparse autoencoder begins with the mean of
    the first batch as its decoder's bias (`SparseAutoencoder.initialize`).

    Where torch.distributed is initialized, each of its processes makes a Trainer, and they train one model on batches
    of which each takes its share: gradients are averaged (`DistributedDataParallel`), an MMD is that of all processes'
    codes, and noise is each one's own. The first process writes the folder. A signal is heeded with the next line that
    is logged, and if a process is lost the others stop, with the last checkpoint to go on from.

    Args:
        model: the model to train, with its initial weights. It is moved to the device and trained in place.
        dataset: what to train on. Of a `Dataset` a part is held out for validation. Anything else is an iterable of
            batches, or a function that returns one, as `aefast.data.IterableBatches` takes them: a `DataLoader`, a
            list. It decides the size and order of batches, and none are held out. Of a batch that is a tuple or list
            the first tensor is the samples and others, such as labels, are left out; a loss that takes them is for
            `CapturedStep`.
        config: how to train.
        directory: where the run is written.
        validation: a `Dataset` or batches to validate on, instead of a part of `dataset`.
        callbacks: are called as the run goes on, in every process.
        console: where progress is shown; standard output by default, of the first process.
    """

    def __init__(
        self,
        model: Model,
        dataset: Data,
        config: TrainConfig,
        directory: str | Path,
        *,
        validation: Data | None = None,
        callbacks: Sequence[Callback] = (),
        console: Console | None = None,
    ) -> None:
        if directory == "":
            raise InputError("out='': expected a folder")
        if not isinstance(model, Model):
            hint = "; compile it by model.compile()" if type(model).__name__ == "OptimizedModule" else ""
            raise InputError(f"model: expected one of aefast.models, got {type(model).__name__}{hint}")
        if not isinstance(config, TrainConfig):
            raise InputError(f"config: expected a TrainConfig, got {type(config).__name__}")
        _check_parameters(model)
        self.config = config
        self.directory = Path(directory)
        self.processes = Processes()
        self.console = Console(quiet=not self.processes.is_first) if console is None else console
        self.device = config.resolve_device()
        self.model = model.to(self.device)
        if not model.training:
            model.train()
        check_callbacks(callbacks)
        self.callbacks = list(callbacks)
        self.source = Source(dataset, validation, model.config.input_size, config, self.device, self._share())
        for argument, data in (("dataset", dataset), ("validation", validation)):
            if isinstance(data, Dataset):
                model.check_order(data.sample_shape, argument)
        self.step = CapturedStep(
            self.model if self.processes.is_one else self._joint_model(),
            make_optimizer(self.model.parameters(), config.lr),
            loss=loss_of_own_forward if self.model.has_own("forward") else None,
            precision=config.precision,
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
            schedule=self._schedule(),
            ema_decay=config.ema_decay,
            steps_per_replay=config.steps_per_replay if self.processes.is_one else 0,
        )
        self.store = CheckpointStore(self.directory / CHECKPOINT_FOLDER, config.keep_last)
        self.window = Window(self.processes)
        self.steps_taken = 0
        self.epoch = 0
        # Batches of the current epoch that are done. All of them done means that only validation is left.
        self.batch = 0
        self._last_checkpoint: float | None = None
        # How long that one took.
        self._save_seconds = 0.0
        self.metrics: MetricsLog | None = None
        # Whether the folder holds a run that this one takes the place of, once it has something to write.
        self._is_replacing = False
        # Which modules were in training mode as the last `fit` ended; it leaves all of them in eval mode.
        self._modes: dict[nn.Module, bool] = {}
        # The lowest loss on held-out samples, and how many validations ago that was.
        self._best = math.inf
        self._epochs_since_best = 0
        # Whether it was told to stop, and whether all processes know.
        self._is_asked_to_stop = self._is_stopped = False

    def _share(self) -> tuple[int, int]:
        return self.processes.rank, self.processes.count

    def _joint_model(self) -> DistributedDataParallel:
        return DistributedDataParallel(
            self.model,
            device_ids=None if self.device.type == "cpu" else [torch.cuda.current_device()],
            # Networks of others may leave some of their parameters unused.
            find_unused_parameters=bool(self.model.networks),
        )

    @contextlib.contextmanager
    def _mmd_over(self, group: dist.ProcessGroup | None) -> Iterator[None]:
        """Within it an MMD is of the codes of a group's processes, which have to ask for it together; None for one."""
        losses = [one for one in self.model.modules() if isinstance(one, MMDLoss)]
        groups = [one.group for one in losses]
        try:
            for one in losses:
                one.group = group
            yield
        finally:
            for one, before in zip(losses, groups, strict=True):
                one.group = before

    def _total_steps(self) -> int | None:
        """Steps of the whole run, or None if the data does not tell."""
        of_epoch = self.source.steps_per_epoch()
        if self.config.steps is not None or of_epoch is None:
            return self.config.steps
        return self.config.epochs * of_epoch

    def _epochs(self) -> int | None:
        """Epochs of the whole run, a last one that ends early among them, or None if the data does not tell."""
        if self.config.steps is None:
            return self.config.epochs
        of_epoch = self.source.steps_per_epoch()
        return None if of_epoch is None else -(-self.config.steps // of_epoch)

    def epoch_of_run(self) -> str:
        """Which epoch the next step is of, and of how many as far as that is known, such as "3/10"."""
        epochs = self._epochs()
        return f"{self.epoch + 1}" if epochs is None else f"{min(self.epoch + 1, epochs)}/{epochs}"

    def _schedule(self) -> Schedule:
        config, steps = self.config, self._total_steps()
        if config.schedule != "constant" and steps is None:
            raise InputError(
                f"schedule={config.schedule!r}: expected a number of steps, since the data does not tell how many "
                "batches it has"
            )
        return Schedule(config.schedule, config.warmup_steps, steps)

    def stop(self) -> None:
        """End the run at the next good moment, as if this had been its last step.

        Of several processes it is enough that one asks for it.
        """
        self._is_asked_to_stop = True

    def fit(self, *, resume: bool = False, overwrite: bool = False, compare: bool = True) -> TrainResult:
        """Train to the last epoch, or until SIGINT or SIGTERM asks to stop after the current step.

        The model is in eval mode afterwards, however the run ended, and has the weights of the last step. The average
        of `ema_decay` and the weights of `keep_best` are in the folder: ``from_pretrained(directory)`` loads the model
        that is kept, which is the average where there is one, and ``from_pretrained(directory / "best")`` the best.

        Args:
            resume: go on from the newest checkpoint in the folder; without one, start afresh and say so.
            overwrite: start afresh even if the folder holds a run, which is deleted once there is something to write.
            compare: measure the throughput beside eager PyTorch at the end.

        Raises:
            InputError: the folder or a file in it cannot be written, it holds a run that was not asked for,
                or one that was started with other options.
            CheckpointError: all checkpoints are damaged.
            TrainingError: a loss or a weight is no longer finite, or another process of the run was lost; the last
                checkpoint is kept.
        """
        try:
            with self._in_training_mode():
                return self._fit(resume, overwrite, compare)
        except RuntimeError as error:
            if not self.processes.is_loss(error):
                raise
            raise TrainingError(
                f"a process of the run was lost after step {self.steps_taken:,} ({' '.join(str(error).split())}). "
                f"{self._last_good()}, from which --resume goes on"
            ) from error
        except OSError as error:
            file = self._output_file(error)
            if file is None:
                raise
            raise InputError(
                f"out={str(self.directory)!r}: cannot read or write {file} ({error.strerror or error})"
            ) from error

    @contextlib.contextmanager
    def _in_training_mode(self) -> Iterator[None]:
        """The modules that train in training mode, within; afterwards all of the model in eval mode."""
        if not self.model.training:
            self.model.train()
            for one, mode in self._modes.items():
                one.training = mode
        try:
            yield
        finally:
            self._modes = {one: one.training for one in self.model.modules()}
            self.model.eval()

    def _output_file(self, error: OSError) -> Path | None:
        """Which file of the run `error` is about, or None if it is not about one of them."""
        # Of a rename, the target is what the user knows.
        name = error.filename if error.filename2 is None else error.filename2
        path = Path(os.fsdecode(name)) if isinstance(name, (str, bytes, os.PathLike)) else None
        return path if path is not None and path.is_relative_to(self.directory) else None

    def _fit(self, resume: bool, overwrite: bool, compare: bool) -> TrainResult:
        # Some may have been appended since.
        check_callbacks(self.callbacks)
        self._is_replacing = False
        self._is_asked_to_stop = self._is_stopped = False
        self._metrics_size = self._open(resume, overwrite)
        if self.config.precision == "bf16" and self.device.type == "cpu":
            instructions = _library.keeps_to_float32()
            if instructions is not None:
                self._say(
                    "notice: precision='bf16' leaves aefast's products in float32 on this processor (kernels: "
                    f"{instructions}), where bfloat16 is no faster"
                )
        if not self._is_replacing:
            self._begin_metrics()
        try:
            with Interrupt() as interrupt:
                request: Request = interrupt
                if not self.processes.is_one:
                    request = AgreedInterrupt(interrupt, self.processes, self.device)
                for callback in self.callbacks:
                    callback.on_start(self)
                with self._mmd_over(None if self.processes.is_one else dist.group.WORLD):
                    self._train(request)
                self._save()
        finally:
            if self.metrics is not None:
                self.metrics.close()
                self.metrics = None
        result = self._result(request.signal, compare)
        for callback in self.callbacks:
            callback.on_end(self, result)
        # The first process may still be writing. Should another end before it, and not well, torchrun would kill it.
        self.processes.wait()
        return result

    def _result(self, interrupted: signal.Signals | None, compare: bool) -> TrainResult:
        if interrupted is not None:
            return TrainResult(self.directory, self.steps_taken, interrupted)
        comparison, model = None, self.model
        if self.processes.is_first:
            try:
                self._plot()
            except ImportError as error:
                self._say(f'notice: no plots ({error}); for plots: pip install "aefast[train]"')
        # Beside other processes it would be measured with what they leave of the machine.
        if compare and model.has_own("forward") and not model.has_own("eager_loss"):
            compare = False
            self._say(
                f"notice: no comparison with eager PyTorch, since {type(model).__name__} has a forward of its own and "
                "no eager_loss"
            )
        if compare and self.processes.is_one:
            try:
                comparison = compare_with_eager(
                    self.model, self._sample_batches(), self.config.lr, self.config.precision
                )
            except (RuntimeError, TypeError) as error:
                # Modules of others need not let themselves be copied.
                if not self.model.networks:
                    raise
                reason = str(error).strip().splitlines()[0]
                self._say(
                    f"notice: no comparison with eager PyTorch, since the model cannot be copied ({reason})"
                )
        return TrainResult(
            self.directory, self.steps_taken, None, comparison, self._is_stopped, self._last_measures()
        )

    @property
    def batches(self) -> Batches | IterableBatches:
        """What is trained on."""
        return self.source.training

    @property
    def held_out(self) -> Batches | IterableBatches | None:
        """What is validated on."""
        return self.source.held_out

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    # Starting

    def _open(self, resume: bool, overwrite: bool) -> int:
        """Prepare the folder and the state; the bytes of ``metrics.jsonl`` that stay."""
        self.processes.first(self._make_directory)
        checkpoint = None
        if resume:
            load = functools.partial(self.store.load_newest, lambda text: self._say(f"warning: {text}"))
            checkpoint = self.processes.first(load)
            if not self.processes.is_first:
                checkpoint = load()
        if checkpoint is None:
            self.processes.first(functools.partial(self._start_afresh, resume, overwrite))
            torch.manual_seed(self._seed())
            return 0
        settings = checkpoint.state["settings"]
        # A model's options follow from which model it is and from the data, so those are told first, and what was kept
        # of other data is not for this.
        self._check_same_run(settings, ("model", "data", "validation"))
        goes_on = self.source.restore(
            self._of_process(checkpoint.tensors["data"]), lambda text: self._say(f"notice: {text}")
        )
        # How memory was when the run began decides how many steps an epoch has.
        self.step.schedule = self._schedule()
        self._check_same_run(settings)
        self._restore(checkpoint)
        if self.batch and not goes_on:
            self._say(
                f"notice: reading the first {self.batch:,} batches of this epoch again, to leave them out"
            )
        if self._has_ended() and not self._is_to_be_validated():
            reached, more = f"epoch {self.epoch}", "epochs"
            if self._is_stopped:
                more = "epochs of patience"
            elif self.config.steps is not None:
                reached, more = f"step {self.steps_taken:,}", "steps"
            hint = f"a larger number of {more} goes on from there"
            if self.config.schedule != "constant" and not self._is_stopped:
                hint = f"its {self.config.schedule} schedule has fallen to 0 there"
            self._say(f"nothing left to train: {self.directory} has reached {reached}; {hint}")
        else:
            self._say(f"resuming {self.directory} at epoch {self.epoch + 1}, step {self.steps_taken:,}")
            count = sum(name.startswith("cpu/") for name in checkpoint.tensors["rng"])
            if count != self.processes.count:
                self._say(
                    f"warning: the number of processes was {count} and is {self.processes.count}; the run goes on with "
                    "other shares of the batches and other noise"
                )
        return checkpoint.state["metrics_size"]

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / ".aefast-write-test"
            probe.touch()
            probe.unlink()
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"out={str(self.directory)!r}: expected a folder, found a file") from None
        except OSError as error:
            raise InputError(
                f"out={str(self.directory)!r}: expected a folder that can be written ({error.strerror})"
            ) from None
        # Told before the training rather than when the first of them is written.
        for name in (CHECKPOINT_FOLDER, PLOT_FOLDER):
            path = self.directory / name
            if path.exists() and not path.is_dir():
                raise InputError(f"out={str(self.directory)!r}: expected {path} to be a folder, found a file")
        for name in (METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE):
            path = self.directory / name
            if path.is_dir():
                raise InputError(f"out={str(self.directory)!r}: expected {path} to be a file, found a folder")

    def _start_afresh(self, resume: bool, overwrite: bool) -> None:
        weights = self.directory / WEIGHTS_FILE
        if resume:
            self._say(f"notice: no checkpoint in {self.directory} to resume from; starting afresh")
        elif overwrite:
            self._is_replacing = not self.steps_taken
        elif self.store.paths() or weights.exists():
            raise InputError(
                f"out={str(self.directory)!r}: holds a run already; add --resume to go on with it, "
                "--overwrite to replace it, or choose another folder"
            )
        if self.steps_taken:
            raise InputError(
                f"overwrite={overwrite!r}, resume={resume!r}: this Trainer has taken {self.steps_taken:,} steps and "
                "cannot start afresh; make another one"
            )

    def _begin_metrics(self) -> None:
        """Open ``metrics.jsonl`` in the first process; what the folder holds of a run that is replaced goes before."""
        if self.metrics is not None or not self.processes.is_first:
            return
        if self._is_replacing:
            for folder in (CHECKPOINT_FOLDER, PLOT_FOLDER, BEST_FOLDER, TENSORBOARD_FOLDER):
                shutil.rmtree(self.directory / folder, ignore_errors=True)
            (self.directory / WEIGHTS_FILE).unlink(missing_ok=True)
            self._is_replacing = False
        self.metrics = MetricsLog(self.directory / METRICS_FILE, self._metrics_size)

    def _seed(self) -> int:
        """The seed of this process's noise."""
        return (self.config.seed + self.processes.rank * _SEED_STRIDE) % 2**63

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it goes on with, by option name."""
        return {
            "model": self.model.name,
            **self.model.config.to_dict(),
            # A checkpoint may say nothing of these two where they are not used.
            "networks": self.model.networks or None,
            "batch_size": self.config.batch_size,
            "drop_last": self.config.drop_last or None,
            "lr": self.config.lr,
            "schedule": self.config.schedule,
            "warmup_steps": self.config.warmup_steps,
            # A learning rate that falls to 0 at the end of the run depends on where that is.
            "total_steps": None if self.config.schedule == "constant" else self._total_steps(),
            "precision": self.config.precision,
            "clip_norm": self.config.clip_norm,
            "accumulate": self.config.accumulate,
            "ema_decay": self.config.ema_decay,
            "seed": self.config.seed,
            "data": self.source.fingerprint(),
            "validation": self.source.validation_fingerprint(),
        }

    def _check_same_run(self, stored: dict[str, Any], names: Sequence[str] = ()) -> None:
        """That the options of those names, by default all, are those of the run."""
        current = self._settings()
        for name in names or current:
            if current.get(name) != stored.get(name):
                if name in ("data", "validation"):
                    raise self._of_other_data(name, stored.get(name), current.get(name))
                if name == "total_steps":
                    raise self._of_other_length(stored.get(name), current.get(name))
                raise InputError(
                    f"{name}={current.get(name)!r}: expected {stored.get(name)!r}, with which the run in "
                    f"{self.directory} was started; resume with that, or choose another folder"
                )

    def _of_other_length(self, expected: int | None, got: int | None) -> InputError:
        """The error about a run whose learning rate was to fall to 0 at another step."""
        option = "epochs" if self.config.steps is None else "steps"
        return InputError(
            f"{option}={getattr(self.config, option)}: expected the {expected:,} steps over which the "
            f"{self.config.schedule} schedule of the run in {self.directory} falls to 0, got {got:,}; resume with as "
            "many, or choose another folder"
        )

    def _of_other_data(self, name: str, stored: str | None, current: str | None) -> InputError:
        """The error about "data" or "validation" of other fingerprints than the run's."""
        expected, got = described(stored), described(current)
        if expected == got:
            got = "as many with other values"
        what = "data" if name == "data" else "held-out samples"
        given = f"{name}={self.source.name!r}" if name == "data" else name
        return InputError(
            f"{given}: these are not the {what} that the run in {self.directory} was started with: expected "
            f"{expected}, got {got}; resume with those, or choose another folder"
        )

    # Saving and going on

    def _save(self) -> None:
        """Write a checkpoint of this moment, and the model as it is now."""
        window = self.window.state()
        self._check_finite(window["sums"])
        self._check_weights()
        random, data = self._random_state(), self._of_processes(self.source.state())
        start = time.monotonic()
        if self.processes.is_first:
            self._write(window, random, data)
        self._last_checkpoint = time.monotonic()
        self._save_seconds = self._last_checkpoint - start

    def _write(
        self, window: dict[str, Any], random: dict[str, torch.Tensor], data: dict[str, torch.Tensor]
    ) -> None:
        """The files of `_save`, which only the first process writes."""
        self._begin_metrics()
        optimizer = {
            f"{index}/{name}": value.cpu()
            for index, state in self.step.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        state = {
            "settings": self._settings(),
            "epoch": self.epoch,
            "batch": self.batch,
            "window": window,
            "metrics_size": self.metrics.size,
            # Infinity is no JSON value.
            "best": self._best if math.isfinite(self._best) else None,
            "epochs_since_best": self._epochs_since_best,
        }
        tensors = {
            "model": self.model.cpu_state(),
            "optimizer": optimizer,
            "rng": random,
            "data": data,
        }
        of_step = self.step.state_dict()
        if "ema" in of_step:
            tensors["ema"] = {str(index): one.cpu() for index, one in enumerate(of_step["ema"])}
        if "scaler" in of_step:
            state["scaler"] = of_step["scaler"]
        self.store.save(Checkpoint(self.steps_taken, tensors, state))
        self._keep_model(self.directory)

    def _random_state(self) -> dict[str, torch.Tensor]:
        """The states of all processes' generators, by kind and rank."""
        own = {"cpu": torch.get_rng_state(), **other_states()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        return self._of_processes(own)

    def _of_processes(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What each process has, by name and rank."""
        return {
            f"{name}/{rank}": value
            for rank, of_rank in enumerate(self.processes.gathered(own))
            for name, value in of_rank.items()
        }

    def _of_process(self, of_all: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process had, or the first one where the run did not have this one."""
        parts = [(*name.rpartition("/"), value) for name, value in of_all.items()]
        for rank in (self.processes.rank, 0):
            found = {name: value for name, _, its_rank, value in parts if its_rank == str(rank)}
            if found:
                return found
        return {}

    def _keep_model(self, directory: Path) -> None:
        data = {"data": self.source.name, "validation": self.source.validation_name}
        training = {**data, "step": self.steps_taken, **dataclasses.asdict(self.config)}
        with self.step.averaged():
            self.model.save_pretrained(directory, metadata={"training": training})

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Become the run that `checkpoint` was taken of."""
        of_model = checkpoint.tensors["model"]
        check_fit(self.model, of_model, f"model: the checkpoints in {self.directory} are of another one")
        self.model.load_state_dict(of_model)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in checkpoint.tensors.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            moments.setdefault(int(index), {})[name] = value
        optimizer = self.step.optimizer
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        for index, of_one in moments.items():
            # The fused update goes through them as they lie in memory, which is as the parameter does.
            for name, value in of_one.items():
                if value.shape == parameters[index].shape:
                    of_one[name] = laid_out_as(value, parameters[index])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        random, rank = checkpoint.tensors["rng"], self.processes.rank
        if f"cpu/{rank}" in random:
            torch.set_rng_state(random[f"cpu/{rank}"])
        else:
            # A process that the run did not have.
            torch.manual_seed(self._seed())
        if self.device.type == "cuda" and f"cuda/{rank}" in random:
            torch.cuda.set_rng_state(random[f"cuda/{rank}"], self.device)
        set_other_states(
            {name: random[f"{name}/{rank}"] for name in ("numpy", "python") if f"{name}/{rank}" in random}
        )
        self.steps_taken = checkpoint.step
        self.epoch = checkpoint.state["epoch"]
        self.batch = checkpoint.state["batch"]
        self.window.restore(checkpoint.state["window"], self.device)
        best = checkpoint.state["best"]
        self._best = math.inf if best is None else best
        self._epochs_since_best = checkpoint.state["epochs_since_best"]
        if self.config.patience is not None and self._epochs_since_best >= self.config.patience:
            self._is_asked_to_stop = self._is_stopped = True
        of_step: dict[str, Any] = {"count": self.steps_taken}
        if "ema" in checkpoint.tensors:
            averages = checkpoint.tensors["ema"]
            of_step["ema"] = [averages[str(index)] for index in range(len(averages))]
        if "scaler" in checkpoint.state:
            of_step["scaler"] = checkpoint.state["scaler"]
        self.step.load_state_dict(of_step)

    # The loop

    def _train(self, interrupt: Request) -> None:
        view = ProgressView(
            self.console,
            epochs=self._epochs(),
            steps=self._total_steps(),
            step=self.steps_taken,
        )
        self._started = time.monotonic()
        with view:
            if self._is_to_be_validated():
                self._validate_and_log(view, interrupt, ends_epoch=True)
            while self._goes_on(interrupt):
                for group in self._groups():
                    # Not before the next batch is there: the last window of an epoch is logged at its end.
                    if self.batch and not self.window.is_empty:
                        if self._is_to_be_validated_within_epoch():
                            if not self._validate_and_log(view, interrupt) or not self._goes_on(interrupt):
                                break
                        elif self.steps_taken % self.config.log_every == 0:
                            self._log(view)
                    if self.steps_taken == 0 and self.model.awaits_samples:
                        self._initialize(group[0])
                    count = sum(len(batch) for batch in group)
                    if len(group) == 1:
                        self.window.add(self.step(group[0]), count)
                    else:
                        terms = self.step.many(group)
                        self.window.add({name: values.mean() for name, values in terms.items()}, count)
                    self.steps_taken += len(group)
                    self.batch += len(group)
                    view.advance(self.steps_taken, self.epoch)
                    if self.processes.is_one or self.steps_taken % self.config.log_every == 0:
                        if not self._goes_on(interrupt, may_save=True):
                            break
                    elif self._has_ended():
                        break
                else:
                    self._end_epoch(view, interrupt)
                    continue
                # What a validation within the epoch has ended is told already.
                if interrupt.signal is None and not self.window.is_empty:
                    self._validate_and_log(view, interrupt, ends_epoch=True)

    def _initialize(self, batch: torch.Tensor) -> None:
        """Let the model begin with what the first batch of the run says, in all processes with all of it."""
        if not self.processes.is_one:
            batch = torch.cat(self.processes.gathered(batch.cpu())).to(self.device)
        self.model.initialize(batch)
        self.step.restart_average()

    def _goes_on(self, interrupt: Request, may_save: bool = False) -> bool:
        """Whether there is another step to take; all processes say the same. Saves, if it may and it is time."""
        last = self._started if self._last_checkpoint is None else self._last_checkpoint
        between = max(self.config.checkpoint_seconds, SAVES_APART * self._save_seconds)
        # The others do not know how long the first one writes.
        is_due = may_save and self.processes.is_first and time.monotonic() - last >= between
        if isinstance(interrupt, AgreedInterrupt):
            is_due, self._is_stopped = interrupt.agree(is_due, self._is_asked_to_stop)
        else:
            self._is_stopped = self._is_asked_to_stop
        if interrupt.signal is not None or self._has_ended():
            return False
        if is_due:
            self._save()
        return True

    def _has_ended(self) -> bool:
        """Whether the run's steps are taken, or it was told to stop."""
        if self.config.steps is not None and self.steps_taken >= self.config.steps:
            return True
        return self._is_stopped or (self.config.steps is None and self.epoch >= self.config.epochs)

    def _is_to_be_validated(self) -> bool:
        """Whether a run of so many steps was interrupted once it had taken them, but not told what they led to."""
        return self.steps_taken == self.config.steps and not self.window.is_empty

    def _is_to_be_validated_within_epoch(self) -> bool:
        every = self.config.validate_every
        return every is not None and self.held_out is not None and self.steps_taken % every == 0

    def _groups(self) -> Iterator[list[torch.Tensor]]:
        """The batches that are left of the epoch, by as many as a CUDA graph takes.

        Groups are of one size, and end where a line is logged or samples are validated, and where the run does.
        """
        most = max(1, self.config.steps_per_replay) if self.device.type == "cuda" else 1
        ends = [one for one in (self.config.log_every, self.config.validate_every) if one is not None]
        step, group = self.steps_taken, []
        for batch in self.batches.epoch(self.epoch, first=self.batch):
            if step == self.steps_taken:
                # What an iterable gives is known now.
                self.model.check_order(self.source.sample_shape, "dataset")
            if group and len(batch) != len(group[0]):
                yield group
                group = []
            group.append(batch)
            step += 1
            if len(group) == most or step == self.config.steps or any(step % every == 0 for every in ends):
                yield group
                group = []
        if group:
            yield group

    def _end_epoch(self, view: ProgressView, interrupt: Request) -> None:
        # A run that goes on where a run of so many steps ended, which was with the epoch, has that behind it.
        if not self.window.is_empty and not self._validate_and_log(view, interrupt, ends_epoch=True):
            return
        self.epoch += 1
        self.batch = 0
        if self._last_checkpoint is None:
            self._save()

    def _validate_and_log(self, view: ProgressView, interrupt: Request, ends_epoch: bool = False) -> bool:
        """Validate and log, and see whether to go on; False if an interruption leaves this to the resumed run."""
        means = self.window.means()
        samples_per_s = self.window.samples_per_s()
        self._check_finite(means)
        held_out = self._validate(interrupt)
        if held_out is None:
            return False
        for name, value in held_out.items():
            if not math.isfinite(value):
                raise self._diverged(f"{HELD_OUT}{name}")
        self._check_weights()
        record = self._log(
            view, means, samples_per_s, held_out_measures(held_out, self._peak) if held_out else {}
        )
        if "loss" in held_out:
            self._compare_with_best(held_out["loss"])
        if ends_epoch:
            for callback in self.callbacks:
                callback.on_epoch_end(self, record)
        return True

    def _compare_with_best(self, loss: float) -> None:
        if loss < self._best:
            self._best = loss
            self._epochs_since_best = 0
            if self.config.keep_best and self.processes.is_first:
                self._keep_model(self.directory / BEST_FOLDER)
            return
        self._epochs_since_best += 1
        if self.config.patience is not None and self._epochs_since_best >= self.config.patience:
            self._say(
                f"notice: the loss on held-out samples has not fallen below {self._best:.5g} for "
                f"{self._epochs_since_best} {'epochs' if self.config.validate_every is None else 'validations'}; "
                "stopping"
            )
            self.stop()

    def _log(
        self,
        view: ProgressView,
        means: dict[str, float] | None = None,
        samples_per_s: float | None = None,
        held_out: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """Write a line of metrics about the window that ends here, and start a new window; the line."""
        if means is None:
            means = self.window.means()
            samples_per_s = self.window.samples_per_s()
            self._check_finite(means)
        record = {
            "step": self.steps_taken,
            "epoch": self.epoch + 1,
            "lr": self._last_rate(),
            # Where the terms may not add up to the loss, it is one of them, and takes this place.
            "loss": sum(means.values()),
            **means,
        }
        if isinstance(self.model, SparseAutoencoder) and self.model.config.has_unused:
            record["dead"] = self.model.dead.float().mean().item()
        # A run that goes on where an epoch's steps were all taken has timed none of them.
        if samples_per_s is not None:
            record["samples_per_s"] = round(samples_per_s, 1)
        for name, value in (held_out or {}).items():
            record[f"{HELD_OUT}{name}"] = value
        if self.processes.is_first:
            self._begin_metrics()
            self.metrics.write(record)
        view.log(record, ends_epoch=held_out is not None)
        for callback in self.callbacks:
            callback.on_log(self, record)
        self.window.reset()
        return record

    def _last_rate(self) -> float:
        """The learning rate of the last step."""
        last = torch.tensor(float(max(0, self.steps_taken - 1)), dtype=torch.float64)
        return self.config.lr * self.step.schedule(last).item()

    @functools.cached_property
    def _peak(self) -> float:
        # Going through batches may draw random numbers, which are not the training's.
        with self._validation_noise():
            peak = peak_of(self.held_out.in_order())
        return self.processes.largest(torch.tensor(peak, device=self.device)).item()

    @functools.cached_property
    def _variance(self) -> float:
        with self._validation_noise():
            return variance_of(self.held_out.in_order(), self.processes)

    def _validate(self, interrupt: Request) -> dict[str, float] | None:
        """The model's measures, averaged over the held-out samples, or None if a signal arrived meanwhile.

        The explained variance is of that of all the samples, and left out where they have none.
        """
        if self.held_out is None:
            return {}
        total = Window(self.processes)
        with self._validation_noise(), self.step.averaged(), torch.no_grad():
            if not self.processes.is_one:
                # Running statistics are each process's own, and the first one's are kept.
                for buffer in self.model.buffers():
                    dist.broadcast(buffer, 0)
            with evaluating(self.model):
                for batch in self.held_out.in_order():
                    if interrupt.signal is not None:
                        return None
                    if isinstance(self.held_out, IterableBatches):
                        self.model.check_order(self.held_out.sample_shape, "validation")
                    total.add(self.model.evaluate(batch), len(batch))
        means = total.means()
        # What a batch explains of its own variance depends on its size.
        if means.pop("explained_variance", None) is not None and self._variance > 0:
            means["explained_variance"] = 1.0 - means["mse"] / self._variance
        return means

    @contextlib.contextmanager
    def _validation_noise(self) -> Iterator[None]:
        """Stochastic models get the same noise whenever they are here, and training noise is not used up."""
        with seeded(self._seed(), self.device):
            yield

    def _check_finite(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._diverged(f"the loss term {name}")

    def _check_weights(self) -> None:
        # The loss was computed before the update it led to, so it does not tell.
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise self._diverged("a weight")

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} is no longer finite at step {self.steps_taken:,} (epoch {self.epoch + 1}); "
            f"lower lr={self.config.lr:g}. {self._last_good()}"
        )

    def _last_good(self) -> str:
        if self._is_replacing:
            return "The run that was to be replaced is still there"
        kept = self.store.paths()
        return f"The last good checkpoint is {kept[-1]}" if kept else "No checkpoint was written before"

    # What a finished run leaves behind

    def _last_measures(self) -> dict[str, float]:
        """The measures on held-out samples that the log has last, also where there was nothing left to train."""
        records = read_metrics(self.directory / METRICS_FILE)
        last = next((record for record in reversed(records) if f"{HELD_OUT}loss" in record), {})
        return {name.removeprefix(HELD_OUT): last[name] for name in last if name.startswith(HELD_OUT)}

    def _sample_batches(self) -> list[torch.Tensor]:
        """Batches of one size, as training draws them."""
        batches = [batch for _, batch in zip(range(COMPARED_BATCHES), self.batches.epoch(0), strict=False)]
        return [batch for batch in batches if len(batch) == len(batches[0])]

    def _shown_shape(self) -> tuple[int, ...]:
        """The shape of a sample in pictures: of flat ones that of the model's images, if it has any."""
        shape = self.source.sample_shape
        return (getattr(self.model.config, "image_shape", None) or shape) if len(shape) == 1 else shape

    def _plot(self) -> None:
        folder = self.directory / PLOT_FOLDER
        folder.mkdir(exist_ok=True)
        title = f"{self.model.name} on {self.source.name}"
        if self.held_out is not None:
            # The first process draws alone.
            with (
                evaluating(self.model),
                self._mmd_over(None),
                self._validation_noise(),
                self.step.averaged(),
                torch.no_grad(),
            ):
                samples = self.held_out.spread(PLOTTED_SAMPLES)
                shown = self.model.illustrate(samples)
            plot_samples(
                {name: samples.cpu() for name, samples in shown.items()},
                self._shown_shape(),
                f"{title}: held-out samples after step {self.steps_taken:,}",
                folder / "reconstructions.png",
            )
        plot_loss(read_metrics(self.directory / METRICS_FILE), title, folder / "loss.png")
