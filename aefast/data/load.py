"""`load`: a data set from an array file or by its name."""

from __future__ import annotations

import difflib
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from aefast.data.bundled import digits, patches
from aefast.data.dataset import DataError, Dataset

SOURCES = {
    "digits": "1,797 handwritten digits of 8×8 pixels (scikit-learn)",
    "patches": "120,000 grey patches of 16×16 pixels from photographs (scikit-image, scikit-learn)",
}
"""Data sets known by name, with what they hold. They come inside Python packages: nothing is downloaded."""

FILE_SUFFIXES = (".npy", ".npz", ".pt")

# Keys that hold the samples in a file of several arrays, the first that is there.
_SAMPLE_KEYS = ("x", "data")

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)

# Rows are converted and checked in pieces of about this many values, so that a memory-mapped file is never
# copied whole for a check.
_PIECE_VALUES = 1 << 24


def load(source: str | Path, *, patch_size: int = 16) -> Dataset:
    """The samples of `source` as float32.

    Args:
        source: "digits", "patches", or the path of a ``.npy``, ``.npz`` or ``.pt`` file. The array has shape
            (N, ...): N samples of any shape. Of several arrays, "x" is taken, then "data". uint8 values are
            divided by 255; other integers and booleans keep their value; all floating-point types become
            float32. A float32 ``.npy`` file is memory-mapped, not read.
        patch_size: side of the square patches of "patches", in pixels.

    Raises:
        DataError: an unknown name, a file that is missing, unreadable or holds Python objects, or an array
            that is empty, has fewer than two dimensions or two samples, is complex, or holds NaN or infinity.
    """
    text = str(source)
    if text == "digits":
        return digits()
    if text == "patches":
        return patches(patch_size)
    path = Path(source)
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise DataError(_unknown(text))
    return _dataset(_read(path), path)


def _unknown(text: str) -> str:
    names = ", ".join(SOURCES)
    close = difflib.get_close_matches(text.lower(), SOURCES, n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    return f"data={text!r}: expected one of {names}, or a {', '.join(FILE_SUFFIXES)} file{suggestion}"


def _read(path: Path) -> np.ndarray | torch.Tensor:
    """The array in a file, memory-mapped where the format allows it."""
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise DataError(f"data={str(path)!r}: expected a readable {suffix} file, found {found}")
        if suffix == ".pt":
            return _pick(torch.load(path, map_location="cpu", weights_only=True), path)
        if suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("it is not a .npz archive")
            with np.load(path, allow_pickle=False) as archive:
                array = archive[_pick_key(archive.files, path)]
            # numpy hands out the bytes of a member that does not look like an array.
            if not isinstance(array, np.ndarray):
                raise ValueError("a member is not a .npy array")
            return array
        with open(path, "rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is not a .npy array")
        # Copy-on-write: torch wants writable memory, the file stays as it is.
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except DataError:
        raise
    except pickle.UnpicklingError:
        raise DataError(
            f"data={str(path)!r}: expected a tensor or a dict of tensors, found other Python objects or a "
            "damaged file"
        ) from None
    except Exception as error:
        # What the parsers of numpy, zipfile and torch raise over a damaged file is of no fixed set of types.
        if isinstance(error, ValueError) and ("allow_pickle" in str(error) or "Python objects" in str(error)):
            raise DataError(f"data={str(path)!r}: expected numbers, found Python objects") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"data={str(path)!r}: expected a readable {suffix} file ({reason})") from None


def _pick(content: object, path: Path) -> torch.Tensor:
    if isinstance(content, torch.Tensor):
        return content.detach()
    if isinstance(content, Mapping):
        tensors = [key for key, value in content.items() if isinstance(value, torch.Tensor)]
        return content[_pick_key(tensors, path)].detach()
    raise DataError(
        f"data={str(path)!r}: expected a tensor or a dict of tensors, found {type(content).__name__}"
    )


def _pick_key(keys: list[str], path: Path) -> str:
    for key in _SAMPLE_KEYS:
        if key in keys:
            return key
    if len(keys) == 1:
        return keys[0]
    listed = ", ".join(map(repr, keys)) or "none"
    raise DataError(
        f"data={str(path)!r}: expected one array, or one called 'x' or 'data'; the file's arrays: {listed}"
    )


def _dataset(array: np.ndarray | torch.Tensor, path: Path) -> Dataset:
    where = f"data={str(path)!r}"
    if isinstance(array, torch.Tensor):
        _check_dense(array, where)
    shape = tuple(array.shape)
    if len(shape) < 2:
        raise DataError(f"{where}: expected shape (N, features) or (N, ...), got {shape}")
    if 0 in shape:
        raise DataError(f"{where}: expected at least one value, the array is empty with shape {shape}")
    if shape[0] < 2:
        raise DataError(f"{where}: expected at least 2 samples, one to train on and one held out, got 1")
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: expected real numbers, got dtype {array.dtype}")
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    else:
        tensor = array
    samples = _finite_float32(tensor.reshape(shape[0], -1), where)
    # The bytes of a file name need not be UTF-8, the text that messages and plots show must be.
    name = os.fsencode(path.stem).decode("utf-8", errors="replace")
    return Dataset(name, samples, shape[1:])


def _check_dense(tensor: torch.Tensor, where: str) -> None:
    """That `tensor` holds one number for each element of its shape, in memory."""
    if tensor.is_nested:
        raise DataError(f"{where}: expected samples of one shape, got a nested tensor")
    if tensor.device.type != "cpu":
        raise DataError(f"{where}: expected a tensor with values, got one on the {tensor.device} device")
    if tensor.layout != torch.strided:
        raise DataError(f"{where}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in _DTYPES:
        raise DataError(f"{where}: expected real numbers, got dtype {tensor.dtype}")


def _finite_float32(rows: torch.Tensor, where: str) -> torch.Tensor:
    """`rows` (N, features) as float32, scaled by 1/255 if uint8; `DataError` if a value is not finite."""
    convert = rows.dtype != torch.float32
    try:
        result = torch.empty(rows.shape) if convert else rows
    except RuntimeError:
        raise DataError(f"{where}: {rows.numel():,} values do not fit into memory as float32") from None
    piece = max(1, _PIECE_VALUES // rows.shape[1])
    for start in range(0, len(rows), piece):
        block = result[start : start + piece]
        if convert:
            block.copy_(rows[start : start + piece])
            if rows.dtype == torch.uint8:
                block.mul_(1 / 255)
        finite = torch.isfinite(block)
        if not finite.all():
            row = int((~finite).any(dim=1).nonzero()[0])
            column = int((~finite[row]).nonzero()[0])
            value = rows[start + row, column].item()
            place = f"row {start + row}, column {column} holds {value}"
            if math.isfinite(value):
                raise DataError(f"{where}: {place}, which is too large for float32")
            raise DataError(f"{where}: expected finite numbers, but {place}")
    return result
