"""Who may import whom, and what `import aefast` does and leaves undone."""

import ast
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from support.processes import environment, run

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {"aefast": "aefast", "aefast.bench": "bench", "aefast.kernels": "kernels"}
# From the ground up; each may import those of the lines below its own. "" is the package aefast itself.
LAYERS = (
    {"errors"},
    {"_library", "_random", "kernels"},
    {"ops"},
    {"", "functional", "info"},
    {"nn"},
    {"models"},
    {"data", "patch", "stats"},
    {"sampling"},
    {"train"},
    {"bench", "estimators"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    """Module name → its file."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in (REPOSITORY / folder).rglob("*.py"):
            parts = file.relative_to(REPOSITORY / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


def imports(module, source, known, is_package):
    """The modules of aefast that the source of `module` imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "aefast")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) + is_package - node.level]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            if base.split(".")[0] == "aefast":
                names = (f"{base}.{alias.name}" for alias in node.names)
                yield from (name if name in known else base for name in names)


def layer(module):
    return module.partition(".")[2].partition(".")[0]


def upward(module, source, known, is_package=False):
    """What `module` imports from its own layer or one above it, other than from itself."""
    found = imports(module, source, known, is_package)
    return [
        name for name in found if layer(name) != layer(module) and LEVEL[layer(name)] >= LEVEL[layer(module)]
    ]


def test_imports_point_down():
    known = modules()
    assert {layer(module) for module in known} <= set(LEVEL), "a new module needs its place in LAYERS"
    violations = {
        module: wrong
        for module, file in known.items()
        if (wrong := upward(module, file.read_text(), known, file.name == "__init__.py"))
    }
    assert violations == {}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("aefast.kernels.activation", "import aefast.ops", ["aefast.ops"]),
        ("aefast.kernels.activation", "import aefast", ["aefast"]),
        ("aefast.kernels.triton.mlp", "from ...ops import _registry", ["aefast.ops._registry"]),
        ("aefast.nn.mlp", "from aefast import models", ["aefast.models"]),
        ("aefast.nn.mlp", "def f():\n    from ..train import Trainer", ["aefast.train"]),
        ("aefast.data.load", "from aefast.patch import patch", ["aefast.patch"]),
        ("aefast.nn.mlp", "from aefast.nn.linear_act import LinearAct\nimport aefast.functional", []),
        ("aefast.models.autoencoder", "from . import _base\nfrom ..nn import MLP\nimport torch", []),
    ],
)
def test_an_import_that_points_up_is_found(module, source, wrong):
    assert upward(module, source, modules()) == wrong


IMPORT = """
import json, os, sys, threading, time
import torch

def threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()

before, running = set(sys.modules), threads()
# What else runs on this machine takes none of a process's own time.
start = time.process_time()
import aefast
seconds = time.process_time() - start
print(json.dumps({
    "seconds": seconds,
    "threads": threads() - running,
    "cuda": torch.cuda.is_initialized(),
    "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "patch": "aefast.patch" in sys.modules,
    "namespaces": [name for name in ("aefast_cpu", "aefast_cuda") if name in vars(torch.ops)],
}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What three fresh processes say of `import aefast` after `import torch`."""
    reports = []
    for _ in range(3):
        done = run([sys.executable, "-c", IMPORT], cwd=tmp_path_factory.mktemp("cwd"), env=environment())
        assert done.returncode == 0, done.stdout
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    return reports


def test_import_is_quick(imported):
    assert statistics.median(report["seconds"] for report in imported) < 0.3


def test_import_leaves_cuda_and_threads_alone(imported):
    for report in imported:
        assert report["cuda"] is False
        assert report["threads"] == 0


def test_import_loads_nothing_that_is_not_needed_yet(imported):
    unwanted = {"triton", "matplotlib", "numpy", "sklearn", "skimage", "rich", "safetensors", "typer"}
    assert unwanted & set(imported[0]["modules"]) == set()
    assert imported[0]["namespaces"] == []
    # It stands on most of the package, and is there when it is asked for.
    assert imported[0]["patch"] is False


DAMAGED = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
import torch
from torch.nn import functional as F
import aefast, aefast.functional as AF

print(aefast.__file__)
# Large enough that a backend is chosen at all: short calls always run in PyTorch.
x, weight = torch.randn(4096, 32), torch.randn(512, 32)
for _ in range(2):
    torch.testing.assert_close(AF.linear_act(x, weight), F.relu(F.linear(x, weight)))
for _ in range(2):
    try:
        with aefast.backend("cpu"):
            AF.linear_act(x, weight)
    except aefast.BackendError as error:
        print("refused:", error)
"""


@pytest.fixture
def damaged(tmp_path):
    """A folder with a copy of the package whose CPU library does not load."""
    for package, folder in PACKAGES.items():
        target = tmp_path / "site" / Path(*package.split("."))
        shutil.copytree(
            REPOSITORY / folder,
            target,
            ignore=shutil.ignore_patterns("lib", "__pycache__"),
            dirs_exist_ok=True,
        )
    library = tmp_path / "site" / "aefast" / "lib" / "libaefast_cpu.so"
    library.parent.mkdir()
    library.write_bytes(b"no library\n" * 100)
    return tmp_path / "site"


def test_a_library_that_does_not_load_is_remembered_with_its_reason(damaged, tmp_path):
    settings = {"cwd": tmp_path, "env": environment(PYTHONPATH=damaged)}
    done = run([sys.executable, "-c", DAMAGED], **settings)
    assert done.returncode == 0, done.stdout
    assert str(damaged / "aefast" / "__init__.py") in done.stdout.splitlines()
    reason = "libaefast_cpu.so does not load: "
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("aefast INFO linear_act"))
    assert "runs on the eager backend" in said
    assert f"cpu: {reason}" in said
    refusals = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(refusals) == 2
    assert all(f"backend 'cpu' cannot serve linear_act: {reason}" in line for line in refusals)
    done = run([sys.executable, "-m", "aefast.cli", "info"], **settings)
    assert done.returncode == 0, done.stdout
    assert f"cpu: {reason}" in " ".join(done.stdout.split())
