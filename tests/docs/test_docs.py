"""The code of the README and of docs/ runs and prints what stands below it, commands parse, and the site builds."""

import contextlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main

import aefast
import aefast.data
import aefast.estimators
import aefast.functional
import aefast.models
import aefast.nn
import aefast.sampling
import aefast.stats
import aefast.train
from aefast import cli
from aefast.bench import document

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A block of Python, and the text right below it, which is what it prints.
PYTHON = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<printed>.*?)^```$)?", re.MULTILINE | re.DOTALL
)
COMMANDS = typer.main.get_command(cli.app).commands


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What pages take as given: samples, a model that was trained on them, and codes of a sparse one."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = np.random.default_rng(0)
    samples = np.tanh(generator.normal(size=(400, 4)) @ generator.normal(size=(4, 64)))
    np.save(folder / "samples.npy", samples.astype(np.float32))
    model = aefast.models.Autoencoder(input_size=64, hidden=(32,), latent=16)
    config = aefast.train.TrainConfig(epochs=1, device="cpu")
    dataset = aefast.data.load(folder / "samples.npy")
    aefast.train.Trainer(model, dataset, config, folder / "runs" / "mine").fit(compare=False)
    sparse = folder / "runs" / "sparse"
    aefast.models.SparseAutoencoder(input_size=64, latent=512, k=8).save_pretrained(sparse)
    arguments = {"--run": sparse, "--data": folder / "samples.npy", "--out": folder / "codes.safetensors"}
    assert cli.main(["encode", "--sparse", *(str(one) for pair in arguments.items() for one in pair)]) == 0
    return folder


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if PYTHON.search(text)])
def test_code_runs_and_prints_what_it_says(page, prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # Models that a page registers are its own.
    monkeypatch.setattr("aefast.models._base.MODELS", {**aefast.models.MODELS})
    threads, namespace = torch.get_num_threads(), {"__name__": "__main__"}
    try:
        for block in PYTHON.finditer(TEXTS[page]):
            # Tracebacks name the line of the page.
            above = "\n" * TEXTS[page].count("\n", 0, block.start("code"))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(above + block["code"], ROOT / page, "exec"), namespace)
            if block["printed"] is not None:
                assert printed.getvalue() == block["printed"]
    finally:
        torch.set_num_threads(threads)


def command_lines():
    """The words behind "aefast" in every line of code that has a command there, none of which is a number."""
    found = []
    for page, text in TEXTS.items():
        for language, block in BLOCK.findall(text):
            if language in ("python", "text"):
                continue
            for line in block.splitlines():
                _, name, rest = f" {line} ".partition(" aefast ")
                if name and re.match(r"[a-z]", rest):
                    found.append(pytest.param(shlex.split(rest, comments=True), id=f"{page}: {line}"))
    return found


@pytest.mark.parametrize("words", command_lines())
def test_command_lines_parse(words):
    name, *arguments = words
    with COMMANDS[name].make_context(name, arguments):
        pass


def test_options_exist():
    """Those between backticks: of the command named before them, or without one of any."""
    options = {
        name: {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
        for name, command in COMMANDS.items()
    }
    of_any = set().union(*options.values())
    found = 0
    for page, text in TEXTS.items():
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", text)):
            named = re.search(r"\baefast ([a-z]+)(?= |$)", span)
            if named is None and not span.startswith("--"):
                continue
            known = of_any if named is None else options[named[1]]
            for option in re.findall(
                r"(?<!\S)--[a-z][a-z-]*", span if named is None else span[named.end() :]
            ):
                assert option in known, f"{page}: {option} in `{span}`"
                found += 1
    assert found > 50


def headings(page, level):
    return re.findall(rf"^{'#' * level} (\w+)$", TEXTS[page], re.MULTILINE)


def test_every_op_has_its_place_and_its_speed():
    pages = {page for page in TEXTS if page.startswith("docs/ops/")} - {"docs/ops/index.md"}
    assert sorted(op for page in pages for op in headings(page, 2)) == sorted(aefast.functional.__all__)
    measured = {
        case["op"]
        for path in (ROOT / "bench" / "results").glob("*.json")
        for case in document.load_results(path)["cases"]
    }
    shown = {
        op for text in TEXTS.values() for op in re.findall(r"^<!-- speed: (\w+) -->$", text, re.MULTILINE)
    }
    assert shown == measured


def test_every_model_has_its_place():
    # The page registers one more, as an example.
    own = [name for name, one in aefast.models.MODELS.items() if one.__module__.startswith("aefast.")]
    assert sorted(headings("docs/models.md", 2)) == sorted(own)


def documented():
    names = {module: module.__all__ for module in (aefast.functional, aefast.nn, aefast.models, aefast.train)}
    names |= {module: module.__all__ for module in (aefast.data, aefast.sampling, aefast.stats)}
    names[aefast.estimators] = ["AutoencoderEstimator", "VAEEstimator"]
    return [getattr(module, name) for module, listed in names.items() for name in listed]


@pytest.mark.parametrize(
    "thing", [one for one in documented() if callable(one)], ids=lambda one: one.__qualname__
)
def test_explained_arguments_exist(thing):
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(thing) or "", re.MULTILINE | re.DOTALL)
    if section is None:
        return
    explained = re.findall(r"^(\w+(?:, \w+)*): ", textwrap.dedent(section[1]), re.MULTILINE)
    assert explained
    named = {name for names in explained for name in names.split(", ")}
    assert named <= inspect.signature(thing).parameters.keys()


@pytest.fixture(scope="module")
def hooks():
    for needed in ("griffe", "mkdocs"):
        pytest.importorskip(needed, reason=f"the site needs {needed}; pip install 'aefast[docs]'")
    specification = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_figures_of_speed_are_those_of_the_readme(hooks):
    # An op that every document has: a page shows no column that would be empty.
    rows = [line for line in hooks.speed("mlp", "page.md").splitlines() if line.startswith("| `")]
    assert rows == [
        line for line in TEXTS["README.md"].splitlines() if line.startswith("| `mlp` | ") and "×" in line
    ]
    assert rows


def test_figures_that_do_not_exist_are_an_error(hooks):
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match=r"ops/points.md: speed: mmmd: no results of it in .*bench.results"):
        hooks.speed("mmmd", "ops/points.md")


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("index.md", "[it](../README.md#install)", "[it](readme.md#install)"),
        ("ops/mmd.md", "[it](../../CONTRIBUTING.md)", "[it](../contributing.md)"),
        ("ops/mmd.md", "[it](../faq.md#devices)", "[it](../faq.md#devices)"),
        ("ops/mmd.md", "[code](../../aefast/ops/mmd.py)", "code"),
        ("ops/mmd.md", "[gone](../../aefast/ops/none.py)", "[gone](../../aefast/ops/none.py)"),
        ("readme.md", "[it](docs/benchmark.md)", "[it](benchmark.md)"),
        ("readme.md", "[cases](bench/cases) ![x](docs/x.png)", "cases ![x](x.png)"),
        ("index.md", "`[it](../README.md)` [it](#here) [it](https://a.b)", None),
        ("index.md", "```\n[it](../README.md)\n```", None),
    ],
)
def test_links_out_of_docs(hooks, uri, link, expected):
    assert hooks.linked(link, uri) == (link if expected is None else expected)


@pytest.mark.slow
def test_site_builds_without_warnings(hooks, tmp_path):
    for needed in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(needed, reason=f"the site needs {needed}; pip install 'aefast[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "ops" / "points" / "index.html").read_text()
    assert "<td><code>mmd</code></td>" in page and "speed:" not in page
    assert r'<div class="arithmatex">\[' in page
    reference = (tmp_path / "api" / "functional" / "index.html").read_text()
    for op in aefast.functional.__all__:
        assert f'id="aefast.functional.{op}"' in reference
    # Stars of shapes that became emphasis.
    assert "<em>" not in reference
    assert (tmp_path / "readme" / "index.html").is_file()
    assert not list(tmp_path.rglob("*.py"))
