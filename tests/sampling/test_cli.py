"""The commands sample, encode and reconstruct: files, reports, messages."""

import re
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aefast import cli
from aefast.models import MODELS, Autoencoder, SparseAutoencoder, SparseCode, from_pretrained
from aefast.sampling import load_sampler


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with 120 samples of 3×4 values, and by name a little trained model of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    samples = generator.random((120, 2)) @ generator.random((2, 12)) / 2
    np.save(folder / "data.npy", samples.astype(np.float32).reshape(120, 3, 4))
    for name in MODELS:
        torch.manual_seed(0)
        sizes = {"k": 3} if name == "sparse" else {"hidden": (8,)}
        MODELS[name](input_size=12, latent=4, **sizes).save_pretrained(folder / name)
    return folder


@pytest.fixture
def command(runs):
    """Runs a command of the line on one of the models; the exit code."""

    def run(name, *arguments, model="autoencoder", data=runs / "data.npy"):
        common = ("--run", runs / model, "--data", data, "--device", "cpu")
        return cli.main([name, *map(str, (*common, *arguments))])

    return run


def samples_of(runs):
    return torch.from_numpy(np.load(runs / "data.npy"))


REPORT = (
    r"samples:   MMD² -?[\d.e+-]+, p = [\d.]+: the test .*\n"
    r"real data: MMD² -?[\d.e+-]+, p = [\d.]+\n"
    r"novelty:   [\d.]+% closer to training data than held-out ones \(real data: 50%\), [\d.]+% near copies .*\n"
)


@pytest.mark.parametrize("sampler", ["prior", "gmm"])
def test_sample_writes_samples_a_picture_and_a_report(command, runs, tmp_path, capsys, sampler):
    out, kept = tmp_path / "deep" / "samples.npy", tmp_path / "kept"
    options = ("--sampler", sampler, "--count", 20, "--seed", 3, "--save-sampler", kept)
    options += ("--components", 2) if sampler == "gmm" else ()
    assert command("sample", *options, "--out", out) == 0
    told = capsys.readouterr().out
    assert re.search(REPORT, told)
    source = {"prior": "the box of its codes", "gmm": "gmm"}[sampler]
    assert f"codes drawn from {source}\n" in told
    samples = np.load(out, allow_pickle=False)
    assert (samples.shape, samples.dtype) == ((20, 3, 4), np.float32)
    assert sorted(path.name for path in out.parent.iterdir()) == ["samples.npy", "samples.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    codes = load_sampler(kept).sample(20, seed=3)
    with torch.no_grad():
        expected = from_pretrained(runs / "autoencoder").decode(codes)
    torch.testing.assert_close(torch.from_numpy(samples).flatten(1), expected)


def test_samples_are_compared_with_what_the_run_was_validated_on(command, runs, tmp_path, capsys):
    model, held_out = Autoencoder(input_size=12, latent=4), tmp_path / "held.npy"
    model.save_pretrained(tmp_path / "run", metadata={"training": {"validation": "held"}})
    np.save(held_out, np.load(runs / "data.npy")[:50] + 9)
    options = ("--count", 20, "--out", tmp_path / "samples.npy", "--overwrite")
    notice = "notice: the run was trained on all of --data and validated on held; without --validation"
    assert command("sample", *options, model=tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert notice in told
    assert "108 training samples" in told
    assert command("sample", *options, "--validation", held_out, model=tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert notice not in told
    assert "120 training samples" in told
    # Held-out samples of other places than all training data.
    assert re.search(r"real data: .* p = 0\.0", told)
    np.save(held_out, np.zeros((5, 7), dtype=np.float32))
    assert command("sample", *options, "--validation", held_out, model=tmp_path / "run") == 2
    assert "validation='" in capsys.readouterr().err


def test_a_vae_has_a_prior_and_vectors_make_lines(command, runs, tmp_path, capsys):
    flat = tmp_path / "flat.npy"
    np.save(flat, samples_of(runs).flatten(1).numpy())
    assert command("sample", "--out", tmp_path / "x.npy", "--count", 9, model="vae", data=flat) == 0
    assert "codes drawn from N(0, I)\n" in capsys.readouterr().out
    assert np.load(tmp_path / "x.npy").shape == (9, 12)
    assert (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_sample_draws_from_a_flow(command, tmp_path, capsys):
    assert command("sample", "--out", tmp_path / "x.npy", "--sampler", "flow", "--count", 9) == 0
    assert "codes drawn from flow\n" in capsys.readouterr().out
    assert np.isfinite(np.load(tmp_path / "x.npy")).all()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_encode_and_reconstruct_keep_the_order(command, runs, tmp_path, capsys, model):
    out = tmp_path / "out.npy"
    network = from_pretrained(runs / model)
    x = samples_of(runs)
    with torch.no_grad():
        code = network.encode(x)
        made = network.decode(code).reshape(x.shape)
        dense = network.dense(code) if model == "sparse" else code
    assert command("encode", "--out", out, "--batch-size", 50, model=model) == 0
    assert capsys.readouterr().out == f"120 codes of size 4: {out}\n"
    torch.testing.assert_close(torch.from_numpy(np.load(out)), dense)
    assert command("reconstruct", "--out", out, "--batch-size", 50, "--overwrite", model=model) == 0
    assert capsys.readouterr().out == f"120 reconstructions: {out}\n"
    torch.testing.assert_close(torch.from_numpy(np.load(out)), made)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_one_sample_is_enough_for_what_trains_nothing(command, runs, tmp_path, capsys):
    x, file, out = samples_of(runs)[:1], tmp_path / "one.npy", tmp_path / "out.npy"
    np.save(file, x.numpy())
    network = from_pretrained(runs / "autoencoder")
    for name, expected in (("encode", network.encode(x)), ("reconstruct", network(x).reconstruction)):
        assert command(name, "--out", out, "--overwrite", data=file) == 0
        torch.testing.assert_close(torch.from_numpy(np.load(out)), expected.detach())
    capsys.readouterr()
    assert "expected at least 2 samples, got 1" in failure(
        capsys, command("sample", "--out", tmp_path / "new.npy", data=file)
    )


def test_a_folder_of_files_that_are_not_loaded_whole(command, runs, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "parts"
    folder.mkdir()
    x = samples_of(runs)
    for index, part in enumerate(x.split(50)):
        np.save(folder / f"{index}.npy", part.half().numpy())
    # However little it is, memory does not hold it. (A function of the package has the module's name.)
    monkeypatch.setattr(sys.modules["aefast.data.load"], "available_bytes", lambda: 1)
    out = tmp_path / "out.npy"
    assert command("reconstruct", "--out", out, "--batch-size", 32, data=folder) == 0
    with torch.no_grad():
        expected = from_pretrained(runs / "autoencoder")(x.half().float()).reconstruction
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected)
    capsys.readouterr()
    assert "outside of --data" in failure(capsys, command("encode", "--out", folder / "x.npy", data=folder))
    monkeypatch.setattr("aefast.cli._MOST_COMPARED", 10)
    assert command("sample", "--out", tmp_path / "new.npy", "--count", 5, data=folder) == 0
    assert "10 training samples" in capsys.readouterr().out


def test_data_is_read_as_it_was_for_the_training(command, runs, tmp_path, capsys):
    x = samples_of(runs).flatten(1).bfloat16().reshape(40, 3, 12)
    file, out = tmp_path / "bits.npy", tmp_path / "out.npy"
    np.save(file, x.view(torch.uint16).numpy())
    assert "got 36; --sample-dims 1 takes such of it" in failure(
        capsys, command("encode", "--out", out, "--data-dtype", "bfloat16", data=file)
    )
    with torch.no_grad():
        made = from_pretrained(runs / "autoencoder")(x.float().reshape(120, 12))
    for name, expected in (("encode", made.latent), ("reconstruct", made.reconstruction)):
        options = ("--overwrite", "--data-dtype", "bfloat16", "--sample-dims", 1)
        assert command(name, "--out", out, *options, data=file) == 0
        torch.testing.assert_close(torch.from_numpy(np.load(out)), expected)
    options = ("--data-dtype", "bfloat16", "--sample-dims", 1, "--count", 5)
    assert command("sample", "--out", out, "--overwrite", *options, data=file) == 0
    assert np.load(out).shape == (5, 12)


@pytest.mark.parametrize("sparsity", ["topk", "batchtopk", "l1", "jumprelu"])
def test_sparse_codes_are_written_as_values_and_indices(command, runs, tmp_path, capsys, sparsity):
    torch.manual_seed(0)
    options = {"k": 3} if sparsity.endswith("topk") else {}
    model = SparseAutoencoder(input_size=12, latent=64, sparsity=sparsity, **options)
    x = samples_of(runs)
    with torch.no_grad():
        model.encoder.bias.normal_(std=0.2)
        if sparsity == "jumprelu":
            model.log_threshold.fill_(-1.5)
    model.train()(x)
    if sparsity == "batchtopk":
        # It is the least value that was kept, which rounding in batches of another size would put on either side.
        model.kept_above.mul_(0.999)
    model.save_pretrained(tmp_path / "run")
    model.eval()
    with torch.no_grad():
        dense = model.dense(model.encode(x))
    out = tmp_path / "codes.safetensors"
    common = ("--run", tmp_path / "run", "--batch-size", 20)
    assert command("encode", *common, "--sparse", "--out", out) == 0
    codes = load_file(out)
    values, indices = codes["values"], codes["indices"]
    most = 3 if sparsity == "topk" else int((dense > 0).sum(1).max())
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int32)
    assert values.shape == indices.shape == (120, most)
    assert capsys.readouterr().out == f"120 codes of size 64, of which at most {most} are not 0: {out}\n"
    assert torch.equal(indices < 0, values == 0)
    torch.testing.assert_close(SparseCode(values, indices.long()).dense(64), dense)
    if sparsity != "topk":
        # Batches of other widths, which are padded.
        widths = {int((part > 0).sum(1).max()) for part in dense.split(20)}
        assert len(widths) > 1
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"latent": "64"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.safetensors", "run"]


def test_codes_without_zeros_are_not_written_as_sparse(command, tmp_path, capsys):
    kl = SparseAutoencoder(input_size=12, latent=64, sparsity="kl")
    kl.save_pretrained(tmp_path / "kl")
    out = tmp_path / "x.safetensors"
    assert "whose codes are mostly 0, got autoencoder" in failure(
        capsys, command("encode", "--sparse", "--out", out)
    )
    line = failure(capsys, command("encode", "--run", tmp_path / "kl", "--sparse", "--out", out))
    assert "got sparse of sparsity kl" in line
    for name, arguments in ((".safetensors", ["--sparse", "--out", "x.npy"]), (".npy", ["--out", out])):
        assert f"expected the name of a {name} file" in failure(
            capsys, command("encode", *arguments, model="sparse")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["kl"]


# More than any file may be called.
LONG = 300 * "a"


def failure(capsys, code):
    """The one line on standard error of a command that ended with exit code 2."""
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--sampler", "gm"), "sampler='gm': expected one of .*did you mean 'gmm'"),
        (("sample", "--components", 3), "components=3: sampler 'prior' has no components"),
        (("sample", "--sampler", "gmm", "--components", 0), "components=0: expected a positive integer"),
        (("sample", "--sampler", "gmm", "--components", 109), "components=109: expected at most as many"),
        (("sample", "--count", 1), "count=1: expected an integer of at least 2"),
        (("sample", "--seed", -1), "seed=-1: expected an integer from 0"),
        (("sample", "--save-sampler", ""), "save_sampler='': expected a folder"),
        (("encode", "--batch-size", 0), "batch_size=0: expected a positive integer"),
        (("reconstruct", "--batch-size", 0), "batch_size=0: expected a positive integer"),
        (("encode", "--device", "gpu"), "device='gpu': expected one of auto, cpu, cuda"),
        (
            ("encode", "--run", "nowhere"),
            "run='nowhere': expected a folder with a saved model, found nothing",
        ),
        (("encode", "--run", ""), "run='': expected a folder"),
        (("encode", "--data", "digits"), "data='digits': expected 12 features a sample.*got 64"),
        (("encode", "--data", "digit"), "data='digit': expected one of digits"),
        (("encode", "--out", "codes.txt"), r"out='codes.txt': expected the name of a \.npy file"),
        (("encode", "--out", ""), r"out='': expected the name of a \.npy file"),
        (("encode", "--out", "/proc/x/codes.npy"), "out='/proc/x/codes.npy': cannot be written"),
        (("encode", "--out", f"{LONG}.npy"), f"out='{LONG}.npy': cannot be written .*too long"),
        (("sample", "--out", f"{LONG}.npy"), f"out='{LONG}.npy': cannot be written .*too long"),
        (("encode", "--run", LONG), f"run='{LONG}': expected a folder with a saved model, found nothing"),
        (("encode", "--data", f"{LONG}.npy"), f"data='{LONG}.npy': expected"),
        (("encode", "--bogus"), "No such option: --bogus"),
    ],
)
def test_bad_flags_end_in_one_line(command, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    name, *given = arguments
    assert re.search(message, failure(capsys, command(name, "--out", tmp_path / "x" / "y.npy", *given)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_what_sample_waits_for(command, tmp_path, capsys, monkeypatch, is_terminal):
    monkeypatch.setenv("FORCE_COLOR", "1" if is_terminal else "")
    monkeypatch.setenv("TERM", "xterm")
    assert command("sample", "--sampler", "gmm", "--components", 2, "--out", tmp_path / "x.npy") == 0
    told = capsys.readouterr().out
    assert ("fitting gmm" in told, "comparing with real data" in told) == (is_terminal, is_terminal)


def test_images_with_their_channels_last_are_no_samples_of_a_model(command, tmp_path, capsys):
    options = {"input_size": 12, "image_shape": (3, 2, 2), "channels": (4,), "hidden": (8,), "latent": 4}
    MODELS["vae"](**options).save_pretrained(tmp_path / "run")
    data = tmp_path / "images.npy"
    np.save(data, np.zeros((20, 2, 2, 3), dtype=np.uint8))
    for name in ("sample", "encode", "reconstruct"):
        told = failure(capsys, command(name, "--out", tmp_path / "x.npy", model=tmp_path / "run", data=data))
        assert f"data='{data}': expected samples of image_shape=(3, 2, 2), got (2, 2, 3)" in told
    assert not (tmp_path / "x.npy").exists()


def test_files_that_are_there_are_kept(command, runs, tmp_path, capsys):
    out = tmp_path / "x.npy"
    out.write_bytes(b"mine")
    for name in ("sample", "encode", "reconstruct"):
        assert "is there already; add --overwrite" in failure(capsys, command(name, "--out", out))
    assert out.read_bytes() == b"mine"
    picture = tmp_path / "y.png"
    picture.write_bytes(b"mine")
    assert f"its picture {picture} is there" in failure(
        capsys, command("sample", "--out", tmp_path / "y.npy")
    )
    (tmp_path / "folder.npy").mkdir()
    assert "found a folder" in failure(capsys, command("encode", "--out", tmp_path / "folder.npy"))
    data = runs / "data.npy"
    before = data.read_bytes()
    assert "--data, which would be lost" in failure(capsys, command("encode", "--out", data, "--overwrite"))
    assert data.read_bytes() == before


def test_what_cannot_be_finished_leaves_no_part(command, tmp_path, capsys, monkeypatch):
    def stop(*arguments, **options):
        yield torch.zeros(50, 4)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aefast.sampling.encode_batches", stop)
    line = failure(capsys, command("encode", "--out", tmp_path / "x.npy"))
    assert "cannot be written (No space left on device)" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sample", "encode", "reconstruct"])
def test_help_names_what_is_needed(name, capsys):
    assert cli.main([name, "--help"]) == 0
    told = capsys.readouterr().out
    for option in ("--run", "--data", "--out", "--overwrite"):
        assert option in told
