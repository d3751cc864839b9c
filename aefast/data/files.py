"""Samples that stay in their files until a batch needs them."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from aefast.data.dataset import DataError

# Rows are converted and checked in pieces of about this many values, so that a file is never copied whole.
PIECE_VALUES = 1 << 24

# What a byte is multiplied by. Rounded to float32, as PyTorch rounds a number that float32 is multiplied by.
BYTE_SCALE = np.float32(1 / 255)

# A mapped file holds a descriptor, of which processes usually have 1024.
_OPEN_FILES = 256


class FileRows(abc.ABC):
    """N samples in files, read and converted to float32 when they are asked for.

    It stands where a tensor (N, features) may stand, and takes none of its memory.

    Attributes:
        shape: (N, features).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all samples as float32."""
        return 4 * self.shape[0] * self.shape[1]

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """The samples (n, features), float32, of row numbers (n,), int64."""
        return self.read(rows, torch.empty(len(rows), self.shape[1]))

    def read(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` (n, features), float32 on the CPU, filled with the samples of row numbers (n,), int64.

        Raises:
            DataError: a file cannot be read any more, or a value is not finite in float32.
        """
        self._fill(rows.numpy(), out.numpy())
        return out

    def check(self, rows: torch.Tensor) -> None:
        """Read the samples of row numbers (n,), int64; `DataError` if one cannot be trained on."""
        for piece in rows.split(self._piece):
            self[piece]

    def check_all(self) -> None:
        """The same of all samples, in order."""
        self.check(torch.arange(len(self)))

    def to(self, device: torch.device) -> torch.Tensor:
        """All samples in a tensor on `device`."""
        result = torch.empty(self.shape, device=device)
        for rows in torch.arange(len(self)).split(self._piece):
            result[int(rows[0]) : int(rows[-1]) + 1] = self[rows]
        return result

    @property
    def _piece(self) -> int:
        return max(1, PIECE_VALUES // self.shape[1])

    @abc.abstractmethod
    def _fill(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the samples of row numbers (n,) into `out` (n, features), float32."""


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """Where an array (N, ...) lies in a file: `offset` bytes from its beginning, in C order.

    numpy has no bfloat16: where `is_bfloat16`, `dtype` is that of integers which have its bits.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    is_bfloat16: bool = False

    @property
    def number_type(self) -> str:
        """What the numbers are called in messages, such as "float32" or "bfloat16"."""
        return "bfloat16" if self.is_bfloat16 else str(self.dtype)


class ArrayRows(FileRows):
    """The rows of arrays in files, one array after the other.

    Args:
        files: the files, all of one type and one shape of a sample, none of them empty.
    """

    def __init__(self, files: Sequence[ArrayFile]) -> None:
        self._files = files
        self._dtype = files[0].dtype
        # Number of the row behind each file's last one.
        self._ends = np.cumsum([file.shape[0] for file in files])
        self._opened = functools.lru_cache(_OPEN_FILES)(self._open)
        # Whether what is read may hold NaN or infinity.
        self._is_doubtful = self._dtype.kind == "f" or files[0].is_bfloat16
        super().__init__((int(self._ends[-1]), math.prod(files[0].shape[1:])))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all samples as they lie in the files."""
        return self.shape[0] * self.shape[1] * self._dtype.itemsize

    def check(self, rows: torch.Tensor) -> None:
        if self._is_doubtful:
            super().check(rows)

    def check_all(self) -> None:
        """The same of all samples. Their files are in memory then, if that holds them."""
        if self._is_doubtful:
            super().check_all()
            self._is_doubtful = False
            return
        piece = bytearray(PIECE_VALUES)
        for file in self._files:
            with open(file.path, "rb", buffering=0) as content:
                while content.readinto(piece):
                    pass

    def _open(self, number: int) -> np.ndarray:
        """The array (n, features) of file `number`, memory-mapped."""
        file = self._files[number]
        try:
            # Read-only: for pages that could be written to the system sets memory aside, as much as the file has.
            mapped = np.memmap(file.path, file.dtype, "r", file.offset, file.shape)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data={str(file.path)!r}: cannot be read any more ({str(error).splitlines()[0]})"
            ) from None
        return mapped.reshape(file.shape[0], -1).view(np.ndarray)

    def _fill(self, rows: np.ndarray, out: np.ndarray) -> None:
        self._gather(rows, out)
        if self._is_doubtful:
            finite = np.isfinite(out)
            if not finite.all():
                place, column = np.argwhere(~finite)[0]
                raise self._not_finite(int(rows[place]), int(column))

    def _gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        if len(self._files) == 1:
            self._convert(self._opened(0), rows, out)
            return
        numbers = np.searchsorted(self._ends, rows, side="right")
        by_file = np.argsort(numbers, kind="stable")
        for places in np.split(by_file, np.flatnonzero(np.diff(numbers[by_file])) + 1):
            if len(places):
                number = numbers[places[0]]
                first = self._ends[number] - self._files[number].shape[0]
                some = np.empty((len(places), self.shape[1]), np.float32)
                self._convert(self._opened(int(number)), rows[places] - first, some)
                out[places] = some

    def _convert(self, array: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        if self._files[0].is_bfloat16:
            # The bits of a bfloat16 are the upper half of those of the same float32.
            np.left_shift(array.take(rows, axis=0), 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            _convert(array, rows, out)

    def _not_finite(self, row: int, column: int) -> DataError:
        number = int(np.searchsorted(self._ends, row, side="right"))
        row -= int(self._ends[number]) - self._files[number].shape[0]
        where = f"data={str(self._files[number].path)!r}"
        value = self._opened(number)[row, column]
        if self._files[number].is_bfloat16:
            value = np.left_shift(value, 16, dtype=np.uint32).view(np.float32)
        return not_finite(where, row, column, value.item())


def _convert(array: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """`array[rows]` as float32 into `out`, scaled to [0, 1] if it holds bytes."""
    if array.dtype == np.float32:
        # With "raise" numpy would take the rows into memory of its own first. They are within the array.
        np.take(array, rows, axis=0, out=out, mode="clip")
        return
    taken = array.take(rows, axis=0)
    if taken.dtype.itemsize > 8:
        taken = taken.astype(np.float64)
    # What is too large becomes infinite, of which the error tells.
    with np.errstate(over="ignore"):
        np.copyto(out, taken, casting="unsafe")
    if taken.dtype == np.uint8:
        np.multiply(out, BYTE_SCALE, out=out)


def not_finite(where: str, row: int, column: int, value: float) -> DataError:
    """The error about a value, as it is stored, that is NaN, infinite, or too large for float32."""
    place = f"row {row}, column {column} holds {value}"
    if math.isfinite(value):
        return DataError(f"{where}: {place}, which is too large for float32")
    return DataError(f"{where}: expected finite numbers, but {place}")
