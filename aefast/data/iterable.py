"""Batches that something else makes: a `DataLoader`, a list, a function that yields them."""

from __future__ import annotations

import io
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from aefast._random import other_states, set_other_states
from aefast.data.dataset import BYTES_ARE_IMAGES, DataError, DataWarning
from aefast.data.files import not_finite

# Keys that hold the samples in a batch of several entries, the first that is there.
_BATCH_KEYS = ("x", "image", "data", "pixel_values")


class IterableBatches:
    """Batches of an iterable that is gone through once an epoch.

    A batch is a tensor or array (B, ...), a tuple or list that begins with one, or a dict with one as "x", "image",
    "data" or "pixel_values". It becomes (B, features) in float32; uint8 values are divided by 255.

    `set_epoch` of the iterable, its sampler or its data set is called before an epoch, where there is one. An iterable
    with `state_dict` and `load_state_dict` is taken back to a batch by these. Any other begins the epoch again, with
    the random numbers of PyTorch's, numpy's and Python's global generators and of the ``generator`` of the iterable,
    its sampler and its data set as they were then, and the batches before that one are read and left out. What is drawn
    otherwise is not drawn again: from a numpy Generator that the data set keeps, or by workers that live from epoch to
    epoch (``persistent_workers``). `restore` tells of it, if the last batch that is left out shows it.

    Args:
        source: the iterable, or a function without arguments that returns one.
        features: values of a sample.
        device: where batches go.
        argument: what the source is called in messages.

    Attributes:
        name: what kind of source it is.
        sample_shape: shape of a sample before it was flattened, once a batch was read.

    Raises:
        DataError: `source` cannot be gone through, or only once.

    Warns:
        DataWarning: of uint8 values that are divided by 255, as those of images are, and look like counts: a first
            batch of the shape (B, features), no value of which is 255.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        features: int,
        device: torch.device,
        argument: str = "dataset",
    ) -> None:
        self._is_function = callable(source) and not hasattr(source, "__iter__")
        if not self._is_function and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise DataError(f"{argument}={source!r}: expected a Dataset or an iterable of batches")
        if isinstance(source, Iterator):
            raise DataError(
                f"{argument}={source!r}: expected batches that can be gone through in every epoch, got an iterator, "
                "which has an end; pass the function that makes it, or what it iterates over"
            )
        self.name = getattr(source, "__name__", type(source).__name__)
        self.sample_shape: tuple[int, ...] = (features,)
        self._source = source
        self._features = features
        self._device = device
        self._argument = argument
        # Random states before the present epoch began, of PyTorch and the source, and of others.
        self._before: list[torch.Tensor] = []
        self._has_looked_at_bytes = False
        self._others_before: dict[str, torch.Tensor] = {}
        # The batch that was read last in the epoch, and its number.
        self._last: tuple[int, torch.Tensor] | None = None
        # The number and the checksum of the one that was it when the state was taken that `restore` got.
        self._expected: tuple[int, int] | None = None
        self._tell: Callable[[str], None] | None = None
        # Whether all of its batches were read.
        self._has_ended = False
        # Of the epoch that `restore` goes on with: whether the source is at its place, and whether that is the end.
        self._is_positioned = False
        self._is_past_end = False

    def __len__(self) -> int:
        """Batches of an epoch; `TypeError` if the source does not tell."""
        return len(self._source)

    def fingerprint(self) -> str:
        """What kind of source it is, and how many batches it has where it tells."""
        try:
            return f"{self.name} of {len(self)} batches"
        except TypeError:
            return self.name

    def epoch(self, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """The batches (B, features) of an epoch, from batch number `first` on.

        Raises:
            DataError: there is no batch, or one that is empty or is not of such samples, or, on the CPU, one that holds
                NaN or infinity.
        """
        is_positioned, is_past_end = self._is_positioned, self._is_past_end
        self._is_positioned = self._is_past_end = False
        if first and is_past_end:
            return
        self._has_ended = False
        for owner in self._parts():
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        if first and is_positioned:
            batches = iter(self._source)
        elif first:
            batches = self._skipped(first, epoch)
        else:
            self._before, self._others_before = self._random(), other_states()
            self._last = self._expected = None
            batches = self._iterator()
        number = first - 1
        for number, batch in enumerate(batches, first):
            prepared = self._prepared(batch, f"batch {number} of epoch {epoch}")
            self._last = number, prepared
            yield prepared
        if number < 0:
            raise DataError(f"{self._argument}: expected at least one batch, epoch {epoch} has none")
        self._has_ended = True

    def in_order(self) -> Iterator[torch.Tensor]:
        """All batches, as they come. The iterable's generators, numpy's and Python's are left as they were before."""
        before, others_before = self._random()[1:], other_states()
        try:
            for number, batch in enumerate(self._iterator()):
                yield self._prepared(batch, f"batch {number}")
        finally:
            self._set_generators(before)
            set_other_states(others_before)

    def spread(self, count: int) -> torch.Tensor:
        """The first `count` samples (n, features), or all if they are fewer."""
        taken: list[torch.Tensor] = []
        for batch in self.in_order():
            taken.append(batch)
            if sum(map(len, taken)) >= count:
                break
        return torch.cat(taken)[:count]

    def state(self) -> dict[str, torch.Tensor]:
        """Where in an epoch it is, for `restore`.

        Of the source's own state it holds tensors and plain values alone; if there is more to it, none of it.
        """
        state = {
            "before": self._before,
            "others_before": self._others_before,
            "now": self._random()[1:],
            "has_ended": self._has_ended,
            "last": self._expected if self._last is None else (self._last[0], _checksum(self._last[1])),
        }
        if self._is_stateful():
            try:
                return {"state": _to_bytes({**state, "source": self._source.state_dict()})}
            except pickle.UnpicklingError:
                pass
        return {"state": _to_bytes(state)}

    def restore(self, state: dict[str, torch.Tensor], tell: Callable[[str], None] | None = None) -> bool:
        """Go on where `state` was taken; whether batches before that are not read again.

        The next call of `epoch` has to be the one that goes on. PyTorch's, numpy's and Python's global generators have
        to be put where they were by then. `tell` gets a sentence if what is read again is not what it was.
        """
        content = _from_bytes(state["state"])
        self._before = content["before"]
        self._others_before = content.get("others_before", {})
        self._last, self._expected, self._tell = None, content.get("last"), tell
        self._has_ended = self._is_past_end = content["has_ended"]
        self._is_positioned = "source" in content and self._is_stateful()
        if self._is_positioned:
            self._source.load_state_dict(content["source"])
        else:
            self._set_generators(content["now"])
        return self._is_positioned

    def generator_state(self) -> torch.Tensor:
        """The state of the iterable's generators alone, (n,) uint8, for `restore_generators`."""
        return _to_bytes({"now": self._random()[1:]})

    def restore_generators(self, state: torch.Tensor) -> None:
        """Put the generators where `state` was taken."""
        self._set_generators(_from_bytes(state)["now"])

    def _is_stateful(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")

    def _parts(self) -> list[Any]:
        """The source and what it takes its order and samples from."""
        names = ("sampler", "batch_sampler", "dataset")
        parts = [self._source, *(getattr(self._source, name, None) for name in names)]
        parts.append(getattr(parts[2], "sampler", None))
        return list({id(part): part for part in parts if part is not None}.values())

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in self._parts()]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=False):
            generator.set_state(state)

    def _random(self) -> list[torch.Tensor]:
        """The states of PyTorch's generator and of the source's own ones."""
        return [torch.get_rng_state(), *(generator.get_state() for generator in self._generators())]

    def _iterator(self) -> Iterator[Any]:
        return iter(self._source() if self._is_function else self._source)

    def _skipped(self, first: int, epoch: int) -> Iterator[Any]:
        """The batches from number `first` on of an epoch that begins with the random states that it had begun with."""
        present, others_present = torch.get_rng_state(), other_states()
        if self._before:
            torch.set_rng_state(self._before[0])
            self._set_generators(self._before[1:])
            set_other_states(self._others_before)
        else:
            self._before, self._others_before = self._random(), others_present
        try:
            batches = self._iterator()
            for number in range(first):
                batch = next(batches, None)
                if self._expected is not None and number == self._expected[0]:
                    self._compare(batch, f"batch {number} of epoch {epoch}")
        finally:
            torch.set_rng_state(present)
            set_other_states(others_present)
        return batches

    def _compare(self, batch: Any, which: str) -> None:
        """Tell if a batch that is read again, or None if there is none, is not what it was."""
        is_same = batch is not None and _checksum(self._prepared(batch, which)) == self._expected[1]
        if not is_same and self._tell is not None:
            self._tell(
                f"{self._argument}: the iterable gave other batches than before ({which}); the run goes on with other "
                "data"
            )

    def _prepared(self, batch: Any, which: str) -> torch.Tensor:
        """The samples of a batch, (B, features), float32, on the device."""
        where = f"{self._argument}: {which}"
        if isinstance(batch, Mapping):
            key = next((key for key in _BATCH_KEYS if key in batch), None)
            if key is None:
                listed = ", ".join(map(repr, batch)) or "none"
                named = " or ".join(map(repr, _BATCH_KEYS))
                raise DataError(f"{where}: expected samples called {named}, the batch's keys: {listed}")
            batch = batch[key]
        elif isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if hasattr(batch, "toarray"):
            raise DataError(
                f"{where}: expected a dense array, got the sparse {type(batch).__name__}; give batch.toarray()"
            )
        if isinstance(batch, torch.Tensor) and batch.layout != torch.strided and not batch.is_nested:
            raise DataError(
                f"{where}: expected a dense tensor, got layout {batch.layout}; give batch.to_dense()"
            )
        if isinstance(batch, np.ndarray) and batch.dtype.kind in "fiub":
            batch = torch.as_tensor(batch)
        if not isinstance(batch, torch.Tensor) or batch.is_complex():
            found = f"dtype {batch.dtype}" if hasattr(batch, "dtype") else type(batch).__name__
            raise DataError(f"{where}: expected a tensor of real numbers, got {found}")
        shape = tuple(batch.shape)
        if len(shape) < 2 or shape[0] == 0 or batch[0].numel() != self._features:
            raise DataError(
                f"{where}: expected shape (B, ...) with {self._features} values a sample, the model's input_size, and "
                f"B above 0, got {shape}"
            )
        self.sample_shape = shape[1:]
        is_bytes = batch.dtype == torch.uint8
        if is_bytes and not self._has_looked_at_bytes:
            self._has_looked_at_bytes = True
            if len(shape) == 2 and batch.max() < 255:
                warnings.warn(f"{where}: {BYTES_ARE_IMAGES}", DataWarning, stacklevel=2)
        batch = batch.detach().flatten(1)
        if batch.device.type == "cpu":
            batch = batch.float().mul(1 / 255) if is_bytes else batch.float()
            finite = batch.isfinite()
            if not finite.all():
                row, column = (~finite).nonzero()[0].tolist()
                raise not_finite(where, row, column, batch[row, column].item())
            if self._device.type == "cuda":
                batch = batch.pin_memory()
            return batch.to(self._device, non_blocking=True)
        batch = batch.to(self._device, torch.float32)
        return batch.mul(1 / 255) if is_bytes else batch


def _checksum(batch: torch.Tensor) -> int:
    """Of up to 64 rows of a batch (B, features)."""
    rows = torch.linspace(0, len(batch) - 1, min(64, len(batch)), dtype=torch.float64).long()
    return zlib.crc32(batch[rows.to(batch.device)].cpu().contiguous().numpy())


def _to_bytes(content: dict[str, Any]) -> torch.Tensor:
    """`content` as (n,) uint8; `pickle.UnpicklingError` if it holds more than tensors and plain values."""
    file = io.BytesIO()
    try:
        torch.save(content, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise pickle.UnpicklingError(str(error)) from None
    result = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    _from_bytes(result)
    return result


def _from_bytes(content: torch.Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
