"""Builds the package, and installs it away from its sources."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from support.processes import environment, run

REPOSITORY = Path(__file__).parents[2]


def path(*, nvcc=True):
    """A PATH with this environment's CMake and Ninja, and if it is not wanted, without nvcc."""
    folders = [sysconfig.get_path("scripts"), *os.environ["PATH"].split(os.pathsep)]
    return os.pathsep.join(folder for folder in folders if nvcc or not Path(folder, "nvcc").exists())


def require_compiler(search):
    if not any(shutil.which(compiler, path=search) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("the compiled libraries need a C++ compiler, and none is on PATH")


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The repository's files as git knows them, without anything built."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("a clean copy of the sources needs git and a clone")
    folder = tmp_path_factory.mktemp("sources")
    listing = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY)
    assert listing.returncode == 0, listing.stdout
    for name in filter(None, listing.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)
    return folder


def build_wheel(sources, folder, **changes):
    """`pip wheel` of the sources; what it gives is in `folder`, and its results are `.wheels`."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--verbose", "--no-deps", "--no-build-isolation"]
    done = run(
        [*command, "--wheel-dir", folder / "wheels"],
        cwd=sources,
        env=environment(**changes),
    )
    done.wheels = sorted((folder / "wheels").glob("*"))
    return done


@pytest.fixture(scope="session")
def build(sources, tmp_path_factory):
    """build(**environment) -> a wheel of a copy of the sources."""

    def build(**changes):
        folder = tmp_path_factory.mktemp("build")
        shutil.copytree(sources, folder / "sources")
        return build_wheel(folder / "sources", folder, **changes)

    return build


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The wheel with the compiled libraries; AEFAST_TEST_CUDA_WHEEL=1 builds the CUDA one too.

    It is built where the editable installation was, whose objects need not be compiled again.
    """
    require_compiler(path())
    with_cuda = os.environ.get("AEFAST_TEST_CUDA_WHEEL") == "1" and shutil.which("nvcc") is not None
    cuda = os.environ.get("AEFAST_BUILD_CUDA") or ("1" if with_cuda else "0")
    folder = tmp_path_factory.mktemp("compiled")
    # What setuptools has copied for an earlier wheel would be in this one.
    (folder / "setup.cfg").write_text(f"[build]\nbuild_base = {folder / 'build'}\n")
    changes = {"AEFAST_BUILD_CUDA": cuda, "PATH": path(), "DIST_EXTRA_CONFIG": str(folder / "setup.cfg")}
    done = build_wheel(REPOSITORY, folder, **changes)
    assert done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope="session")
def pure(build, tmp_path_factory):
    """The wheel that comes out where there is no compiler."""
    done = build(PATH=tmp_path_factory.mktemp("empty"))
    assert done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope="session")
def cuda_without_nvcc(build):
    """A build that was told to make the CUDA library, and has no compiler for it."""
    require_compiler(path(nvcc=False))
    return build(AEFAST_BUILD_CUDA="1", PATH=path(nvcc=False))


class Installation:
    """A virtual environment that holds a wheel of aefast, and borrows what it depends on from this one."""

    def __init__(self, folder, wheel):
        self.cwd = folder / "elsewhere"
        self.cwd.mkdir()
        self.bin = folder / "venv" / "bin"
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python"]
        for command in (
            [sys.executable, "-m", "venv", "--without-pip", folder / "venv"],
            [*pip, "install", "--no-deps", "--no-index", wheel],
        ):
            done = run(command, env=environment())
            assert done.returncode == 0, done.stdout
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        # Python leaves the .pth files of a folder alone that a .pth file names, and so this environment's
        # editable installation of aefast stays out of sight.
        borrowed = {str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib")}
        (self.site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")

    def python(self, code, **changes):
        return run([self.bin / "python", "-c", code], cwd=self.cwd, env=environment(**changes))

    def aefast(self, *arguments, **changes):
        return run([self.bin / "aefast", *arguments], cwd=self.cwd, env=environment(**changes))


@pytest.fixture(scope="session")
def installed(compiled, tmp_path_factory):
    return Installation(tmp_path_factory.mktemp("compiled"), compiled.wheels[0])


@pytest.fixture(scope="session")
def installed_pure(pure, tmp_path_factory):
    return Installation(tmp_path_factory.mktemp("pure"), pure.wheels[0])
