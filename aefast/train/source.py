"""What a run trains and validates on, whichever way its data comes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch

from aefast.data import Batches, Dataset, FileRows, IterableBatches
from aefast.errors import InputError
from aefast.train.config import TrainConfig

# A data set moves to the GPU whole if it takes at most this share of the free memory there.
_GPU_SHARE = 0.5

Data: TypeAlias = Dataset | Iterable[Any] | Callable[[], Iterable[Any]]


class Source:
    """The batches of a run, for training and for validation.

    Args:
        data: a data set, or what `IterableBatches` takes.
        validation: the same, or None: a part of `data` if that is a data set, nothing if not.
        features: values of a sample.
        config: how the run trains.
        device: where batches go.
        share: which share of each batch of a data set this process gets, and of how many. Batches of an iterable are
            taken as they come: where there are several processes, it has to give each its own.

    Attributes:
        training: batches to train on.
        held_out: batches to validate on, or None.
        name: what the data is called in plots and config.json.

    Raises:
        InputError: samples of another size, fewer than there are processes, or something that gives no batches.
    """

    def __init__(
        self,
        data: Data,
        validation: Data | None,
        features: int,
        config: TrainConfig,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._data = data
        self._validation = validation
        self._options = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "device": device,
            "share": share,
        }
        self._drop_last = config.drop_last
        self.training: Batches | IterableBatches
        self.held_out: Batches | IterableBatches | None = None
        for argument, given in (("dataset", data), ("validation", validation)):
            if isinstance(given, (torch.Tensor, np.ndarray)):
                raise InputError(
                    f"{argument}: expected a Dataset or something that gives batches, got an array of shape "
                    f"{tuple(given.shape)}; aefast.data.Dataset(name, samples, sample_shape) makes one of it, its "
                    "samples being a tensor of rows, such as x.flatten(1) of images x, and sample_shape x.shape[1:]"
                )
            if isinstance(given, Dataset) and given.features != features:
                raise InputError(
                    f"{argument}: expected {features} features a sample, the model's input_size, "
                    f"got {given.features}"
                )
        if isinstance(data, Dataset):
            self.name = data.name
            self._samples = _placed(data.samples, device)
            self._is_split = validation is None
            self._cut(data)
        else:
            self.training = IterableBatches(data, features, device)
            self.name = self.training.name
        # Of what is no part of the data.
        self.validation_name: str | None = None
        if isinstance(validation, Dataset):
            self.validation_name = validation.name
            self.held_out = Batches(_placed(validation.samples, device), validation.rows(), **self._options)
        elif validation is not None:
            self.held_out = IterableBatches(validation, features, device, "validation")
            self.validation_name = self.held_out.name

    def _cut(self, data: Dataset) -> None:
        training, held_out = data.split() if self._is_split else (data.rows(), None)
        self.training = Batches(self._samples, training, **self._options, drop_last=self._drop_last)
        if len(self.training) == 0:
            least, why = self.training.share[1], "one for each process"
            if self._drop_last:
                least, why = self.training.batch_size, "a whole batch"
            raise InputError(
                f"dataset: expected at least {least} samples to train on, {why}, got {len(training)}"
            )
        if held_out is not None:
            self.held_out = Batches(self._samples, held_out, **self._options)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample before it was flattened, as far as that is known."""
        return self._data.sample_shape if isinstance(self._data, Dataset) else self.training.sample_shape

    def steps_per_epoch(self) -> int | None:
        """Batches of an epoch, or None if an iterable does not tell."""
        try:
            return len(self.training)
        except TypeError:
            return None

    def fingerprint(self) -> str:
        """What tells the data from other data."""
        return (self._data if isinstance(self._data, Dataset) else self.training).fingerprint()

    def validation_fingerprint(self) -> str | None:
        """What tells the held-out samples from others; None if there are none."""
        if isinstance(self._validation, Dataset):
            return self._validation.fingerprint()
        if isinstance(self.held_out, IterableBatches):
            return self.held_out.fingerprint()
        if self.held_out is None:
            return None
        return "a drawn part" if self._data.held_out is None else f"the last {self._data.held_out} samples"

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on within an epoch, of this process."""
        if isinstance(self.training, IterableBatches):
            state = self.training.state()
        else:
            state = {"block_rows": torch.tensor(self._data.block_rows or 0)}
        if isinstance(self.held_out, IterableBatches):
            state["validation"] = self.held_out.generator_state()
        return state

    def restore(self, state: dict[str, torch.Tensor], tell: Callable[[str], None]) -> bool:
        """Go on as the run did that `state` is from; whether no batch has to be read again for it.

        `tell` gets a sentence if one is, and shows that it is not what it was.
        """
        if isinstance(self.held_out, IterableBatches):
            self.held_out.restore_generators(state["validation"])
        if isinstance(self.training, IterableBatches):
            return self.training.restore(state, tell)
        # Whether rows are shuffled by blocks was decided by the memory that was free when that run began.
        block_rows = int(state.get("block_rows", 0)) or None
        if block_rows != self._data.block_rows:
            self._data = dataclasses.replace(self._data, block_rows=block_rows)
            self._cut(self._data)
        return True


def described(fingerprint: str | None) -> str:
    """A fingerprint in words: of a data set how many samples it has, and of which size."""
    if fingerprint is None:
        return "none"
    sizes = re.fullmatch(r"(\d+)x(\d+)-[0-9a-f]{8}", fingerprint)
    if sizes is None:
        return fingerprint
    return f"{int(sizes[1]):,} samples of {sizes[2]} features"


def _placed(samples: torch.Tensor | FileRows, device: torch.device) -> torch.Tensor | FileRows:
    """The samples on the GPU if they fit there with room to spare, else where they are."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if samples.nbytes <= _GPU_SHARE * free:
            return samples.to(device)
    return samples
