import importlib
import os
import types
from pathlib import Path

import pytest
import torch

from aefast import _library

# Folders of files that take long. They come first, lest one process be left alone with one of them at the end.
LONG = ("packaging", "train")

# A folder whose libraries stand in for the installed ones.
if "AEFAST_TEST_LIBRARIES" in os.environ:
    _library._FOLDER = Path(os.environ["AEFAST_TEST_LIBRARIES"])


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all processes of this run have in common, for what takes long to make; empty at first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def compiled_once(shared_folder):
    """Triton compiles anew in this run, but each kernel for each target once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(shared_folder / "triton"))
        yield


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch():
    """Triton's interpreter searches its language for what to replace in every call of a device function too, though
    the launch has replaced it: a fifth of all its time. Here a launch replaces what any function calls."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    whole = types.FunctionType((lambda: None).__code__, {"tl": language, "core": language.core})
    patch_language, launch = interpreter._patch_lang, []

    def patch_once(function):
        if launch:
            return None
        scope = patch_language(whole)
        launch.append(scope)
        restore = scope.restore

        def end():
            launch.clear()
            restore()

        scope.restore = end
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture
def poisoned_memory():
    """Within it, memory that an op allocates and may leave unwritten is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    # The CPU library allocates without asking torch's settings, which would cost it a microsecond a tensor.
    if _library.load("cpu") is None:
        torch.ops.aefast_cpu.poison_outputs(True)
    yield
    torch.use_deterministic_algorithms(False)
    if _library.load("cpu") is None:
        torch.ops.aefast_cpu.poison_outputs(False)


@pytest.fixture
def no_kept_memory():
    """Within it, the profiler sees each tensor that an op allocates."""
    with _library.without_kept_memory():
        yield


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    """Within it, the CPU library uses the kernels compiled for this instruction set; tests run once with each."""
    reason = _library.load("cpu")
    if reason:
        pytest.skip(reason)
    ops = torch.ops.aefast_cpu
    supported = ops.supported_instruction_sets()
    if request.param not in supported:
        pytest.skip(f"this processor has no {request.param}")
    ops.use_instruction_set(request.param)
    yield request.param
    ops.use_instruction_set(supported[0])
