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
