"""The aefast command: exit codes, messages, files, signals."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import aefast
from aefast import cli
from aefast.models import MODELS, from_pretrained


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "samples.npy"
    np.save(path, np.random.default_rng(0).random((100, 12), dtype=np.float32))
    return path


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Runs `aefast train` in this process, without plots unless asked; the exit code."""

    def run(*arguments, data=data, out=tmp_path / "run", plots=False):
        if not plots:
            monkeypatch.setattr("aefast.train.Trainer._plot", lambda trainer: None)
        common = ("--data", data, "--out", out, "--hidden", "8", "--latent", "3", "--device", "cpu")
        return cli.main(["train", *map(str, (*common, "--epochs", 2, "--batch-size", 16, *arguments))])

    return run


def test_train_writes_a_run_and_closes_with_the_comparison(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aefast.train.compare.RUN_SECONDS", 0.002)
    assert train(plots=True) == 0
    out = capsys.readouterr().out
    closing = out.splitlines()[-1]
    match = re.fullmatch(
        r"aefast ([\d,]+) samples/s · eager PyTorch ([\d,]+) samples/s · (\d+\.\d\d)×", closing
    )
    fused, eager = (float(match[index].replace(",", "")) for index in (1, 2))
    assert float(match[3]) == pytest.approx(fused / eager, abs=0.01)
    run = tmp_path / "run"
    assert from_pretrained(run).config.hidden == (8,)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 2
    for name in ("reconstructions.png", "loss.png"):
        assert (run / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_no_compare_leaves_the_comparison_out(train, capsys):
    assert train("--no-compare") == 0
    assert "eager PyTorch" not in capsys.readouterr().out


def test_model_options_reach_the_model(train, tmp_path):
    options = ("--hidden", "9,7", "--latent", 20, "--activation", "gelu", "--linear-decoder")
    assert train("--no-compare", *options, "--output-activation", "sigmoid") == 0
    config = from_pretrained(tmp_path / "run").config
    assert (config.hidden, config.latent, config.activation) == ((9, 7), 20, "gelu")
    assert (config.linear_decoder, config.output_activation) == (True, "sigmoid")
    assert train("--no-compare", "--overwrite", "--hidden", "none", "--decoder-hidden", "5") == 0
    config = from_pretrained(tmp_path / "run").config
    assert (config.hidden, config.decoder_hidden) == ((), (5,))


def test_samples_of_their_own_are_validated_on(train, data, tmp_path, capsys):
    held_out = tmp_path / "held.npy"
    np.save(held_out, np.full((1, 12), 0.5, dtype=np.float32))
    assert train("--no-compare", "--validation", held_out) == 0
    assert "samples: 100 samples of 12 features, 1 held out, of held\n" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    with torch.no_grad():
        loss = from_pretrained(tmp_path / "run")(torch.full((1, 12), 0.5)).loss.item()
    assert metrics[-1]["val_loss"] == pytest.approx(loss, rel=1e-6)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["metadata"]["training"]["validation"] == "held"


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((3, 12), math.nan, r"validation='.*held\.npy': expected finite numbers"),
        ((3, 11), 0.5, "validation: expected 12 features a sample, the model's input_size, got 11"),
    ],
)
def test_bad_samples_to_validate_on_end_in_one_line(train, tmp_path, capsys, shape, value, message):
    held_out = tmp_path / "held.npy"
    np.save(held_out, np.full(shape, value, dtype=np.float32))
    assert re.search(message, failure(capsys, train("--validation", held_out)))
    assert not (tmp_path / "run").exists()


def test_options_of_the_vae_reach_it(train, tmp_path, capsys):
    options = ("--likelihood", "gaussian", "--beta", 0.5, "--kl-warmup-steps", 7)
    assert train("--no-compare", "--model", "vae", *options) == 0
    config = from_pretrained(tmp_path / "run").config
    assert (config.likelihood, config.beta, config.kl_warmup_steps) == ("gaussian", 0.5, 7)
    assert (config.hidden, config.latent) == ((8,), 3)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    told = (
        rf"ELBO {last['val_elbo']:,.2f} nats a sample · reconstruction {last['val_psnr']:.1f} dB \(held out\)"
    )
    assert re.fullmatch(told, capsys.readouterr().out.splitlines()[-1])
    assert train("--no-compare", "--overwrite", "--model", "vae", "--kl-warmup", 9) == 0
    assert from_pretrained(tmp_path / "run").config.kl_warmup_steps == 9


def test_options_of_the_noise_reach_the_denoiser(train, tmp_path, capsys):
    salt = ("--noise", "salt_and_pepper", "--noise-p", 0.2, "--noise-low", -1, "--noise-high", 2)
    assert train("--no-compare", "--model", "denoising", *salt) == 0
    config = from_pretrained(tmp_path / "run").config
    assert (config.noise, config.noise_p, config.noise_low, config.noise_high) == (
        "salt_and_pepper",
        0.2,
        -1,
        2,
    )
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"noisy input {last['val_noisy_psnr']:.1f} dB -> denoised {last['val_psnr']:.1f} dB (held out)"
    )
    gaussian = ("--noise-std", 0.25, "--noise-mean", 0.5)
    assert train("--no-compare", "--overwrite", "--model", "denoising", *gaussian) == 0
    config = from_pretrained(tmp_path / "run").config
    assert (config.noise, config.noise_std, config.noise_mean) == ("gaussian", 0.25, 0.5)


def test_squares_are_cut_out_of_images(train, data, tmp_path):
    squares = ("--no-compare", "--overwrite", "--epochs", 1, "--model", "denoising", "--noise", "masking")
    shapes = {(100, 3, 4): (1, 3, 4), (100, 3, 2, 2): (3, 2, 2), (100, 2, 6, 1): None, (100, 12): None}
    for shape, expected in shapes.items():
        np.save(data, np.random.default_rng(0).random(shape, dtype=np.float32))
        code = train(*squares, "--noise-block", 2)
        assert code == (2 if expected is None else 0)
        if expected is not None:
            assert from_pretrained(tmp_path / "run").config.image_shape == expected
    assert train(*squares, "--noise-block", 2, "--image-shape", "1,2,6") == 0
    assert from_pretrained(tmp_path / "run").config.image_shape == (1, 2, 6)
    assert train(*squares) == 0
    assert from_pretrained(tmp_path / "run").config.image_shape is None


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("autoencoder", r"reconstruction -?[\d.]+ dB \(held out\)"),
        ("denoising", r"noisy input [\d.]+ dB -> denoised -?[\d.]+ dB \(held out\)"),
        ("stochastic", r"reconstruction -?[\d.]+ dB \(held out\)"),
        ("vae", r"ELBO -?[\d,.]+ nats a sample · reconstruction -?[\d.]+ dB \(held out\)"),
        ("infovae", r"MMD² to the prior -?[\d.e+-]+ · reconstruction -?[\d.]+ dB \(held out\)"),
    ],
)
def test_every_model_trains_on_bundled_data(train, tmp_path, capsys, monkeypatch, model, told):
    monkeypatch.setattr("aefast.train.compare.RUN_SECONDS", 0.002)
    assert train("--model", model, "--epochs", 1, "--batch-size", 256, data="digits", plots=True) == 0
    *_, measures, closing = capsys.readouterr().out.splitlines()
    assert re.fullmatch(told, measures)
    assert "eager PyTorch" in closing
    assert from_pretrained(tmp_path / "run").name == model
    assert train("--model", model, "--epochs", 2, "--batch-size", 256, "--resume", data="digits") == 0


def test_bits_of_bfloat16_are_hinted_at_and_read(train, data, tmp_path, capsys):
    x = torch.from_numpy(np.load(data) - 0.5).bfloat16()
    np.save(data, x.view(torch.uint16).numpy())
    assert train("--no-compare", "--epochs", 1) == 0
    assert re.search("^notice: .*may be the bits of bfloat16 numbers", capsys.readouterr().out, re.MULTILINE)
    assert train("--no-compare", "--epochs", 1, "--overwrite", "--data-dtype", "bfloat16") == 0
    assert "notice" not in capsys.readouterr().out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] < 1
    save_file({"other": 2 * x, "it": x}, tmp_path / "a.safetensors")
    options = ("--no-compare", "--epochs", 1, "--overwrite", "--data-key", "it")
    assert train(*options, data=tmp_path / "a.safetensors") == 0
    again = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert again["loss"] == last["loss"]


def test_bytes_that_look_like_counts_are_said_to_be_scaled(train, data, capsys):
    np.save(data, np.random.default_rng(0).integers(0, 9, (100, 12), np.uint8))
    assert train("--no-compare", "--epochs", 1) == 0
    assert re.search(
        "^notice: .*uint8.* 0 to 255 as 0 to 1; for counts", capsys.readouterr().out, re.MULTILINE
    )


def test_what_a_sample_is_is_said_where_it_has_several_dimensions(train, tmp_path, capsys):
    path = tmp_path / "activations.npy"
    np.save(path, np.random.default_rng(0).random((20, 5, 12), dtype=np.float32))
    assert train("--no-compare", "--epochs", 1, data=path) == 0
    told = capsys.readouterr().out
    assert "18 samples of 60 features, 2 held out\n" in told
    assert (
        "notice: a sample is all of (5, 12), every dimension of the data but the first; --sample-dims 1"
        in told
    )
    assert train("--no-compare", "--epochs", 1, "--overwrite", "--sample-dims", 1, data=path) == 0
    told = capsys.readouterr().out
    assert "90 samples of 12 features, 10 held out\n" in told
    assert "notice" not in told
    # What is an image by itself, or to the model, needs no words.
    for options in (("digits",), (path, "--model", "denoising", "--noise", "masking", "--noise-block", 2)):
        source, *others = options
        assert train("--no-compare", "--epochs", 1, "--overwrite", *others, data=source) == 0
        assert "notice" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sparsity", "told"),
    [
        (
            "topk",
            r"explained variance -?[\d.]+ · L0 [\d.]+ · dead [\d.]+% · reconstruction -?[\d.]+ dB \(held out\)",
        ),
        ("kl", r"explained variance -?[\d.]+ · L0 [\d.]+ · reconstruction -?[\d.]+ dB \(held out\)"),
    ],
)
def test_a_sparse_run_closes_with_how_sparse_it_is(train, data, tmp_path, capsys, sparsity, told):
    options = (
        "--hidden",
        "none",
        "--latent",
        24,
        "--model",
        "sparse",
        "--sparsity",
        sparsity,
        "--no-compare",
    )
    assert train(*options) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(told, line)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"explained variance {last['val_explained_variance']:.4f} · L0 {last['val_l0']:.1f} · " in line
    np.save(data, np.ones((100, 12), np.float32))
    assert train(*options, "--overwrite") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("L0 ")


@pytest.mark.slow
@pytest.mark.parametrize("noise", [("gaussian", "--noise-std", 0.2), ("salt_and_pepper", "--noise-p", 0.2)])
def test_a_denoiser_clears_photographs_it_has_not_seen(train, tmp_path, noise):
    sizes = ("--hidden", 512, "--latent", 64, "--batch-size", 256, "--epochs", 1)
    assert train("--no-compare", "--model", "denoising", *sizes, "--noise", *noise, data="patches") == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_psnr"] >= last["val_noisy_psnr"] + 4


def test_every_model_is_in_the_help(capsys):
    cli.main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"Which model to train: {', '.join(sorted(MODELS))}." in out


def test_bundled_data_by_name(train, tmp_path):
    assert train("--no-compare", "--epochs", 1, data="digits") == 0
    assert from_pretrained(tmp_path / "run").config.input_size == 64


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
        (("--epochs", "-1"), "epochs=-1: expected a positive integer"),
        (("--epochs", "0"), "epochs=0: expected a positive integer"),
        (("--epochs", "many"), "'--epochs'.*integer"),
        (("--batch-size", "0"), "batch_size=0: expected a positive integer"),
        (("--lr", "nan"), "lr=nan: expected a finite number above 0"),
        (("--lr", "0"), "lr=0.0: expected a finite number above 0"),
        (("--lr", "-inf"), "lr=-inf"),
        (("--seed", "-1"), "seed=-1: expected an integer from 0"),
        (("--log-every", "0"), "log_every=0"),
        (("--device", "gpu"), "device='gpu': expected one of auto, cpu, cuda"),
        (("--model", "autoencodre"), "model='autoencodre'.*did you mean 'autoencoder'"),
        (("--latent", 10**20), "latent=1(0{20}): expected a positive integer of at most 2,147,483,647"),
        (("--latent", 999999999999), "latent=999999999999: expected a positive integer of at most"),
        (("--out", ""), "out='': expected a folder"),
        (("--activation", "Relu"), "activation='Relu': expected one of .*did you mean 'relu'"),
        (("--activation", "rleu"), "activation='rleu': expected one of .*did you mean 'relu'"),
        (("--output-activation", "x"), "output_activation='x': expected one of"),
        (("--hidden", "8,a"), "hidden='8,a': expected positive integers"),
        (("--hidden", "0"), r"hidden\[0\]=0: expected a positive integer"),
        (("--decoder-hidden", "3,,"), "decoder_hidden='3,,'"),
        (("--latent", "-3"), "latent=-3: expected a positive integer"),
        (("--linear-decoder", "--decoder-hidden", "4"), "decoder_hidden"),
        (("--resume", "--overwrite"), "either --resume or --overwrite"),
        (("--noise", "dropout"), "model autoencoder: unknown option 'noise', expected one of input_size"),
        (("--model", "vae", "--noise-std", "1"), "model vae: unknown option 'noise_std'"),
        (("--model", "denoising", "--beta", "1"), "model denoising: unknown option 'beta'"),
        (("--model", "stochastic", "--likelihood", "mse"), "model stochastic: unknown option 'likelihood'"),
        (("--model", "vae", "--likelihood", "gausian"), "likelihood='gausian'.*did you mean 'gaussian'"),
        (("--model", "vae", "--beta", "-1"), "beta=-1.0: expected a finite number of at least 0"),
        (("--model", "vae", "--kl-warmup", "-1"), "kl_warmup_steps=-1: expected an integer of at least 0"),
        (
            ("--model", "vae", "--kl-warmup", str(2**63)),
            "kl_warmup_steps=9223372036854775808: expected a positive integer of at most 2,147,483,647",
        ),
        (("--model", "denoising", "--noise", "salt"), "noise='salt': expected one of gaussian"),
        (("--model", "denoising", "--noise-p", "0.1"), "noise_p=0.1: gaussian noise has no such option"),
        (("--model", "denoising", "--noise-std", "-1"), "noise_std=-1.0: std must be a finite number"),
        (
            ("--model", "denoising", "--noise", "masking", "--noise-block", "0"),
            "noise_block=0: block must be",
        ),
        (("--model", "denoising", "--image-shape", "3,4"), r"image_shape=\(3, 4\): expected \(C, H, W\)"),
        (("--model", "denoising", "--image-shape", "a"), "image_shape='a': expected positive integers"),
        (("--data", "digit"), "data='digit': expected one of digits.*did you mean 'digits'"),
        (("--data", "/nowhere/x.npy"), "data='/nowhere/x.npy': expected a readable .npy file"),
        (("--data", "patches", "--patch-size", "400"), "patch_size=400: expected an integer from 2"),
        (("--out", "/proc/nothing/here"), "out='/proc/nothing/here': expected a folder that can be written"),
        (("--bogus",), "No such option: --bogus"),
    ],
)
def test_bad_flags_end_in_one_line(train, tmp_path, capsys, arguments, message):
    line = failure(capsys, train("--no-compare", *arguments))
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_options_come_from_a_file_and_the_command_line_goes_before_it(data, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {data}\nhidden: [9, 7]\nlatent: 3\nlr: 2e-3\nbatch-size: 16\nepochs: 1\ndevice: cpu\n"
        "no_compare: true\nlinear_decoder: true\noutput_activation: null\nkeep_last: 1\n"
    )
    out = tmp_path / "run"
    assert (
        cli.main(["train", "--config", str(file), "--out", str(out), "--latent", "4", "--epochs", "2"]) == 0
    )
    config = from_pretrained(out).config
    assert (config.hidden, config.latent, config.linear_decoder) == ((9, 7), 4, True)
    assert config.output_activation == "identity"
    training = json.loads((out / "config.json").read_text())["metadata"]["training"]
    assert (training["epochs"], training["batch_size"], training["lr"]) == (2, 16, 2e-3)
    assert len(list((out / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ephocs: 3\n", "config='.*': unknown option 'ephocs'; did you mean 'epochs'?"),
        ("config: other.yaml\n", "config='.*': unknown option 'config'"),
        ("help: true\n", "config='.*': unknown option 'help'"),
        ("- epochs\n", "config='.*': expected lines such as 'epochs: 20', got list"),
        ("", "config='.*': expected lines such as 'epochs: 20', got NoneType"),
        (
            "lr: 0.1\nlatent: 4\n\nlatent: 8\n",
            "config='.*': expected every option once, got 'latent' in line 2 and in line 4",
        ),
        ("batch_size: 4\nbatch-size: 8\n", "got 'batch-size' in line 1 and in line 2"),
        ("epochs: [3\n", "config='.*': expected a readable YAML file"),
        ("epochs: !!python/object/apply:os.getcwd []\n", "config='.*': expected a readable YAML file"),
        ("epochs: many\n", r"'--epochs'.*integer.*\(from --config .*run.yaml\)"),
        ("keep_best: 3\n", r"'--keep-best'.*boolean.*\(from --config .*run.yaml\)"),
        ("epochs: true\n", "config='.*': expected a value for 'epochs', got true"),
        ("hidden: no\n", "config='.*': expected a value for 'hidden', got false"),
        ("epochs: 0\n", "epochs=0: expected a positive integer"),
        ("hidden: [8, a]\n", "hidden='8,a': expected positive integers"),
    ],
)
def test_bad_files_of_options_end_in_one_line(data, tmp_path, capsys, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    arguments = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--config", str(file)]
    assert re.search(message, failure(capsys, cli.main(arguments)))
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_the_command_line_is_not_said_to_be_of_the_file(data, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"epochs: many\ndata: {data}\nout: {tmp_path / 'run'}\n")
    line = failure(capsys, cli.main(["train", "--config", str(file), "--epochs", "few"]))
    assert "'--epochs'" in line and "run.yaml" not in line
    assert "expected a readable YAML file" in failure(
        capsys, cli.main(["train", "--config", "/nowhere.yaml"])
    )


def test_a_file_of_options_needs_yaml(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    line = failure(capsys, cli.main(["train", "--config", "run.yaml"]))
    assert re.search(r"config='run.yaml': needs PyYAML .* pip install \"aefast\[train\]\"", line)


def test_missing_options_end_in_one_line(capsys):
    assert "--data" in failure(capsys, cli.main(["train", "--out", "x"]))
    assert "--out" in failure(capsys, cli.main(["train", "--data", "digits"]))
    assert "trian" in failure(capsys, cli.main(["trian"]))


def test_bad_data_files_end_in_one_line(train, data, tmp_path, capsys):
    array = np.load(data)
    array[41, 3] = np.nan
    np.save(data, array)
    assert "row 41, column 3 holds nan" in failure(capsys, train())
    data.write_bytes(b"garbage")
    assert f"data='{data}': expected a readable .npy file" in failure(capsys, train())


def test_data_that_is_no_probability_ends_in_one_line(train, data, capsys):
    np.save(data, 3 * np.load(data))
    line = failure(capsys, train("--no-compare", "--model", "vae", "--likelihood", "bernoulli"))
    assert re.search(r"x: expected values in \[0, 1\] for the bernoulli likelihood, got", line)


def test_out_that_is_a_file_ends_in_one_line(train, data, capsys):
    assert "expected a folder, found a file" in failure(capsys, train(out=data))
    assert "expected a folder, found a file" in failure(capsys, train(out=data / "below"))


def test_a_folder_with_a_run_needs_a_word(train, capsys):
    assert train("--no-compare") == 0
    capsys.readouterr()
    assert "holds a run already; add --resume" in failure(capsys, train("--no-compare"))
    assert "batch_size=8: expected 16" in failure(capsys, train("--resume", "--batch-size", 8))
    assert train("--no-compare", "--resume", "--epochs", 3) == 0
    out = capsys.readouterr().out
    assert "resuming" in out and "warning" not in out
    assert train("--no-compare", "--overwrite") == 0


def test_resume_without_a_checkpoint_starts_afresh(train, capsys):
    assert train("--no-compare", "--resume") == 0
    assert "starting afresh" in capsys.readouterr().out


def test_damaged_checkpoints(train, tmp_path, capsys):
    assert train("--no-compare") == 0
    older, newer = sorted((tmp_path / "run" / "checkpoints").iterdir())
    newer.write_bytes(newer.read_bytes()[:1000])
    capsys.readouterr()
    assert train("--no-compare", "--resume") == 0
    out = capsys.readouterr().out
    assert "warning" in out
    assert older.name in out
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert "expected a readable checkpoint" in failure(capsys, train("--no-compare", "--resume"))


def test_divergence_ends_in_one_line(train, data, capsys):
    # The squares of such values overflow float32.
    np.save(data, np.full((100, 12), 3e38, dtype=np.float32))
    assert re.search("no longer finite at step .*lower lr", failure(capsys, train("--no-compare")))


def test_divergence_of_the_last_step_ends_in_one_line(train, tmp_path, capsys):
    # One step an epoch: its loss is that of the initial weights, and finite.
    arguments = ("--no-compare", "--epochs", 1, "--batch-size", 256, "--lr", "1e30")
    assert re.search("val_loss is no longer finite at step 1 .*lower lr", failure(capsys, train(*arguments)))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["checkpoints", "plots"])
def test_files_in_the_place_of_folders_end_in_one_line(train, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    assert f"{tmp_path / 'run' / name} to be a folder" in failure(capsys, train("--no-compare"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "model.safetensors"])
def test_folders_in_the_place_of_files_end_in_one_line(train, tmp_path, capsys, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert f"{tmp_path / 'run' / name} to be a file" in failure(capsys, train("--no-compare", "--overwrite"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_in_one_line(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    line = failure(capsys, train("--no-compare"))
    assert f"cannot read or write {tmp_path / 'run' / 'metrics.jsonl'} (No space left on device)" in line


def test_a_full_disk_names_the_checkpoint(train, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = failure(capsys, train("--no-compare"))
    assert f"cannot read or write {tmp_path / 'run' / 'checkpoints'}/step-" in line


def test_errors_outside_the_folder_keep_their_traceback(train, monkeypatch):
    def fail(trainer):
        raise FileNotFoundError(errno.ENOENT, "no such file", "/elsewhere/x")

    monkeypatch.setattr("aefast.train.Trainer._save", fail)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        train("--no-compare")


def test_names_with_mathematics_are_plotted_as_they_are(train, data, tmp_path):
    path = data.rename(tmp_path / "a$\\x$.npy")
    assert train("--no-compare", "--epochs", 1, data=path, plots=True) == 0
    assert (tmp_path / "run" / "plots" / "loss.png").exists()


def test_a_terminal_without_all_characters_is_served(data, tmp_path):
    options = ["--hidden", "8", "--latent", "3", "--device", "cpu", "--epochs", "1", "--no-compare"]
    command = [sys.executable, "-m", "aefast.cli", "train", "--data", data, "--out", tmp_path / "x", *options]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"on cpu ? samples" in result.stdout


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"aefast {aefast.__version__}\n"


def test_debug_shows_the_traceback(train, monkeypatch):
    monkeypatch.setenv("AEFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="epochs=0"):
        train("--epochs", 0)


def test_bugs_are_not_hidden(train, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("aefast.data.load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["bench", "--help"]])
def test_help(capsys, arguments):
    assert cli.main(arguments) == 0
    output = capsys.readouterr()
    assert "Usage: aefast" in output.out
    assert output.err == ""


def test_train_help_shows_defaults_and_examples(capsys):
    cli.main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("default: 256", "digits", "patches", "aefast train --data digits --out runs/digits"):
        assert text in out


def test_importing_the_command_stays_light():
    code = (
        "import sys, aefast.cli; "
        "print([m for m in ('matplotlib', 'sklearn', 'skimage', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_run_to_resume(train, data, tmp_path, capsys, number):
    run = tmp_path / "run"
    command = (
        f"train --data {data} --out {run} --hidden 8 --latent 3 --device cpu --batch-size 16 "
        "--epochs 1000000 --no-compare"
    ).split()
    process = subprocess.Popen(
        [sys.executable, "-m", "aefast.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size < 500:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the run does not start"
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert f"interrupted by {number.name}" in out
    assert f"resume with: aefast {' '.join(command)} --resume" in out

    from_pretrained(run)
    epoch = int(re.search(r"at epoch (\d+)/", out)[1])
    step = int(re.search(r"step ([\d,]+); checkpoint", out)[1].replace(",", ""))
    assert (run / "checkpoints" / f"step-{step:010d}.safetensors").is_file()
    assert train("--resume", "--no-compare", "--epochs", epoch + 1) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    # 90 samples to train on make 6 steps an epoch.
    assert steps[-1] == 6 * (epoch + 1)
    assert steps == sorted(set(steps))


def test_a_run_of_several_processes_is_resumed_by_as_many(monkeypatch):
    monkeypatch.setattr(cli, "_arguments", ["train", "--out", "a b", "--overwrite"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli._how_to_resume() == "resume with: aefast train --out 'a b' --resume"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = "torchrun --nproc-per-node 2 -m aefast train --out 'a b' --resume"
    assert cli._how_to_resume() == f"resume with: {command}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert cli._how_to_resume() == "to resume, start it again as before, with --resume"


def test_pyramid_of_images(train, tmp_path, capsys):
    """The shape of a sample is that of the data."""
    images = tmp_path / "images.npy"
    np.save(images, np.random.default_rng(0).random((60, 6, 4), dtype=np.float32))
    options = ("--no-compare", "--loss", "pyramid", "--pyramid-levels", "2", "--pyramid-weights", "2,1")
    assert train(*options, data=images) == 0
    config = from_pretrained(tmp_path / "run").config
    assert config.image_shape == (1, 6, 4) and config.pyramid_weights == (2.0, 1.0)
    assert train(*options, "--pyramid-weights", "2,x", data=images) == 2
    assert "pyramid_weights='2,x': expected a number" in capsys.readouterr().err
    assert train("--no-compare", "--loss", "pyramid", data=images, out=tmp_path / "other") == 2
    assert "levels must be" in capsys.readouterr().err


def test_images_with_their_channels_last_are_to_be_transposed(train, tmp_path, capsys):
    images, noise = tmp_path / "images.npy", ("--model", "denoising", "--noise", "masking", "--noise-block")
    np.save(images, np.random.default_rng(0).random((60, 6, 5, 3), dtype=np.float32))
    for options in (("--loss", "pyramid"), (*noise, 2)):
        told = failure(capsys, train("--no-compare", *options, data=images))
        assert "expected images (C, H, W), got (6, 5, 3), which looks like (H, W, C)" in told
        assert "x.transpose(0, 3, 1, 2) instead, or confirm the order with --image-shape 6,5,3" in told
    assert train("--no-compare", *noise, 1, data=images) == 0
    np.save(images, np.load(images).transpose(0, 3, 1, 2))
    assert train("--no-compare", "--overwrite", *noise, 2, data=images) == 0
    # Of these it cannot be told.
    np.save(images, np.ones((60, 4, 5, 3), np.float32))
    assert "needs image_shape, the (C, H, W)" in failure(capsys, train("--loss", "pyramid", data=images))
