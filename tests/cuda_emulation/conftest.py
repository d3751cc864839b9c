"""Compiles CUDA C++ sources for the CPU, against the emulation of cuda_emulation.h."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="session")
def compile_emulated(shared_folder):
    """compile_emulated(source, *flags, first_include=None) -> path of a shared library, made once in a run.

    Headers in the folder `first_include` go before the sources' own.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++, which is not on PATH")

    def compile_emulated(source: Path, *flags: str, first_include: Path | None = None) -> Path:
        includes = [HERE, REPOSITORY / "kernels/cuda", REPOSITORY / "kernels/include"]
        changed = {}
        if first_include is not None:
            changed = {path.name: path.read_text() for path in sorted(first_include.iterdir())}
            includes.insert(0, first_include)
        asked_for = repr((str(source), flags, changed)).encode()
        library = shared_folder / f"{source.stem}-{hashlib.sha256(asked_for).hexdigest()[:16]}.so"
        command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
        # Each library has an emulated machine and shared memory of its own.
        command += ["-shared", "-fPIC", "-fno-gnu-unique", "-Wl,-Bsymbolic"]
        command += [f"-I{path}" for path in includes]
        command += ["-isystem", str(TORCH / "include"), "-x", "c++", str(source), "-o", str(library), *flags]
        with FileLock(f"{library}.lock"):
            if not library.exists():
                subprocess.run(command, check=True)
        return library

    return compile_emulated
