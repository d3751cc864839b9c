"""Folders of arrays and of images, arrays that stay in their files, and what is wrong with them."""

import importlib
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from aefast.data import Batches, DataError, DataWarning, FileRows, load
from aefast.data.blocks import block_rows_of
from aefast.errors import InputError

# The package has a function of this name.
load_module = importlib.import_module("aefast.data.load")


@pytest.fixture
def rows():
    return np.random.default_rng(0).random((60, 5), dtype=np.float32)


@pytest.fixture
def little_memory(monkeypatch):
    """Within it no data fits the memory, so that it stays in its files and is shuffled by blocks."""
    monkeypatch.setattr(load_module, "available_bytes", lambda: 0)


@pytest.fixture
def some_memory(monkeypatch):
    """Within it files fit the memory, but no copy of them does."""
    monkeypatch.setattr(load_module, "available_bytes", lambda: 1 << 40)
    monkeypatch.setattr(load_module, "_COPIED_SHARE", 0)


def shards(folder, array, counts):
    """The rows of `array` in files of so many rows each, whose names are in order."""
    folder.mkdir()
    for number, part in enumerate(np.split(array, np.cumsum(counts)[:-1])):
        np.save(folder / f"part-{number:02}.npy", part)
    return folder


DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    np.uint8,
    np.int16,
    np.uint16,
    np.int64,
    np.bool_,
    ">f4",
    "<f8",
    ">i2",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [None, "some_memory", "little_memory"])
def test_a_file_has_the_same_values_wherever_they_are(tmp_path, rows, dtype, memory, request):
    array = (200 * rows).astype(dtype).reshape(60, 5, 1)
    np.save(tmp_path / "a.npy", array)
    expected = load(tmp_path / "a.npy").samples
    assert isinstance(expected, torch.Tensor)
    if memory:
        request.getfixturevalue(memory)
    for path in (tmp_path / "a.npy", shards(tmp_path / "folder", array, (7, 1, 30, 22))):
        dataset = load(path)
        # Only a float32 file that fits the memory is a tensor without being copied.
        is_mapped = memory == "some_memory" and path.suffix == ".npy" and dtype == np.float32
        assert isinstance(dataset.samples, FileRows) == (memory is not None and not is_mapped)
        assert (dataset.block_rows is not None) == (memory == "little_memory")
        assert dataset.sample_shape == (5, 1)
        assert dataset.name == path.stem
        chosen = torch.tensor([59, 0, 7, 7, 8, 36, 38])
        assert dataset.samples[chosen].dtype == torch.float32
        assert torch.equal(dataset.samples[chosen], expected[chosen])
        assert torch.equal(dataset.samples.to(torch.device("cpu")), expected)
        assert dataset.samples[chosen[:0]].shape == (0, 5)
        assert dataset.fingerprint() == load(tmp_path / "a.npy").fingerprint()


def saved_as(path, tensor):
    """`tensor` in a file, beside another; bfloat16 in .npy as ml_dtypes writes it, in bits.npy as its bits."""
    if path.suffix == ".npy":
        is_half = tensor.dtype == torch.bfloat16
        array = tensor.view(torch.uint16).numpy() if is_half else tensor.numpy()
        np.save(path, array.view("V2") if is_half and path.stem != "bits" else array)
    elif path.suffix == ".npz":
        np.savez(path, x=tensor.view(torch.int16).numpy())
    elif path.suffix == ".pt":
        # A part of a larger one, which lies behind its beginning.
        torch.save({"tokens": torch.arange(3), "x": torch.cat([tensor[:1], tensor])[1:]}, path)
    else:
        save_file({"tokens": torch.arange(3), "x": tensor}, path)
    return path


@pytest.mark.parametrize("memory", [None, "some_memory", "little_memory"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.bool]
)
def test_files_of_tensors_have_the_same_values(tmp_path, rows, dtype, suffix, memory, request):
    if memory:
        request.getfixturevalue(memory)
    tensor = (torch.from_numpy(200 * rows) - (0 if dtype == torch.uint8 else 100)).to(dtype)
    expected = tensor.float() / 255 if dtype == torch.uint8 else tensor.float()
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, part in enumerate(tensor.split([7, 1, 30, 22])):
        saved_as(folder / f"{number}{suffix}", part)
    for path in (saved_as(tmp_path / f"a{suffix}", tensor), folder):
        dataset = load(path)
        if path == folder or suffix == ".safetensors":
            assert isinstance(dataset.samples, FileRows) == (memory is not None)
        torch.testing.assert_close(dataset.samples[torch.arange(60)], expected, rtol=1e-7, atol=0)
        chosen = torch.tensor([59, 0, 7, 7, 8])
        assert torch.equal(dataset.samples[chosen], dataset.samples[torch.arange(60)][chosen])
        assert dataset.sample_shape == (5,)


@pytest.mark.parametrize("memory", [None, "some_memory", "little_memory"])
@pytest.mark.parametrize("name", ["bits.npy", "a.npz", "a.npy", "a.safetensors", "a.pt", ">"])
def test_integers_are_taken_as_the_bits_of_bfloat16_where_that_is_said(tmp_path, rows, name, memory, request):
    if memory:
        request.getfixturevalue(memory)
    x = torch.from_numpy(rows - 0.5).bfloat16()
    if name == ">":
        path = tmp_path / "a.npy"
        np.save(path, x.view(torch.uint16).numpy().astype(">u2"))
    elif name in ("a.safetensors", "a.pt"):
        path = saved_as(tmp_path / name, x.view(torch.int16))
    else:
        path = saved_as(tmp_path / name, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load(path, dtype="bfloat16").samples[torch.arange(60)], x.float())
    if name != "a.npy":
        with pytest.warns(DataWarning, match=r"may be the bits of bfloat16 numbers.*dtype='bfloat16'"):
            assert load(path).samples[torch.arange(60)].abs().max() > 10_000


# Of pixels of some depths; of a sensor that counts around an offset, and of masks.
@pytest.mark.parametrize(
    ("low", "high", "step"),
    [(0, 255, 1), (0, 4095, 1), (0, 16383, 1), (0, 65535, 1), (14_000, 16_000, 1), (0, 1, 16_384)],
)
def test_other_integers_are_not_taken_for_bits(tmp_path, low, high, step):
    counts = np.random.default_rng(0).integers(low, high, (60, 64), np.uint16, endpoint=True)
    np.save(tmp_path / "a.npy", counts * np.uint16(step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "a.npy")


def test_values_of_bfloat16_that_are_not_finite_are_named(tmp_path, rows, little_memory):
    x = torch.from_numpy(rows).bfloat16()
    x[33, 2] = -torch.inf
    for path in (saved_as(tmp_path / "a.safetensors", x), saved_as(tmp_path / "a.npy", x)):
        with pytest.raises(DataError, match=r"a\.\w+'.*but row 33, column 2 holds -inf"):
            load(path)


def test_shards_of_negative_views_are_refused(tmp_path, rows):
    """Whose bytes are those of the numbers with the other sign."""
    torch.save(torch._neg_view(torch.from_numpy(rows)), tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt").samples, -torch.from_numpy(rows))
    with pytest.raises(DataError, match=r"a\.pt'.*a view that is negated, save tensor\.resolve_neg\(\)"):
        load(tmp_path)


def test_keys_say_which_of_several_tensors(tmp_path, rows):
    x = torch.from_numpy(rows)
    path = tmp_path / "a.safetensors"
    save_file({"first": x, "second": 2 * x}, path)
    torch.save({"first": x, "second": 2 * x}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", first=rows, second=2 * rows)
    for suffix in (".safetensors", ".pt", ".npz"):
        assert torch.equal(load(path.with_suffix(suffix), key="second").samples, 2 * x)
        with pytest.raises(
            DataError, match=r"key='third': expected an array of .*a\.\w+, which are 'first', 'second'"
        ):
            load(path.with_suffix(suffix), key="third")
        with pytest.raises(
            DataError, match=r"or key= \(--data-key\) to say which; the file's arrays: 'first', 'second'"
        ):
            load(path.with_suffix(suffix))
    np.save(tmp_path / "b.npy", rows)
    torch.save(x, tmp_path / "b.pt")
    for name in ("b.npy", "b.pt"):
        with pytest.raises(DataError, match=f"key='x': .*{name} .*without a name"):
            load(tmp_path / name, key="x")


@pytest.mark.parametrize("memory", [None, "some_memory", "little_memory"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
def test_leading_dimensions_count_samples(tmp_path, rows, suffix, memory, request):
    if memory:
        request.getfixturevalue(memory)
    x = torch.from_numpy(rows).reshape(4, 3, 5, 5)
    folder = tmp_path / "folder"
    folder.mkdir()
    # The files may differ in all but the samples.
    for number, part in enumerate((x[:1], x[1:].reshape(3, 3, 5, 5))):
        saved_as(folder / f"{number}{suffix}", part.contiguous())
    for path in (saved_as(tmp_path / f"a{suffix}", x), folder):
        for dims, shape in ((1, (5,)), (2, (5, 5)), (3, (3, 5, 5)), (None, (3, 5, 5))):
            dataset = load(path, sample_dims=dims)
            assert dataset.sample_shape == shape
            assert torch.equal(dataset.samples[torch.arange(len(dataset))], x.reshape(-1, *shape).flatten(1))
        with pytest.raises(
            DataError, match=r"expected more than sample_dims=4 dimensions, got shape \(\d, 3, 5, 5\)"
        ):
            load(path, sample_dims=4)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("a.npy", {"dtype": "bf16"}, "dtype='bf16': expected bfloat16"),
        (
            "a.npy",
            {"dtype": "bfloat16"},
            "a.npy': expected 16-bit integers to take as bfloat16, got dtype float32",
        ),
        (
            "a.pt",
            {"dtype": "bfloat16"},
            "a.pt': expected 16-bit integers to take as bfloat16, got dtype float32",
        ),
        ("a.npy", {"sample_dims": 0}, "sample_dims=0: expected a positive integer"),
        ("digits", {"sample_dims": 1}, "sample_dims=1: is of arrays in files, which 'digits' is not"),
        ("patches", {"dtype": "bfloat16"}, "dtype='bfloat16': is of arrays in files, which 'patches' is not"),
        ("images", {"key": "x"}, "key='x': is of arrays in files, which a folder of images is not"),
    ],
)
def test_options_that_do_not_fit_the_source(tmp_path, rows, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", rows)
    torch.save(torch.from_numpy(rows), "a.pt")
    pictures(tmp_path / "images", (4, 7))
    with pytest.raises(InputError, match=message):
        load(source, **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"not tensors at all", "half"])
def test_damaged_files_of_tensors_are_named(tmp_path, rows, suffix, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = saved_as(folder / f"a{suffix}", torch.from_numpy(rows))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(DataError, match=rf"data='.*a\{suffix}': expected"):
        load(folder)


def test_tensors_that_cannot_be_read_row_by_row_are_named(tmp_path, rows):
    x = torch.from_numpy(rows)
    save_file({"x": x.to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"a\.safetensors': expected real numbers, got dtype F8_E4M3"):
        load(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    for tensor, message in (
        (x.t(), "expected samples one after the other"),
        (x.to_sparse(), "expected a dense tensor"),
        (x.cfloat(), "expected real numbers, got dtype torch.complex64"),
    ):
        torch.save(tensor, tmp_path / "a.pt")
        with pytest.raises(DataError, match=rf"a\.pt': {message}"):
            load(tmp_path)
    torch.save(x, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        DataError, match=r"a\.pt': expected a .pt file in the format of PyTorch 1\.6 or later"
    ):
        load(tmp_path)


def test_more_shards_than_files_that_may_be_open(tmp_path, rows, monkeypatch, little_memory):
    monkeypatch.setattr("aefast.data.files._OPEN_FILES", 3)
    dataset = load(shards(tmp_path / "folder", rows, (2,) * 30))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(dataset.samples[order].numpy(), rows[order.numpy()])


def test_folders_ignore_other_files(tmp_path, rows):
    folder = shards(tmp_path / "folder", rows, (30, 30))
    (folder / "README.txt").write_text("about the data")
    (folder / "._part-00.npy").write_bytes(b"notes")
    (folder / "below").mkdir()
    np.testing.assert_array_equal(load(folder).samples.numpy(), rows)


def with_value(rows, place, value):
    rows = rows.copy()
    rows[place] = value
    return rows


@pytest.mark.parametrize("memory", [None, "some_memory", "little_memory"])
@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (np.float32, np.nan, "expected finite numbers, but row 3, column 2 holds nan"),
        (np.float16, -np.inf, "expected finite numbers, but row 3, column 2 holds -inf"),
        (np.float64, 1e39, "row 3, column 2 holds 1e.39, which is too large for float32"),
    ],
)
def test_bad_values_are_found_before_training(tmp_path, rows, memory, dtype, value, message, request):
    if memory:
        request.getfixturevalue(memory)
    array = with_value(rows.astype(dtype), (33, 2), value)
    folder = shards(tmp_path / "folder", array, (20, 10, 30))
    with pytest.raises(DataError, match=message) as error:
        load(folder)
    assert str(folder / "part-02.npy") in str(error.value)


def test_bad_values_that_no_probe_meets_are_found_when_they_are_read(
    tmp_path, rows, monkeypatch, little_memory
):
    monkeypatch.setattr(load_module, "block_rows_of", lambda row_bytes: 4)
    monkeypatch.setattr(load_module, "_PROBED_BLOCKS", 2)
    np.save(tmp_path / "a.npy", with_value(rows, (33, 2), np.nan))
    dataset = load(tmp_path / "a.npy")
    batches = Batches(dataset.samples, dataset.rows(), batch_size=8, seed=0)
    with pytest.raises(DataError, match=r"a\.npy'.* row 33, column 2 holds nan"):
        list(batches.epoch(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda part: part[:, :4],
            r"part-01.npy'.*expected samples of shape \(5,\), as in part-00.npy, got \(4,\)",
        ),
        (
            lambda part: part.reshape(-1, 5, 1),
            r"part-01.npy'.*expected samples of shape \(5,\).*got \(5, 1\)",
        ),
        (
            lambda part: part.astype(np.float64),
            "part-01.npy'.*expected dtype float32, as in part-00.npy, got float64",
        ),
        (lambda part: part[:0], "part-01.npy'.*expected at least one value, the array is empty"),
        (lambda part: part[0], r"part-01.npy'.*expected shape \(N, features\)"),
        (lambda part: part.astype(np.complex64), "part-01.npy'.*expected real numbers, got dtype complex64"),
        (lambda part: np.asfortranarray(part), "part-01.npy'.*Fortran order"),
    ],
)
def test_shards_that_do_not_fit_together(tmp_path, rows, change, message):
    folder = shards(tmp_path / "folder", rows, (20, 20, 20))
    np.save(folder / "part-01.npy", change(rows[20:40]))
    with pytest.raises(DataError, match=message):
        load(folder)


@pytest.mark.parametrize("labels", ["labels.npy", "targets.npy", "targets.pt"])
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((60,), np.int64, {}),
        ((60,), np.int64, {"sample_dims": 1}),
        ((60, 1), np.float32, {}),
        ((60, 6), np.int64, {}),
    ],
)
def test_files_of_labels_are_to_be_moved(tmp_path, rows, labels, shape, dtype, options):
    folder = shards(tmp_path / "folder", rows, (30, 30))
    values = np.zeros(shape, dtype)
    np.save(folder / labels, values) if labels.endswith(".npy") else saved_as(
        folder / labels, torch.from_numpy(values)
    )
    with pytest.raises(DataError, match=rf"{labels}.*such as labels, is to be moved elsewhere$"):
        load(folder, **options)
    np.save(tmp_path / "alone.npy", np.zeros(60))
    with pytest.raises(DataError, match=r"got \(60,\)$|got shape \(60,\)$"):
        load(tmp_path / "alone.npy", **options)


def test_links_to_nothing_are_named(tmp_path, rows):
    np.save(tmp_path / "a.npy", rows)
    (tmp_path / "b.npy").symlink_to(tmp_path / "c.npy.elsewhere")
    (tmp_path / "notes.txt").symlink_to("/nowhere")
    with pytest.raises(DataError, match=r"expected files, found the link b\.npy to one that does not exist"):
        load(tmp_path)


def test_damaged_shards_are_named(tmp_path, rows):
    folder = shards(tmp_path / "folder", rows, (20, 20, 20))
    whole = (folder / "part-02.npy").read_bytes()
    (folder / "part-02.npy").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"part-02.npy': expected a readable .npy file"):
        load(folder)


def test_shards_that_vanish_are_named(tmp_path, rows, little_memory):
    folder = shards(tmp_path / "folder", rows.astype(np.int32), (20, 20, 20))
    dataset = load(folder)
    (folder / "part-01.npy").unlink()
    with pytest.raises(DataError, match=r"part-01.npy': cannot be read any more"):
        dataset.samples[torch.tensor([1, 25])]


def test_folders_without_data(tmp_path, rows):
    expected = r"expected \.npy, \.safetensors or \.pt files, or images, found a folder with neither$"
    with pytest.raises(DataError, match=expected):
        load(tmp_path)
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        DataError, match=r"with neither; what lies in folders below it, such as cat, is not read"
    ):
        load(tmp_path)
    np.save(tmp_path / "a.npy", rows[:1])
    with pytest.raises(DataError, match="expected at least 2 samples"):
        load(tmp_path)
    for name in ("a.png", "a.pt", "a.safetensors"):
        picture(tmp_path / "a.png", np.zeros((2, 2), np.uint8)).rename(tmp_path / name)
        with pytest.raises(DataError, match=rf"of one kind, found a folder with both, a\.npy and {name}"):
            load(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("row_bytes", [1, 8, 784, 3136, 1 << 20, 1 << 24])
def test_blocks_are_of_bounded_size(row_bytes):
    size = block_rows_of(row_bytes)
    assert 1 <= size <= 1 << 13
    assert size == 1 or size * row_bytes <= 1 << 20


def picture(path, pixels, **options):
    PIL.Image.fromarray(pixels).save(path, **options)
    return path


def pictures(folder, shape, suffix=".png", count=6):
    """So many images of random pixels; their pixels, (count, *shape), uint8."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)
    for number, image in enumerate(pixels):
        picture(folder / f"{number}{suffix}", image)
    return pixels


@pytest.mark.parametrize("memory", [None, "some_memory", "little_memory"])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("shape", [(4, 7), (4, 7, 3)], ids=["grey", "colour"])
def test_images_become_samples(tmp_path, memory, suffix, shape, request):
    if memory:
        request.getfixturevalue(memory)
    pixels = pictures(tmp_path / "images", shape, suffix)
    dataset = load(tmp_path / "images")
    expected = pixels if len(shape) == 2 else pixels.transpose(0, 3, 1, 2)
    assert dataset.sample_shape == expected.shape[1:]
    assert isinstance(dataset.samples, FileRows) == (memory is not None)
    np.testing.assert_array_equal(
        dataset.samples[torch.arange(6)].numpy(), expected.reshape(6, -1) * np.float32(1 / 255)
    )


def test_images_of_other_kinds(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    cases = {
        "alpha": (
            np.concatenate([colour, np.full((3, 4, 1), 9, np.uint8)], axis=2),
            colour.transpose(2, 0, 1) / 255,
        ),
        "words": (grey.astype(np.uint16) * 257, grey / 255),
    }
    for name, (stored, expected) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for number in range(2):
            picture(folder / f"{number}.png", stored)
        dataset = load(folder)
        assert dataset.sample_shape == expected.shape
        # The product with float32's 1/255 or 1/65535 is rounded twice.
        np.testing.assert_allclose(dataset.samples[1].numpy(), expected.reshape(-1), rtol=3e-7)
    folder = tmp_path / "portable"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.pgm").write_bytes(b"P5 4 3 65535\n" + (grey.astype(">u2") * 257).tobytes())
    np.testing.assert_allclose(load(folder).samples[1].numpy(), grey.reshape(-1) / 255, rtol=3e-7)
    # Few bits a pixel, and a palette.
    for mode, shape in (("1", (3, 4)), ("P", (3, 3, 4)), ("LA", (3, 4)), ("CMYK", (3, 3, 4))):
        folder = tmp_path / mode
        folder.mkdir()
        for number in range(2):
            PIL.Image.fromarray(colour).convert(mode).save(
                folder / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}"
            )
        assert load(folder).sample_shape == shape


@pytest.mark.parametrize("memory", [None, "some_memory", "little_memory"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: picture(path, np.zeros((4, 8), np.uint8)),
            "grey image of 7×4 .*got a grey image of 8×4",
        ),
        (
            lambda path: picture(path, np.zeros((4, 7, 3), np.uint8)),
            "which 0.png is, got a colour image of 7×4 pixels",
        ),
        (lambda path: path.write_bytes(b"no image"), "expected an image that can be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "expected an image that can be read"),
        (
            lambda path: picture(path.with_suffix(".tif"), np.zeros((4, 7), np.float32)),
            "expected pixels of 8 or 16 bits, got Pillow's mode 'F'",
        ),
    ],
    ids=["size", "colour", "garbage", "half", "float"],
)
def test_bad_images_are_named_before_training(tmp_path, memory, spoil, message, request):
    if memory:
        request.getfixturevalue(memory)
    pictures(tmp_path / "images", (4, 7))
    spoil(tmp_path / "images" / "3.png")
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path / "images")
    assert str(tmp_path / "images" / "3.") in str(error.value)


def test_images_that_are_not_in_the_order_of_their_numbers_are_told(tmp_path):
    pictures(tmp_path / "images", (4, 7), count=11)
    with pytest.warns(DataWarning, match=r"10\.png before 2\.png"):
        load(tmp_path / "images")


@pytest.mark.parametrize(
    ("notes", "is_told"),
    [({0x0112: 6}, True), ({0x0112: 1}, False), ({0x010F: "a camera"}, False), (b"?", False)],
)
def test_images_that_are_shown_turned_are_told(tmp_path, notes, is_told, recwarn):
    pixels = pictures(tmp_path / "images", (4, 7))
    if isinstance(notes, dict):
        exif = PIL.Image.Exif()
        for tag, value in notes.items():
            exif[tag] = value
    else:
        exif = b"Exif\x00\x00" + notes
    picture(tmp_path / "images" / "3.png", pixels[3], exif=exif)
    dataset = load(tmp_path / "images")
    # The pixels are those of the file, either way.
    assert torch.equal(dataset.samples[3], torch.from_numpy(pixels[3].reshape(-1) * np.float32(1 / 255)))
    told = [str(one.message) for one in recwarn if one.category is DataWarning]
    assert len(told) == is_told
    assert all("3.png is shown turned or mirrored" in one for one in told)


def test_images_without_pillow_say_what_to_install(tmp_path, monkeypatch):
    pictures(tmp_path / "images", (4, 7))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r'needs Pillow.*pip install "aefast\[train\]"'):
        load(tmp_path / "images")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("part10", "part2", "part3"), "part10.npy before part2.npy"),
        (("a-1-10", "a-1-9"), "a-1-10.npy before a-1-9.npy"),
        (("a", "b11-of-12", "b9-of-12"), "b11-of-12.npy before b9-of-12.npy"),
        (("12c", "3f"), None),
        (("part01", "part1"), None),
        (("part02", "part10"), None),
        (("a1", "b", "c3"), None),
    ],
)
def test_files_whose_names_are_not_in_the_order_of_their_numbers_are_told(tmp_path, names, told):
    for number, name in enumerate(names):
        np.save(tmp_path / f"{name}.npy", np.full((2, 3), number, dtype=np.float32))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dataset = load(tmp_path)
    assert dataset.samples[::2, 0].tolist() == list(range(len(names)))
    messages = [str(one.message) for one in seen if one.category is DataWarning]
    assert len(messages) == (told is not None)
    assert all(f"files are read in the order of their names, {told};" in one for one in messages)
