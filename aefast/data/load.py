"""`load`: a data set from array files, from images, or by its name."""

from __future__ import annotations

import difflib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from aefast.data.blocks import block_rows_of
from aefast.data.bundled import digits, patches
from aefast.data.dataset import DataError, Dataset
from aefast.data.files import PIECE_VALUES, ArrayFile, ArrayRows, FileRows, not_finite
from aefast.data.images import IMAGE_SUFFIXES, ImageRows
from aefast.data.memory import available_bytes

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

# Data becomes a float32 copy in memory if that takes at most this share of what is available.
_COPIED_SHARE = 1 / 16

# Files are read in any order if they take at most this share of it, since they stay in memory once they were read.
_CACHED_SHARE = 1 / 2

# Bytes that the numbers of a row take when all rows are shuffled together.
_ROW_NUMBERS = 40

# Blocks of a larger source that are read in search of values that cannot be trained on, before training reads all.
_PROBED_BLOCKS = 64


def load(source: str | Path, *, patch_size: int = 16, least: int = 2) -> Dataset:
    """The samples of `source` as float32.

    Args:
        source: "digits", "patches", the path of a ``.npy``, ``.npz`` or ``.pt`` file, or a folder of ``.npy`` files or
            of images. An array has shape (N, ...): N samples of any shape. Of several arrays in a file, "x" is
            taken, then "data"; those of a folder follow each other in the order of their names and have one dtype and
            one shape of a sample. uint8 values are divided by 255; other integers and booleans keep their value; all
            floating-point types become float32. Images are grey, (H, W), or have colours, (3, H, W), in [0, 1], and
            are all of one size.
        patch_size: side of the square patches of "patches", in pixels.
        least: how many samples there have to be. By default one to train on and one that is held out.

    ``.npy`` files may be larger than memory. A float32 file is memory-mapped; other ``.npy`` files, and folders, are
    read and converted batch by batch unless they are small beside the memory. What memory cannot hold is shuffled by
    blocks.

    Raises:
        DataError: an unknown name, a file that is missing, unreadable or holds Python objects, a folder with neither
            arrays nor images or with files that differ, or an array that is empty, has fewer than two dimensions or
            too few samples, is complex, or holds NaN or infinity. Of a source that memory does not hold, only some
            blocks are searched for these two; the others are when they are read.
    """
    text = str(source)
    if text == "digits":
        return digits()
    if text == "patches":
        return patches(patch_size)
    path = Path(source)
    if os.path.isdir(path):
        dataset = _of_folder(path)
    elif path.suffix.lower() in FILE_SUFFIXES:
        dataset = _dataset(_read(path), path)
    else:
        raise DataError(_unknown(text))
    if len(dataset) < least:
        raise DataError(f"data={str(path)!r}: expected at least {least} samples, got {len(dataset)}")
    return dataset


def _unknown(text: str) -> str:
    names = ", ".join(SOURCES)
    close = difflib.get_close_matches(text.lower(), SOURCES, n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"data={text!r}: expected one of {names}, a {', '.join(FILE_SUFFIXES)} file, or a folder of .npy files or "
        f"images{suggestion}"
    )


def _of_folder(path: Path) -> Dataset:
    where = f"data={str(path)!r}"
    try:
        # Hidden files are notes that systems take of a folder.
        entries = [file for file in path.iterdir() if not file.name.startswith(".")]
        files = sorted(file for file in entries if file.is_file())
    except OSError as error:
        raise DataError(f"{where}: expected a folder that can be read ({error.strerror})") from None
    for file in sorted(set(entries) - set(files)):
        if file.is_symlink() and not file.exists() and file.suffix.lower() in (".npy", *IMAGE_SUFFIXES):
            raise DataError(f"{where}: expected files, found the link {file.name} to one that does not exist")
    arrays = [file for file in files if file.suffix.lower() == ".npy"]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if arrays and images:
        raise DataError(
            f"{where}: expected .npy files or images, found a folder with both, {arrays[0].name} and {images[0].name}"
        )
    if images:
        rows = ImageRows(images)
        return _of_rows(rows, rows.sample_shape, sum(file.stat().st_size for file in images), path)
    if not arrays:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
        below = f"; what lies in folders below it, such as {folders[0]}, is not read" if folders else ""
        raise DataError(f"{where}: expected .npy files or images, found a folder with neither{below}")
    shards = [_shard(file) for file in arrays]
    for shard in shards:
        for what, expected, got in (
            ("samples of shape", shards[0].shape[1:], shard.shape[1:]),
            ("dtype", shards[0].dtype, shard.dtype),
        ):
            if got != expected:
                raise DataError(
                    f"data={str(shard.path)!r}: expected {what} {expected}, as in {arrays[0].name}, got {got}"
                )
    rows = ArrayRows(shards)
    return _of_rows(rows, shards[0].shape[1:], rows.stored_bytes, path)


def _shard(path: Path) -> ArrayFile:
    array = _read(path)
    where = f"data={str(path)!r}"
    _check_shape(tuple(array.shape), where)
    _check_real(array, where)
    if not array.flags.c_contiguous:
        raise DataError(
            f"{where}: expected samples one after the other (C order), got an array in Fortran order"
        )
    return ArrayFile(path, array.dtype, array.shape, array.offset)


def _of_rows(rows: FileRows, sample_shape: tuple[int, ...], stored_bytes: int, path: Path) -> Dataset:
    """A data set of rows in files that take `stored_bytes`: copied, left in the files, or left there in blocks."""
    name = _name(path)
    available = available_bytes()
    if rows.nbytes <= _COPIED_SHARE * available:
        return Dataset(name, rows.to(torch.device("cpu")), sample_shape)
    if stored_bytes + _ROW_NUMBERS * len(rows) <= _CACHED_SHARE * available:
        # Which also brings them into memory: cold files are slow to read in any order.
        rows.check_all()
        return Dataset(name, rows, sample_shape)
    size = min(block_rows_of(max(1, stored_bytes // len(rows))), max(1, len(rows) // 2))
    blocks = -(-len(rows) // size)
    for number in (
        torch.linspace(0, blocks - 1, min(blocks, _PROBED_BLOCKS), dtype=torch.float64).long().tolist()
    ):
        rows.check(torch.arange(number * size, min((number + 1) * size, len(rows))))
    return Dataset(name, rows, sample_shape, block_rows=size)


def _name(path: Path) -> str:
    """What the data of a file or folder is called."""
    text = path.resolve().name if path.is_dir() else path.stem
    # The bytes of a file name need not be UTF-8, the text that messages and plots show must be.
    return os.fsencode(text).decode("utf-8", errors="replace")


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
        # Read-only: for memory that could be written to the system sets as much aside as the file has.
        return np.load(path, mmap_mode="r", allow_pickle=False)
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
    _check_shape(shape, where)
    if isinstance(array, np.ndarray):
        _check_real(array, where)
        if isinstance(array, np.memmap):
            if _is_left_in_file(array):
                rows = ArrayRows([_shard(path)])
                return _of_rows(rows, shape[1:], rows.stored_bytes, path)
            # Copy-on-write: torch wants writable memory, the file stays as it is.
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    else:
        tensor = array
    samples = _finite_float32(tensor.reshape(shape[0], -1), where)
    return Dataset(_name(path), samples, shape[1:])


def _is_left_in_file(array: np.memmap) -> bool:
    """Whether a mapped array is too large for what is done to small ones: to be copied, or to be read in any order."""
    available = available_bytes()
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array.nbytes + _ROW_NUMBERS * len(array) > _CACHED_SHARE * available
    return 4 * array.size > _COPIED_SHARE * available


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    if len(shape) < 2:
        raise DataError(f"{where}: expected shape (N, features) or (N, ...), got {shape}")
    if 0 in shape:
        raise DataError(f"{where}: expected at least one value, the array is empty with shape {shape}")


def _check_real(array: np.ndarray, where: str) -> None:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: expected real numbers, got dtype {array.dtype}")


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
    piece = max(1, PIECE_VALUES // rows.shape[1])
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
            raise not_finite(where, start + row, column, rows[start + row, column].item())
    return result
