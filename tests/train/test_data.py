"""Data sources, their errors, the held-out split, and batches."""

import importlib
import os
import re
import struct
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

from aefast.data import Batches, DataError, Dataset, DataWarning, load
from aefast.data.bundled import patches
from aefast.errors import InputError
from aefast.models import Autoencoder

load_module = importlib.import_module("aefast.data.load")


@pytest.fixture
def rows():
    return np.random.default_rng(0).random((12, 5), dtype=np.float32)


def saved_as(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, array)
    else:
        torch.save(torch.from_numpy(array), path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int16, np.uint16, np.int64])
def test_files_of_all_kinds(tmp_path, rows, suffix, dtype):
    array = (100 * rows).astype(dtype)
    dataset = load(saved_as(tmp_path / f"data{suffix}", array))
    assert dataset.samples.dtype == torch.float32
    assert dataset.sample_shape == (5,)
    assert dataset.name == "data"
    np.testing.assert_array_equal(dataset.samples.numpy(), array.astype(np.float32))


def test_a_float32_npy_is_mapped_not_read(tmp_path, rows):
    path = saved_as(tmp_path / "data.npy", rows)
    dataset = load(path)
    dataset.samples[0, 0] = 7
    assert np.load(path)[0, 0] == rows[0, 0]
    assert isinstance(dataset.samples.numpy().base, torch.Tensor)
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()


def test_bytes_are_scaled_and_shapes_flattened(tmp_path):
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    dataset = load(saved_as(tmp_path / "images.npy", images))
    assert dataset.sample_shape == (3, 4, 4)
    assert dataset.samples.shape == (2, 48)
    np.testing.assert_allclose(dataset.samples.numpy(), images.reshape(2, 48) / 255, rtol=1e-6)


def test_bfloat16_and_dicts(tmp_path):
    x = torch.rand(4, 3).bfloat16()
    torch.save({"labels": torch.arange(4), "x": x}, tmp_path / "data.pt")
    assert torch.equal(load(tmp_path / "data.pt").samples, x.float())


def test_npz_picks_the_samples(tmp_path, rows):
    np.savez(tmp_path / "a.npz", labels=np.arange(12), data=rows)
    assert load(tmp_path / "a.npz").features == 5
    np.savez(tmp_path / "b.npz", first=rows, second=rows)
    with pytest.raises(DataError, match="the file's arrays: 'first', 'second'"):
        load(tmp_path / "b.npz")


def with_value(rows, value):
    rows = rows.copy()
    rows[7, 2] = rows[9, 1] = value
    return rows


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: with_value(rows, np.nan), "row 7, column 2 holds nan"),
        (lambda rows: with_value(rows, -np.inf), "row 7, column 2 holds -inf"),
        (
            lambda rows: with_value(rows.astype(np.float64), 1e39),
            "row 7, column 2 holds 1e.39, which is too large for float32",
        ),
        (lambda rows: rows[:0], "the array is empty with shape"),
        (lambda rows: rows[:, :0], "the array is empty with shape"),
        (lambda rows: rows[:1], "expected at least 2 samples"),
        (lambda rows: rows[0], r"expected shape \(N, features\).*got \(5,\)"),
        (lambda rows: np.array(3.0), r"expected shape.*got \(\)"),
        (lambda rows: rows.astype(np.complex64), "expected real numbers, got dtype"),
    ],
)
def test_bad_arrays_are_named(tmp_path, rows, suffix, change, message):
    path = saved_as(tmp_path / f"bad{suffix}", change(rows))
    with pytest.raises(DataError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_bad_values_are_named_by_their_row_of_all(tmp_path, rows, monkeypatch):
    # Of two rows a piece.
    monkeypatch.setattr(load_module, "PIECE_VALUES", 10)
    path = saved_as(tmp_path / "bad.npy", with_value(rows, np.nan))
    with pytest.raises(DataError, match="row 7, column 2 holds nan"):
        load(path)


def test_python_objects_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([{"a": 1}, None], dtype=object))
    torch.save([DataError], tmp_path / "a.pt")
    for suffix in ("npy", "npz", "pt"):
        with pytest.raises(DataError, match=f"a.{suffix}.*Python objects"):
            load(tmp_path / f"a.{suffix}")


def test_text_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([["x", "y"], ["z", "w"]]))
    with pytest.raises(DataError, match="expected real numbers, got dtype <U1"):
        load(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("content", [b"", b"not an array at all", "half"])
def test_unreadable_files_are_named(tmp_path, rows, suffix, content):
    path = saved_as(tmp_path / f"bad{suffix}", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(DataError, match=rf"data='.*bad\{suffix}': expected") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_damaged_archive_member_is_named(tmp_path, rows):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY garbage")
    with pytest.raises(DataError, match=r"expected a readable .npz file"):
        load(path)


def write_npz(path, member, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", member)


def npy_bytes(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def npy_of_shape(shape):
    return npy_bytes(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n")


@pytest.mark.parametrize(
    "content",
    [
        npy_of_shape((2**70, 5)),
        npy_of_shape((2**40, 5)),
        npy_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5"),
        npy_bytes("(" * 50),
    ],
    ids=["beyond-int64", "huge", "cut-header", "brackets"],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_headers_are_named(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        write_npz(path, content)
    with pytest.raises(DataError, match=rf"expected a readable \{suffix} file"):
        load(path)


def test_archives_with_damaged_members_are_named(tmp_path, rows):
    path = tmp_path / "bad.npz"
    write_npz(path, b"this member is no array")
    with pytest.raises(DataError, match=r"expected a readable .npz file \(a member is not a .npy array"):
        load(path)
    np.savez_compressed(path, x=rows)
    content = bytearray(path.read_bytes())
    for place in range(60, 110):
        content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"expected a readable .npz file"):
        load(path)


@pytest.mark.filterwarnings("ignore")
def test_torch_files_with_any_damage_are_named(tmp_path, rows):
    path = saved_as(tmp_path / "bad.pt", rows)
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.integers(0, 400, 3):
            content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            load(path)
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "error", [AssertionError(), IndexError("index 3"), struct.error("size"), MemoryError(), TypeError("x")]
)
def test_whatever_a_parser_raises_names_the_file(tmp_path, rows, monkeypatch, error):
    path = saved_as(tmp_path / "bad.pt", rows)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(DataError, match=rf"bad.pt.*\({str(error) or type(error).__name__}\)"):
        load(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to("meta"), "expected a tensor with values, got one on the meta device"),
        (lambda x: torch.nested.nested_tensor([x, x[:3]]), "expected (samples of one shape|a tensor)"),
        (lambda x: x.to_sparse(), "expected a dense tensor, got layout torch.sparse_coo; save .*to_dense"),
        (
            lambda x: x.to_sparse_csr(),
            "expected a dense tensor, got layout torch.sparse_csr; save .*to_dense",
        ),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "expected real numbers.*qint8"),
    ],
    ids=["meta", "nested", "coo", "csr", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values_are_refused(tmp_path, rows, make, message):
    torch.save(make(torch.from_numpy(rows)), tmp_path / "a.pt")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", "folder"])
def test_bytes_that_look_like_counts_are_warned_of(tmp_path, suffix):
    path = tmp_path / ("a.npy" if suffix == "folder" else f"a{suffix}")
    for dtype, shape, largest, count in (
        (np.uint8, (12, 6), 254, 1),
        (np.uint8, (12, 6), 255, 0),
        (np.uint8, (12, 2, 3), 254, 0),
        (np.int32, (12, 6), 254, 0),
    ):
        saved_as(path, np.full(shape, largest, dtype))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path if suffix == "folder" else path)
        assert [one.category for one in caught] == [DataWarning] * count
        assert all("0 to 255 as 0 to 1; for counts" in str(one.message) for one in caught)


@pytest.mark.parametrize("to_sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore")
def test_sparse_tensors_are_named_with_the_remedy(tmp_path, rows, to_sparse):
    sparse = to_sparse(torch.from_numpy(rows))
    torch.save(sparse, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"expected a dense tensor, got .*; save tensor.to_dense\(\)"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"expected a dense tensor, got .*; give samples.to_dense\(\)"):
        Dataset("sparse", sparse, (5,))
    with pytest.raises(InputError, match=r"expected a dense tensor, got .*; give x.to_dense\(\)"):
        Autoencoder(input_size=5, hidden=(), latent=2)(sparse)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia"])
def test_files_of_sparse_matrices_are_named_with_the_remedy(tmp_path, rows, form):
    sparse = pytest.importorskip("scipy.sparse")
    sparse.save_npz(tmp_path / "a.npz", sparse.csr_matrix(rows).asformat(form))
    for key in (None, "data"):
        with pytest.raises(DataError, match=r"found a sparse matrix of scipy's; .*toarray\(\)"):
            load(tmp_path / "a.npz", key=key)


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a readable .npy file \(.*too long"):
        load(tmp_path / ("x" * 300 + ".npy"))


def test_names_that_are_not_utf8_become_text(tmp_path, rows):
    path = tmp_path / os.fsdecode(b"caf\xe9.npy")
    np.save(path, rows)
    assert load(path).name == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_told_how_it_becomes_an_array(tmp_path, suffix):
    table = tmp_path / f"table.{suffix}"
    table.touch()
    way = f"numpy.save('{tmp_path / 'table.npy'}', pandas.read_{suffix}('{table}').to_numpy())"
    with pytest.raises(DataError, match=f"; a table of numbers becomes one by {re.escape(way)}$"):
        load(table)


@pytest.mark.parametrize("source", [np.zeros((4, 2)), torch.zeros(4, 2), [[0.0]], None])
def test_samples_in_memory_are_no_source(source):
    with pytest.raises(DataError, match=f"expected a name or a path, got {type(source).__name__}; Dataset"):
        load(source)


def test_names_and_paths_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"'digts': expected one of digits, patches.*did you mean 'digits'"):
        load("digts")
    with pytest.raises(DataError, match="found no such file"):
        load(tmp_path / "none.npy")
    for name in ("none", "none/", "none.csv"):
        with pytest.raises(
            DataError, match=r"none.*': expected a file or a folder, found no such file or folder$"
        ):
            load(f"{tmp_path}/{name}")
    with pytest.raises(
        DataError, match=r"'none': expected one of digits.* images, found no such file or folder$"
    ):
        load("none")
    (tmp_path / "table.xlsx").touch()
    with pytest.raises(DataError, match=r"xlsx': expected one of digits.* or of images$"):
        load(tmp_path / "table.xlsx")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(DataError, match="found a folder with neither"):
        load(tmp_path / "folder.npy")


def test_digits():
    dataset = load("digits")
    assert dataset.samples.shape == (1797, 64)
    assert dataset.sample_shape == (8, 8)
    assert (dataset.samples.min(), dataset.samples.max()) == (0, 1)


def test_patches_come_from_photographs_and_hold_out_other_places():
    dataset = patches(8, count=2000)
    again = patches(8, count=2000)
    assert torch.equal(dataset.samples, again.samples)
    assert dataset.samples.shape == (2000, 64)
    assert dataset.samples.dtype == torch.float32
    assert dataset.samples.min() >= 0
    assert dataset.samples.max() <= 1
    # Neighbouring pixels of a photograph resemble each other; those of noise would not.
    images = dataset.samples.reshape(-1, 8, 8)
    left, right = images[:, :, :-1].flatten(), images[:, :, 1:].flatten()
    assert torch.corrcoef(torch.stack([left, right]))[0, 1] > 0.9


def test_held_out_patches_share_no_pixel_with_training_patches(monkeypatch):
    # Pictures whose pixels tell how far down they are, from 0 to 1.
    heights = [np.linspace(0, 1, rows, dtype=np.float32) for rows in (300, 410)]
    pictures = [np.repeat(height[:, None], 320, axis=1) for height in heights]
    monkeypatch.setattr("aefast.data.bundled._photographs", lambda: pictures)
    dataset = patches(8, count=2000)
    training, held_out = dataset.split()
    assert (len(training), len(held_out)) == (1800, 200)
    assert dataset.samples[training].max() < dataset.samples[held_out].min()


def test_default_patches_are_many():
    dataset = load("patches", patch_size=4)
    assert len(dataset) >= 100_000
    assert dataset.sample_shape == (4, 4)


@pytest.mark.parametrize("size", [1, 29, 8.0, True])
def test_patch_size_out_of_range(size):
    with pytest.raises(DataError, match="patch_size="):
        load("patches", patch_size=size)


@pytest.mark.parametrize(
    ("source", "module", "package"),
    [("digits", "sklearn.datasets", "scikit-learn"), ("patches", "skimage.data", "scikit-image")],
)
def test_missing_extras_say_what_to_install(monkeypatch, source, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf'needs {package}.*pip install "aefast\[train\]"'):
        load(source)


def test_split_is_disjoint_whole_and_seeded():
    dataset = Dataset("x", torch.rand(50, 2), (2,))
    training, held_out = dataset.split()
    assert len(held_out) == 5
    assert torch.equal(torch.cat([training, held_out]).sort().values, torch.arange(50))
    assert torch.equal(dataset.split()[1], held_out)
    assert not torch.equal(dataset.split(seed=1)[1], held_out)
    two = Dataset("x", torch.rand(2, 2), (2,)).split()
    assert [len(part) for part in two] == [1, 1]
    assert [len(part) for part in dataset.split(0.0)] == [49, 1]
    assert [len(part) for part in dataset.split(1.0)] == [1, 49]


@pytest.mark.parametrize(
    ("samples", "sample_shape", "message"),
    [
        (np.zeros((4, 6), np.float32), (6,), r"samples: expected a tensor \(N, features\), got ndarray"),
        (torch.zeros(4, 6).double(), (6,), r"samples: expected float32 .*, got float64 of \(4, 6\)"),
        (
            torch.zeros(4, 2, 3),
            (2, 3),
            r"samples: expected float32 of shape \(N, features\), got float32 of \(4, 2, 3\)",
        ),
        (torch.zeros(4, 6), (2, 2), r"sample_shape=\(2, 2\): expected a product of 6"),
    ],
)
def test_bad_samples_of_a_dataset_are_named(samples, sample_shape, message):
    with pytest.raises(DataError, match=message):
        Dataset("x", samples, sample_shape)


def make_batches(seed=0):
    return Batches(torch.arange(46.0).reshape(23, 2), torch.arange(3, 23), batch_size=6, seed=seed)


@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_the_rest_of_an_epoch_can_be_left_out(share):
    samples, rows = torch.arange(46.0).reshape(23, 2), torch.arange(23)
    options = {"batch_size": 6, "seed": 0, "share": share}
    whole = Batches(samples, rows, **options)
    batches = Batches(samples, rows, **options, drop_last=True)
    assert len(whole) == 4 and len(batches) == 3
    for first in (0, 2):
        expected, found = list(whole.epoch(1, first)), list(batches.epoch(1, first))
        assert len(found) == 3 - first and all(map(torch.equal, found, expected))


def test_an_epoch_holds_every_row_once():
    batches = make_batches()
    epoch = list(batches.epoch(0))
    assert [len(batch) for batch in epoch] == [6, 6, 6, 2]
    assert len(batches) == 4
    assert sorted(torch.cat(epoch)[:, 0].tolist()) == [2.0 * row for row in range(3, 23)]


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return torch.cat(list(make_batches(seed).epoch(epoch)))[:, 0].tolist()

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_an_epoch_can_start_at_any_batch():
    batches = make_batches()
    whole = list(batches.epoch(3))
    for first in range(5):
        rest = list(batches.epoch(3, first=first))
        assert len(rest) == len(whole) - first
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))
