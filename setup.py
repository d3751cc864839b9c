"""Builds the compiled libraries with CMake and puts them into the package."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
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


class build_libraries(build_ext):
    """Runs CMake; the libraries land in aefast/lib, beside the sources for an editable install."""

    def run(self) -> None:
        reason = why_not_compiled()
        if reason is None:
            self.compile()
        elif "1" in (os.environ.get("AEFAST_BUILD_CPU"), os.environ.get("AEFAST_BUILD_CUDA")):
            raise SystemExit(f"aefast: the compiled libraries were asked for and cannot be built: {reason}")
        else:
            print(
                f"aefast: pure-Python install, ops run on Triton or in eager PyTorch: {reason}",
                file=sys.stderr,
            )

    def compile(self) -> None:
        output = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "aefast" / "lib"
        folder = ROOT / "build" / "cmake"
        torch = torch_folder()
        # --fresh: an isolated build's tools are gone by the next one, and must not be looked for in the cache.
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += [f"-DTORCH_INCLUDE_DIR={torch / 'include'}", f"-DTORCH_LIB_DIR={torch / 'lib'}"]
        subprocess.run([*configure, f"-DAEFAST_OUTPUT_DIR={output}"], check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel"], check=True)

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
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(
    packages=[
        *find_packages(include=["aefast", "aefast.*"]),
        "aefast.bench",
        "aefast.bench.cases",
        "aefast.kernels",
        "aefast.kernels.triton",
    ],
    package_dir={"aefast.kernels": "kernels", "aefast.bench": "bench"},
    package_data={"aefast.kernels.triton": ["tuned/*.json"], "aefast.bench": ["results/*.json"]},
    ext_modules=[] if why_not_compiled() else [Extension("aefast.compiled", sources=[])],
    cmdclass={"build_ext": build_libraries, "bdist_wheel": wheel_for_any_python},
)
