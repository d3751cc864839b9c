"""Tests of the CPU's products on a library whose matrix unit is emulated, so that every processor with AVX512-BF16 runs
the code for Intel's AMX."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from aefast import _library
from support.processes import environment, run

REPOSITORY = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The folder of the library, built where the installation was, whose objects need not be compiled again."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    if missing := [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool, path=search) is None]:
        pytest.skip(f"the emulation needs {' and '.join(missing)}, which is not on PATH")
    folder = REPOSITORY / "build" / "cmake"
    configure = ["cmake", "--fresh", "-S", REPOSITORY, "-B", folder, "-G", "Ninja"]
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "TORCH_INCLUDE_DIR": TORCH / "include",
        "TORCH_LIB_DIR": TORCH / "lib",
        # Nothing that is installed is written anew.
        "AEFAST_OUTPUT_DIR": tmp_path_factory.mktemp("beside"),
        "AEFAST_EMULATE_MATRIX_UNIT": "ON",
    }
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for command in (configure, ["cmake", "--build", folder, "--target", "aefast_cpu_emulated"]):
        done = run(command, env=environment(AEFAST_BUILD_CUDA=0, PATH=search))
        if "unknown target 'aefast_cpu_emulated'" in done.stdout:
            pytest.skip("the compiler does not know the matrix unit's instructions")
        assert done.returncode == 0, done.stdout
    return folder / "tests" / "matrix_unit_emulation"


@pytest.mark.parametrize("name", ["matrix_unit", "linear_act", "mlp", "linear_reconstruction_loss"])
def test_products(libraries, name):
    assert _library.load("cpu") is None
    if "avx512bf16" not in torch.ops.aefast_cpu.supported_instruction_sets():
        pytest.skip("this processor lacks AVX512-BF16, which is not emulated")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-m", "not gpu and not aot", f"tests/ops/test_{name}.py"]
    done = run(command, cwd=REPOSITORY, env=environment(AEFAST_TEST_LIBRARIES=libraries))
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "no amx" not in done.stdout and "no matrix unit" not in done.stdout
