"""Compiles CUDA C++ sources for the CPU, against the emulation of cuda_emulation.h."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="session")
def compile_emulated(tmp_path_factory):
    """compile_emulated(source, *flags, first_include=None) -> path of a shared library, the same for the same source.

    Headers in the folder `first_include` go before the sources' own.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++, which is not on PATH")
    made = {}

    def compile_emulated(source: Path, *flags: str, first_include: Path | None = None) -> Path:
        includes = [HERE, REPOSITORY / "kernels/cuda", REPOSITORY / "kernels/include"]
        changed = {}
        if first_include is not None:
            changed = {path.name: path.read_text() for path in sorted(first_include.iterdir())}
            includes.insert(0, first_include)
        asked_for = (source, flags, tuple(changed.items()))
        if asked_for in made:
            return made[asked_for]
        library = tmp_path_factory.mktemp("emulation") / f"{source.stem}.so"
        command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
        # Each library has an emulated machine and shared memory of its own.
        command += ["-shared", "-fPIC", "-fno-gnu-unique", "-Wl,-Bsymbolic"]
        command += [f"-I{path}" for path in includes]
        command += ["-isystem", str(TORCH / "include"), "-x", "c++", str(source), "-o", str(library), *flags]
        subprocess.run(command, check=True)
        made[asked_for] = library
        return library

    return compile_emulated


@pytest.fixture(scope="session")
def load_operators(compile_emulated):
    """load_operators(source) -> the namespace in which that file's operators are, on CPU tensors."""

    def load_operators(source: Path) -> object:
        flags = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        link = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        torch.ops.load_library(str(compile_emulated(source, *flags, *link)))
        return torch.ops.aefast_cuda_emulation

    return load_operators
