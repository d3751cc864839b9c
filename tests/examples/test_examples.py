"""The examples in a short form."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_sharper_reconstructions(tmp_path):
    """At equal pixel error a pyramid loss leaves more of the image gradients than the mean squared error."""
    arguments = ("--out", tmp_path, "--epochs", "2", "--patches", "40000")
    command = [sys.executable, EXAMPLES / "sharper_reconstructions.py", *arguments]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^(.+?) +pixel error ([\d.]+) · image gradients +([\d.]+)%", found, re.MULTILINE)
    shares = {name: float(share) for name, _, share in lines}
    errors = {name: float(error) for name, error, _ in lines}
    assert errors["pyramid loss"] <= errors["mean squared error"] < 0.02
    assert shares["mean squared error"] < shares["pyramid loss"] < shares["original"] == 100
    assert (tmp_path / "sharper.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sparse_dictionary(tmp_path):
    """At an equal number of latents in use, TopK explains more of the patches than an L1 penalty."""
    arguments = ("--out", tmp_path, "--epochs", "3", "--patches", "12000", "--latent", "512")
    command = [sys.executable, EXAMPLES / "sparse_dictionary.py", *arguments]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r"^at L0 .*of topk ([\d.]+), of l1 ([\d.]+)$", found, re.MULTILINE)
    assert pairs
    assert all(float(topk) > float(l1) for topk, l1 in pairs)
    dead = re.findall(r"^topk .*dead latents ([\d.]+)%$", found, re.MULTILINE)
    assert len(dead) == 3
    assert all(float(part) < 5 for part in dead)
    assert (tmp_path / "dictionary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_generate(tmp_path):
    """A mixture over an autoencoder's codes is nearer to real digits than their box, and copies are told from both."""
    arguments = ("--out", tmp_path, "--epochs", "40", "--steps", "100", "--count", "400")
    command = [sys.executable, EXAMPLES / "generate.py", *arguments]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    row = r"^(.+?) +MMD² +(-?[\d.]+) · p [\d.]+ · closer than held-out +([\d.]+)% · near copies +([\d.]+)%$"
    rows = {
        name: (float(mmd), float(closer), float(copies))
        for name, mmd, closer, copies in re.findall(row, found, re.MULTILINE)
    }
    assert len(rows) == 9
    mmd = {name: values[0] for name, values in rows.items()}
    assert mmd["real, held out"] < mmd["autoencoder, mixture"] < 0.3 * mmd["autoencoder, box of codes"]
    assert mmd["vae, mixture"] < mmd["vae, prior"] and mmd["infovae, mixture"] < mmd["infovae, prior"]
    # The deviation of the probability is 0.02 for 300 digits of either kind.
    assert 44 < rows["real, held out"][1] < 56 and rows["real, held out"][2] < 4
    assert rows["copies of training"][1:] == (100, 100)
    assert (tmp_path / "generated.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_retrieval(tmp_path):
    """At equal bits an autoencoder's codes find more documents of the query's module than principal components do."""
    command = [sys.executable, EXAMPLES / "retrieval.py", "--out", tmp_path, "--epochs", "20"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    row = r"^(\w+), .*precision @1 +([\d.]+)% · @10 +([\d.]+)% · @100 +([\d.]+)% · ([\d,]+) bytes a document$"
    rows = {name: values for name, *values in re.findall(row, found, re.MULTILINE)}
    assert set(rows) == {"autoencoder", "PCA", "exact"}
    assert rows["autoencoder"][3] == rows["PCA"][3] == "4" and rows["exact"][3] == "8,000"
    at_10 = {name: float(values[1]) for name, values in rows.items()}
    # The deviation of a precision at 10 over 1,000 queries is about one in a hundred.
    assert at_10["PCA"] + 3 < at_10["autoencoder"] < at_10["exact"]
    assert (tmp_path / "retrieval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_point_clouds(tmp_path):
    """An autoencoder comes closer to held-out clouds than principal components and the nearest training cloud."""
    arguments = ("--out", tmp_path, "--epochs", "28", "--surfaces", "60")
    command = [sys.executable, EXAMPLES / "point_clouds.py", *arguments]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    rows = dict(re.findall(r"^(.+?) +Chamfer ([\d.]+) · torus ", found, re.MULTILINE))
    distances = {name: float(distance) for name, distance in rows.items()}
    assert set(distances) == {
        "autoencoder",
        "principal components",
        "nearest training cloud",
        "other points of the surface",
    }
    assert distances["autoencoder"] < distances["principal components"] < distances["nearest training cloud"]
    # Neither clouds nor baselines are trivial: 256 points of a surface lie this far from 256 others of it.
    assert 0.01 < distances["other points of the surface"] < distances["principal components"]
    assert re.search(
        r"^Chamfer distance of .*: aefast [\d.]+ ms · eager PyTorch [\d.]+ ms", found, re.MULTILINE
    )
    assert (tmp_path / "point_clouds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_video(tmp_path):
    """A recurrent autoencoder predicts films of unseen digits better than still frames do."""
    command = [sys.executable, EXAMPLES / "video.py", "--out", tmp_path, "--steps", "150", "--films", "200"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    row = r"^(.+?) +error of predicted frames ([\d.]+) · of the first ([\d.]+) · of the last ([\d.]+)$"
    rows = {name: tuple(map(float, errors)) for name, *errors in re.findall(row, found, re.MULTILINE)}
    assert set(rows) == {"autoencoder", "last frame", "mean of past frames", "mean of training"}
    predicted = rows.pop("autoencoder")
    # A net that learns nothing but the mean of training has its error, within one in a hundred.
    assert all(predicted[0] < 0.9 * errors[0] and predicted[1] < 0.8 * errors[1] for errors in rows.values())
    remembered, plain = map(
        float, re.search(r"frames ([\d.]+), of the mean of training ([\d.]+)", found).groups()
    )
    assert remembered < 0.8 * plain
    assert (tmp_path / "video.png").read_bytes().startswith(b"\x89PNG")
