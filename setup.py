"""Builds the compiled libraries with CMake and puts them into the package."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def torch_folder() -> Path | None:
    """torch's own folder, found without importing torch."""
    given = os.environ.get("AEFAST_TORCH_DIR")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    # pip's isolated builds hide the environment's packages, but headers need not be importable.
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    return installed if (installed / "include").is_dir() else None


def why_not_compiled() -> str | None:
    if os.environ.get("AEFAST_BUILD_CPU") == "0":
        return "AEFAST_BUILD_CPU=0"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler on PATH"
    if torch_folder() is None:
        return "torch is not installed; install it first, or set AEFAST_TORCH_DIR to its folder"
    return None


# Minor version of a manylinux tag's glibc → the newest symbols that its wheels may use, from auditwheel's policies.
# torch's own wheels are manylinux_2_28: nothing older matters.
MANYLINUX = {
    28: {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    31: {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)},
    34: {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    35: {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    39: {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
}


def manylinux(folder: Path) -> str | None:
    """The manylinux tag that the libraries in `folder` keep to and that this machine can install, or None."""
    libraries = sorted(folder.glob("*.so"))
    libc, version = platform.libc_ver()
    if not libraries or libc != "glibc" or platform.machine() not in ("x86_64", "aarch64"):
        return None
    if not shutil.which("readelf"):
        return None
    listing = subprocess.run(
        ["readelf", "--version-info", *libraries],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout
    needed = [
        (name, tuple(map(int, number.split("."))))
        for name, number in re.findall(r"Name: ([A-Z]+)_(\d[\d.]*)", listing)
    ]
    here = int(version.split(".")[1])
    for glibc, newest in MANYLINUX.items():
        if glibc <= here and all(number <= newest.get(name, ()) for name, number in needed):
            return f"manylinux_2_{glibc}_{platform.machine()}"
    return None


class build_with_libraries(build):
    # build_ext runs even where all it does is say why there are no libraries.
    sub_commands = tuple((name, None if name == "build_ext" else when) for name, when in build.sub_commands)


class build_libraries(build_ext):
    """Runs CMake; the libraries land in aefast/lib, beside the sources for an editable install."""

    def run(self) -> None:
        reason = why_not_compiled()
        if reason is None:
            self.compile()
        elif "1" in (os.environ.get("AEFAST_BUILD_CPU"), os.environ.get("AEFAST_BUILD_CUDA")):
            raise SystemExit(f"aefast: the compiled libraries were asked for and cannot be built: {reason}")
        else:
            shutil.rmtree(self.output, ignore_errors=True)
            # pip hides what a build prints, and shows its warnings.
            warnings.warn(
                f"aefast: pure-Python install, ops run on Triton or in eager PyTorch: {reason}", stacklevel=1
            )

    @property
    def output(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "aefast" / "lib"

    def compile(self) -> None:
        folder = ROOT / "build" / "cmake"
        torch = torch_folder()
        # --fresh: an isolated build's tools are gone by the next one, and must not be looked for in the cache.
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += [f"-DTORCH_INCLUDE_DIR={torch / 'include'}", f"-DTORCH_LIB_DIR={torch / 'lib'}"]
        configure += [f"-DAEFAST_OUTPUT_DIR={self.output}"]
        for command in (configure, ["cmake", "--build", str(folder), "--parallel"]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"aefast: the compiled libraries do not build: {error}") from None
        if os.environ.get("AEFAST_BUILD_CUDA") != "0" and not (self.output / "libaefast_cuda.so").exists():
            warnings.warn("aefast: no CUDA compiler (nvcc) found, CUDA library left out", stacklevel=1)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class wheel_for_any_python(bdist_wheel):
    """The libraries use no Python ABI: one wheel serves every Python of the platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = why_not_compiled() is not None

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()[2]
        if not (self.root_is_pure or self.plat_name_supplied):
            tag = manylinux(self.get_finalized_command("build_ext").output) or tag
        return "py3", "none", tag


setup(
    packages=[
        *find_packages(include=["aefast", "aefast.*"]),
        "aefast.bench",
        "aefast.bench.cases",
        "aefast.kernels",
        "aefast.kernels.triton",
    ],
    package_dir={"aefast.kernels": "kernels", "aefast.bench": "bench"},
    package_data={
        "aefast.kernels.triton": ["tuned/*.json"],
        "aefast.bench": ["results/*.json", "results/scaling/*.json"],
    },
    ext_modules=[] if why_not_compiled() else [Extension("aefast.compiled", sources=[])],
    # MANIFEST.in puts the C++ sources into the source distribution; they stay out of the wheel.
    include_package_data=False,
    cmdclass={
        "build": build_with_libraries,
        "build_ext": build_libraries,
        "bdist_wheel": wheel_for_any_python,
    },
)
