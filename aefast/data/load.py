"""`load`: a data set from array files, from images, or by its name."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from aefast.data.blocks import block_rows_of
from aefast.data.bundled import digits, patches
from aefast.data.dataset import BYTES_ARE_IMAGES, DataError, Dataset, DataWarning
from aefast.data.files import PIECE_VALUES, ArrayFile, ArrayRows, FileRows, not_finite
from aefast.data.images import IMAGE_SUFFIXES, ImageRows
from aefast.data.memory import available_bytes
from aefast.nn.linear_act import check_positive_int

SOURCES = {
    "digits": "1,797 handwritten digits of 8×8 pixels (scikit-learn)",
    "patches": "120,000 grey patches of 16×16 pixels from photographs (scikit-image, scikit-learn)",
}
"""Data sets known by name, with what they hold. They come inside Python packages: nothing is downloaded."""

FILE_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")

# Those of files that a folder may be made of, since they keep an array as it is in memory.
SHARD_SUFFIXES = (".npy", ".safetensors", ".pt")

# Files of tables, which are left to pandas, and what of it reads them.
_TABLE_READERS = {".csv": "read_csv", ".parquet": "read_parquet", ".feather": "read_feather"}

# How an error about a file of a folder ends where the file may not be one of samples.
_REMEDY = "; a file of a folder that holds no samples, such as labels, is to be moved elsewhere"

# Keys that hold the samples in a file of several arrays, the first that is there.
_SAMPLE_KEYS = ("x", "data")

# What `scipy.sparse.save_npz` writes of a matrix of any format.
_SCIPY_KEYS = frozenset({"format", "shape", "data"})

# The types of numbers, with numpy's name for them in files, which are little-endian; bfloat16 as integers of its bits.
_DTYPES = {
    **{torch.float64: "<f8", torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<u2"},
    **{torch.int8: "i1", torch.int16: "<i2", torch.int32: "<i4", torch.int64: "<i8", torch.bool: "?"},
    **{torch.uint8: "u1", torch.uint16: "<u2", torch.uint32: "<u4", torch.uint64: "<u8"},
}

# The same types as a .safetensors file calls them.
_SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool},
    **{"U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
}

# How numpy writes bfloat16 numbers of ml_dtypes, as a type that it does not know.
_UNKNOWN_HALF = np.dtype("V2")

_BFLOAT16 = "bfloat16"
_HALF_INTEGERS = ("int16", "uint16")

# Integers of 16 bits are likely those of bfloat16 numbers if of so many rows such a share of what is not 0 would be
# numbers from 2**-33 to 2**16, of both signs, which as integers lie in two narrow ranges far from each other.
_JUDGED_ROWS = 64
_JUDGED_SHARE = 0.99
_LOW_BITS, _HIGH_BITS = 0x2F00, 0x4780

# Data becomes a float32 copy in memory if that takes at most this share of what is available.
_COPIED_SHARE = 1 / 16

# Files are read in any order if they take at most this share of it, since they stay in memory once they were read.
_CACHED_SHARE = 1 / 2

# Bytes that the numbers of a row take when all rows are shuffled together.
_ROW_NUMBERS = 40

# Blocks of a larger source that are read in search of values that cannot be trained on, before training reads all.
_PROBED_BLOCKS = 64


def _named(dtype: np.dtype | torch.dtype) -> str:
    """What a type is called, whatever the order of its bytes."""
    return str(dtype.newbyteorder("=")) if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class _Reading:
    """How arrays in files are read: options of `load`."""

    dtype: str | None = None
    key: str | None = None
    sample_dims: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, _BFLOAT16):
            raise DataError(
                f"dtype={self.dtype!r}: expected {_BFLOAT16}, the one type that files may keep as another, or none"
            )
        if self.sample_dims is not None:
            check_positive_int(self.sample_dims, "sample_dims")

    def refuse_for(self, source: str) -> None:
        """That none is given for a source that is no array in a file."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                raise DataError(f"{field.name}={value!r}: is of arrays in files, which {source} is not")

    def shape_of(self, shape: tuple[int, ...], where: str, remedy: str = "") -> tuple[int, ...]:
        """(N, ...) for an array of that shape, whose leading dimensions may all count samples."""
        if len(shape) < 2:
            raise DataError(f"{where}: expected shape (N, features) or (N, ...), got {shape}{remedy}")
        if 0 in shape:
            raise DataError(f"{where}: expected at least one value, the array is empty with shape {shape}")
        if self.sample_dims is None:
            return shape
        if len(shape) <= self.sample_dims:
            raise DataError(
                f"{where}: expected more than sample_dims={self.sample_dims} dimensions, got shape {shape}{remedy}"
            )
        count = len(shape) - self.sample_dims
        return (math.prod(shape[:count]), *shape[count:])

    def is_bfloat16(self, dtype: np.dtype | torch.dtype, where: str) -> bool:
        """Whether numbers of such a type in a file are bfloat16 ones, by their type or because it was said."""
        if dtype in (torch.bfloat16, _UNKNOWN_HALF):
            return True
        if self.dtype != _BFLOAT16:
            return False
        if _named(dtype) not in _HALF_INTEGERS:
            raise DataError(
                f"{where}: expected 16-bit integers to take as {_BFLOAT16}, got dtype {_named(dtype)}"
            )
        return True


def load(
    source: str | Path,
    *,
    patch_size: int = 16,
    least: int = 2,
    dtype: str | None = None,
    key: str | None = None,
    sample_dims: int | None = None,
) -> Dataset:
    """The samples of `source` as float32.

    Args:
        source: "digits", "patches", the path of a ``.npy``, ``.npz``, ``.pt`` or ``.safetensors`` file, or a folder of
            ``.npy``, ``.safetensors`` or ``.pt`` files, or of images. An array has shape (N, ...): N samples of any
            shape. Those of a folder follow each other in the order of their names and have one type and one shape of
            a sample. uint8 values are divided by 255; other integers and booleans keep their value; all floating-point
            types become float32, bfloat16 of any of these files among them. Images are grey, (H, W), or have colours,
            (3, H, W), in [0, 1], and are all of one size; transparency is left out, and they lie as their pixels are
            stored, however EXIF data have them shown.
        patch_size: side of the square patches of "patches", in pixels.
        least: how many samples there have to be. By default one to train on and one that is held out.
        dtype: "bfloat16" takes 16-bit integers as the bits of bfloat16 numbers, for which numpy has no type of its own.
        key: which array of files of several. By default "x", then "data", then the only one.
        sample_dims: how many of an array's last dimensions make a sample; those before them count samples. 1 takes
            activations of shape (sequences, positions, d) as sequences · positions samples of d features. By default
            all dimensions but the first.

    ``.npy`` and ``.safetensors`` files may be larger than memory. A float32 ``.npy`` file is memory-mapped; other ones,
    and folders, are read and converted batch by batch unless they are small beside the memory. What memory cannot hold
    is shuffled by blocks.

    Raises:
        DataError: an unknown name, a file that is missing, unreadable or holds Python objects, a folder with neither
            arrays nor images or with files that differ, or an array that is empty, has fewer than two dimensions or
            too few samples, is complex, or holds NaN or infinity. Of a source that memory does not hold, only some
            blocks are searched for these two; the others are when they are read.

    Warns:
        DataWarning: integers of 16 bits that look like the bits of bfloat16 numbers; uint8 values that are divided by
            255, as those of images are, and look like counts: of samples that have one dimension, none of which tried
            is 255; files of a folder that are not in the order of the numbers in their names; images that EXIF data
            have shown turned or mirrored.
    """
    reading = _Reading(dtype, key, sample_dims)
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"source: expected a name or a path, got {type(source).__name__}; Dataset(name, samples, sample_shape) "
            "takes a float32 tensor in memory"
        )
    text = str(source)
    if text in SOURCES:
        reading.refuse_for(repr(text))
        return digits() if text == "digits" else patches(patch_size)
    path = Path(source)
    if os.path.isdir(path):
        dataset = _of_folder(path, reading)
    elif path.suffix.lower() == ".safetensors":
        dataset = _of_shards([_shard(path, reading)], path)
    elif path.suffix.lower() in FILE_SUFFIXES:
        dataset = _dataset(path, reading)
    else:
        raise DataError(_unknown(text))
    if len(dataset) < least:
        raise DataError(f"data={str(path)!r}: expected at least {least} samples, got {len(dataset)}")
    return dataset


def holds_arrays(source: str | Path) -> bool:
    """Whether what `load` takes from `source` is an array in a file or a folder of such, and no images."""
    if os.path.isdir(source):
        return any(name.lower().endswith(SHARD_SUFFIXES) for name in os.listdir(source))
    return str(source) not in SOURCES


def _listed(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _unknown(text: str) -> str:
    is_missing = not os.path.exists(text)
    if is_missing and os.path.basename(text) != text:
        return f"data={text!r}: expected a file or a folder, found no such file or folder"
    names = ", ".join(SOURCES)
    close = difflib.get_close_matches(text.lower(), SOURCES, n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    path = Path(text)
    reader = _TABLE_READERS.get(path.suffix.lower())
    if reader is not None and not is_missing:
        array = str(path.with_suffix(".npy"))
        suggestion = (
            f"; a table of numbers becomes one by numpy.save({array!r}, pandas.{reader}({text!r}).to_numpy())"
        )
    missing = ", found no such file or folder" if is_missing else ""
    return (
        f"data={text!r}: expected one of {names}, a {_listed(FILE_SUFFIXES)} file, or a folder of "
        f"{_listed(SHARD_SUFFIXES)} files or of images{missing}{suggestion}"
    )


def _of_folder(path: Path, reading: _Reading) -> Dataset:
    where = f"data={str(path)!r}"
    try:
        # Hidden files are notes that systems take of a folder.
        entries = [file for file in path.iterdir() if not file.name.startswith(".")]
        files = sorted(file for file in entries if file.is_file())
    except OSError as error:
        raise DataError(f"{where}: expected a folder that can be read ({error.strerror})") from None
    for file in sorted(set(entries) - set(files)):
        if (
            file.is_symlink()
            and not file.exists()
            and file.suffix.lower() in (*SHARD_SUFFIXES, *IMAGE_SUFFIXES)
        ):
            raise DataError(f"{where}: expected files, found the link {file.name} to one that does not exist")
    kinds = [[file for file in files if file.suffix.lower() == suffix] for suffix in SHARD_SUFFIXES]
    kinds.append([file for file in files if file.suffix.lower() in IMAGE_SUFFIXES])
    found = [of_kind for of_kind in kinds if of_kind]
    if len(found) > 1:
        raise DataError(
            f"{where}: expected files of one kind, found a folder with both, {found[0][0].name} and {found[1][0].name}"
            f"{_REMEDY}"
        )
    if found:
        _warn_of_order([file.name for file in found[0]], where)
    if kinds[-1]:
        reading.refuse_for("a folder of images")
        rows = ImageRows(kinds[-1])
        if rows.turned is not None:
            warnings.warn(
                f"{where}: pixels are taken as they are stored, while {rows.turned.name} is shown turned or mirrored, "
                "as its EXIF data say; write what PIL.ImageOps.exif_transpose makes of it to have it as it is shown",
                DataWarning,
                stacklevel=_outside(),
            )
        return _of_rows(rows, rows.sample_shape, sum(file.stat().st_size for file in kinds[-1]), path)
    if not found:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
        below = f"; what lies in folders below it, such as {folders[0]}, is not read" if folders else ""
        raise DataError(
            f"{where}: expected {_listed(SHARD_SUFFIXES)} files, or images, found a folder with neither{below}"
        )
    remedy = _REMEDY if len(found[0]) > 1 else ""
    return _of_shards([_shard(file, reading, remedy) for file in found[0]], path)


def _warn_of_order(names: list[str], where: str) -> None:
    """Tell where names that differ in nothing but numbers are not in the order of these."""
    alike: dict[tuple[str, ...], list[tuple[list[int], str]]] = {}
    for name in names:
        pieces = re.split("([0-9]+)", name)
        alike.setdefault(tuple(pieces[::2]), []).append(([int(piece) for piece in pieces[1::2]], name))
    for of_kind in alike.values():
        for (numbers, name), (expected_numbers, expected) in zip(of_kind, sorted(of_kind), strict=True):
            if numbers != expected_numbers:
                warnings.warn(
                    f"{where}: files are read in the order of their names, {name} before {expected}; for that of their "
                    "numbers, write these with as many digits in all of them",
                    DataWarning,
                    stacklevel=_outside(),
                )
                return


def _of_shards(shards: list[ArrayFile], path: Path) -> Dataset:
    first = shards[0]
    for shard in shards:
        for what, expected, got in (
            ("samples of shape", first.shape[1:], shard.shape[1:]),
            ("dtype", first.number_type, shard.number_type),
            ("dtype", first.dtype, shard.dtype),
        ):
            if got != expected:
                raise DataError(
                    f"data={str(shard.path)!r}: expected {what} {expected}, as in {first.path.name}, got {got}{_REMEDY}"
                )
    rows = ArrayRows(shards)
    dataset = _of_rows(rows, first.shape[1:], rows.stored_bytes, path)
    if not first.is_bfloat16:
        _hint_at_bits(dataset, first.dtype, path)
        _hint_at_counts(dataset, first.dtype, path)
    return dataset


def _hint_at_bits(dataset: Dataset, dtype: np.dtype | torch.dtype, path: Path) -> None:
    """Warn if samples that were integers of 16 bits look like the bits of bfloat16 numbers."""
    if _named(dtype) not in _HALF_INTEGERS:
        return
    values = _judged(dataset)
    integers = values[values != 0].int()
    bits, is_negative = integers & 0x7FFF, (integers & 0x8000) != 0
    has_both_signs = is_negative.any() and not is_negative.all()
    if has_both_signs and ((bits >= _LOW_BITS) & (bits < _HIGH_BITS)).float().mean() >= _JUDGED_SHARE:
        warnings.warn(
            f"data={str(path)!r}: its {_named(dtype)} values are taken as integers, such as {values[0, 0]:.0f}, and "
            "may be the bits of bfloat16 numbers, as which they have both signs and usual sizes; if so, load them "
            "with dtype='bfloat16' (--data-dtype bfloat16)",
            DataWarning,
            stacklevel=_outside(),
        )


def _judged(dataset: Dataset) -> torch.Tensor:
    """Some of the samples, from all of them."""
    rows = torch.linspace(0, len(dataset) - 1, min(_JUDGED_ROWS, len(dataset)), dtype=torch.float64).long()
    return dataset.samples[rows]


def _hint_at_counts(dataset: Dataset, dtype: np.dtype | torch.dtype, path: Path) -> None:
    """Warn if samples were bytes, which are scaled, and do not look like images: they have one dimension, and no value
    is the largest."""
    if _named(dtype) == "uint8" and len(dataset.sample_shape) == 1 and _judged(dataset).max() < 1:
        warnings.warn(f"data={str(path)!r}: {BYTES_ARE_IMAGES}", DataWarning, stacklevel=_outside())


def _outside() -> int:
    """The `stacklevel` of the code that called this module."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame, level = frame.f_back, level + 1
    return level


def _shard(path: Path, reading: _Reading, remedy: str = "") -> ArrayFile:
    """Where the array of a file lies; `remedy` ends the error about a shape that no samples have."""
    where = f"data={str(path)!r}"
    suffix = path.suffix.lower()
    if suffix == ".npy":
        array = _read(path, reading)
        dtype, shape, offset, is_in_order = array.dtype, array.shape, array.offset, array.flags.c_contiguous
    elif suffix == ".safetensors":
        dtype, shape, offset, is_in_order = *_safetensors_layout(path, reading), True
    else:
        dtype, shape, offset, is_in_order = _torch_layout(path, reading)
    shape = reading.shape_of(tuple(shape), where, remedy)
    is_bfloat16 = reading.is_bfloat16(dtype, where)
    if isinstance(dtype, torch.dtype):
        dtype = np.dtype(_DTYPES[dtype])
    elif not is_bfloat16:
        _check_real(dtype, where)
    if not is_in_order:
        raise DataError(
            f"{where}: expected samples one after the other (C order), got an array in Fortran order"
        )
    if is_bfloat16:
        # As unsigned integers, in the order of bytes that the file has.
        dtype = np.dtype(f"{'>' if dtype.str.startswith('>') else '<'}u2")
    return ArrayFile(path, dtype, shape, offset, is_bfloat16)


def _safetensors_layout(path: Path, reading: _Reading) -> tuple[torch.dtype, tuple[int, ...], int]:
    """The type and the shape of the array of a ``.safetensors`` file, and at which byte it begins."""
    with _readable(path):
        # Which sees to it that the header is whole and fits the file.
        with safe_open(path, "np") as file:
            key = _pick_key(list(file.keys()), path, reading)
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[key]
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise DataError(f"data={str(path)!r}: expected real numbers, got dtype {entry['dtype']}")
    return _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]


def _torch_layout(path: Path, reading: _Reading) -> tuple[torch.dtype, tuple[int, ...], int, bool]:
    """The same of a ``.pt`` file, and whether the array is in C order there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        # Tensors without values, which know where in the file these are.
        tensor = _read(path, reading)
        if tensor.is_meta:
            raise DataError(
                f"data={str(path)!r}: expected a .pt file in the format of PyTorch 1.6 or later, and with values"
            )
        _check_dense(tensor, f"data={str(path)!r}")
    if tensor.is_neg():
        raise DataError(
            f"data={str(path)!r}: expected a tensor as it is, got a view that is negated, save tensor.resolve_neg()"
        )
    offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
    return tensor.dtype, tuple(tensor.shape), offset, tensor.is_contiguous()


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


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within it a file is read; what its parsers raise becomes a `DataError` that names it."""
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise DataError(f"data={str(path)!r}: expected a readable {suffix} file, found {found}")
        yield
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
        if isinstance(error, RuntimeError) and "compressed tensor" in str(error):
            raise DataError(
                f"data={str(path)!r}: expected a dense tensor, got a compressed sparse one; save tensor.to_dense()"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"data={str(path)!r}: expected a readable {suffix} file ({reason})") from None


def _read(path: Path, reading: _Reading) -> np.ndarray | torch.Tensor:
    """The array in a file, memory-mapped where the format allows it."""
    suffix = path.suffix.lower()
    with _readable(path):
        if suffix == ".pt":
            return _pick(torch.load(path, map_location="cpu", weights_only=True), path, reading)
        if suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("it is not a .npz archive")
            with np.load(path, allow_pickle=False) as archive:
                if _SCIPY_KEYS.issubset(archive.files):
                    raise DataError(
                        f"data={str(path)!r}: expected an array, found a sparse matrix of scipy's; save "
                        "scipy.sparse.load_npz(path).toarray() by np.save"
                    )
                array = archive[_pick_key(archive.files, path, reading)]
            # numpy hands out the bytes of a member that does not look like an array.
            if not isinstance(array, np.ndarray):
                raise ValueError("a member is not a .npy array")
            return array
        if reading.key is not None:
            raise DataError(f"key={reading.key!r}: {path} is a .npy file, which has one array without a name")
        with open(path, "rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is not a .npy array")
        # Read-only: for memory that could be written to the system sets as much aside as the file has.
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _pick(content: object, path: Path, reading: _Reading) -> torch.Tensor:
    if isinstance(content, torch.Tensor):
        if reading.key is not None:
            raise DataError(f"key={reading.key!r}: {path} holds one tensor without a name")
        return content.detach()
    if isinstance(content, Mapping):
        tensors = [key for key, value in content.items() if isinstance(value, torch.Tensor)]
        return content[_pick_key(tensors, path, reading)].detach()
    raise DataError(
        f"data={str(path)!r}: expected a tensor or a dict of tensors, found {type(content).__name__}"
    )


def _pick_key(keys: list[str], path: Path, reading: _Reading) -> str:
    listed = ", ".join(map(repr, keys)) or "none"
    if reading.key is not None:
        if reading.key not in keys:
            raise DataError(f"key={reading.key!r}: expected an array of {path}, which are {listed}")
        return reading.key
    for key in _SAMPLE_KEYS:
        if key in keys:
            return key
    if len(keys) == 1:
        return keys[0]
    raise DataError(
        f"data={str(path)!r}: expected one array, or one called 'x' or 'data', or key= (--data-key) to say which; the "
        f"file's arrays: {listed}"
    )


def _dataset(path: Path, reading: _Reading) -> Dataset:
    """The data set of a file of one array, or of one that is picked."""
    where = f"data={str(path)!r}"
    array = _read(path, reading)
    if isinstance(array, torch.Tensor):
        _check_dense(array, where)
    shape = reading.shape_of(tuple(array.shape), where)
    is_bfloat16 = reading.is_bfloat16(array.dtype, where)
    if isinstance(array, np.ndarray):
        if not is_bfloat16:
            _check_real(array.dtype, where)
        if isinstance(array, np.memmap):
            if _is_left_in_file(array):
                return _of_shards([_shard(path, reading)], path)
            # Copy-on-write: torch wants writable memory, the file stays as it is.
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        if array.dtype == _UNKNOWN_HALF:
            array = np.ascontiguousarray(array).view(np.uint16)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    else:
        tensor = array
    dtype = tensor.dtype
    if is_bfloat16:
        tensor = tensor.view(torch.bfloat16)
    samples = _finite_float32(tensor.reshape(shape[0], -1), where)
    dataset = Dataset(_name(path), samples, shape[1:])
    if not is_bfloat16:
        _hint_at_bits(dataset, dtype, path)
        _hint_at_counts(dataset, dtype, path)
    return dataset


def _is_left_in_file(array: np.memmap) -> bool:
    """Whether a mapped array is too large for what is done to small ones: to be copied, or to be read in any order."""
    available = available_bytes()
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array.nbytes + _ROW_NUMBERS * len(array) > _CACHED_SHARE * available
    return 4 * array.size > _COPIED_SHARE * available


def _check_real(dtype: np.dtype, where: str) -> None:
    if dtype.kind not in "fiub":
        raise DataError(f"{where}: expected real numbers, got dtype {dtype}")


def _check_dense(tensor: torch.Tensor, where: str) -> None:
    """That `tensor` holds one number for each element of its shape, in memory."""
    if tensor.is_nested:
        raise DataError(f"{where}: expected samples of one shape, got a nested tensor")
    if tensor.device.type != "cpu":
        raise DataError(f"{where}: expected a tensor with values, got one on the {tensor.device} device")
    if tensor.layout != torch.strided:
        raise DataError(
            f"{where}: expected a dense tensor, got layout {tensor.layout}; save tensor.to_dense()"
        )
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
