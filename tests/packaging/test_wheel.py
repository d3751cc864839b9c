"""The wheel: what is in it, what its libraries ask of a machine, and that it works away from the sources."""

import email
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import aefast
from support.processes import environment, run

EDITABLE_LIBRARIES = Path(aefast.__file__).parent / "lib"
# Folder of the repository → where it is installed.
PACKAGES = {"aefast": "aefast", "bench": "aefast/bench", "kernels": "aefast/kernels"}
TORCH_LIBRARIES = {
    "cpu": {"libtorch.so", "libtorch_cpu.so"},
    "cuda": {"libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so"},
}
# Every Linux that torch runs on has these; libpthread, libdl and librt are parts of libc since glibc 2.34.
SYSTEM_LIBRARIES = re.compile(r"(libstdc\+\+|libgcc_s|libm|libc|libpthread|libdl|librt|ld-linux-.*)\.so\.\d+")
# The C++ library that goes with a manylinux tag of glibc 2.N, by PEP 600's rule: what distributions of that
# glibc ship.
CXX_LIBRARY = {28: (3, 4, 24), 31: (3, 4, 28), 34: (3, 4, 29), 35: (3, 4, 30), 39: (3, 4, 33)}


def installed_sources(sources):
    """Where the files of the packages are to be in the wheel; what pytest runs in bench/ is for a checkout."""
    return {
        f"{target}/{file.relative_to(sources / folder).as_posix()}"
        for folder, target in PACKAGES.items()
        for file in (sources / folder).rglob("*")
        if file.suffix in (".py", ".json") and (sources / "bench" / "pytest") not in file.parents
    }


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def readelf(*arguments):
    if shutil.which("readelf") is None:
        pytest.skip("reading a library's header needs readelf, which is not on PATH")
    done = run(["readelf", "--wide", *arguments], env=environment(LC_ALL="C"))
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(params=["cpu", "cuda"])
def library(request, installed):
    """(name, path) of a library: the wheel's, else that of this environment's installation."""
    name = f"libaefast_{request.param}.so"
    for folder in (installed.site / "aefast" / "lib", EDITABLE_LIBRARIES):
        if (folder / name).exists():
            return request.param, folder / name
    pytest.skip(f"{name} was built neither into the wheel nor into this environment")


def test_one_wheel_serves_every_python(compiled):
    (wheel,) = compiled.wheels
    assert re.fullmatch(r"aefast-[\d.]+-py3-none-(many)?linux_\w+\.whl", wheel.name)
    assert "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")


def test_wheel_holds_the_packages_and_the_libraries_and_nothing_else(compiled, sources):
    found = contents(compiled.wheels[0])
    libraries = {name for name in found if name.startswith("aefast/lib/")}
    assert "aefast/lib/libaefast_cpu.so" in libraries
    assert libraries <= {"aefast/lib/libaefast_cpu.so", "aefast/lib/libaefast_cuda.so"}
    assert found - libraries == installed_sources(sources)
    assert {"aefast/kernels/triton/linear_act.py", "aefast/bench/cases/linear_act.py"} <= found


def test_metadata(compiled):
    (wheel,) = compiled.wheels
    fields = email.message_from_string(metadata(wheel, "METADATA"))
    core = [field for field in fields.get_all("Requires-Dist") if "extra ==" not in field]
    assert sorted(core) == ["numpy", "rich", "safetensors", "torch>=2.10", "typer"]
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["License-Expression"] == "BSD-3-Clause"
    assert {"triton", "train", "bench", "dev"} <= set(fields.get_all("Provides-Extra"))
    assert "aefast = aefast.cli:main" in metadata(wheel, "entry_points.txt")


def test_libraries_name_what_they_need(library):
    name, path = library
    dynamic = readelf("--dynamic", path)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert {entry for entry in needed if not SYSTEM_LIBRARIES.fullmatch(entry)} == TORCH_LIBRARIES[name]
    # A path would be that of the machine that built it.
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_libraries_use_no_python_abi(library):
    undefined = re.findall(r" UND (\S+)", readelf("--dyn-syms", library[1]))
    assert len(undefined) > 20
    assert [symbol for symbol in undefined if re.match(r"_?Py[A-Z_]", symbol)] == []


def test_libraries_keep_the_promise_of_the_platform_tag(compiled, installed):
    tag = re.search(r"-none-(.*)\.whl", compiled.wheels[0].name)[1]
    promise = re.fullmatch(r"manylinux_2_(\d+)_\w+", tag)
    if promise is None:
        pytest.skip(f"the tag {tag} promises nothing about versions")
    glibc = int(promise[1])
    for library in (installed.site / "aefast" / "lib").glob("*.so"):
        versions = re.findall(r"Name: ([A-Z]+)_(\d[\d.]*)", readelf("--version-info", library))
        newest = {
            family: max(tuple(map(int, number.split("."))) for name, number in versions if name == family)
            for family in {name for name, _ in versions}
        }
        assert set(newest) <= {"GLIBC", "GLIBCXX", "CXXABI", "GCC"}
        assert newest["GLIBC"] <= (2, glibc)
        assert newest["GLIBCXX"] <= CXX_LIBRARY[glibc]


def test_source_distribution_can_build_the_libraries(sources, tmp_path):
    shutil.copytree(sources, tmp_path / "sources")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = run([sys.executable, "-c", code], cwd=tmp_path / "sources", env=environment())
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"}
    for folder in PACKAGES:
        files = (file for file in (sources / folder).rglob("*") if file.is_file())
        wanted |= {file.relative_to(sources).as_posix() for file in files}
    assert wanted - found == set()


USE = """
import importlib.metadata, sys
import torch
from torch.nn import functional as F
import aefast, aefast.functional as AF, aefast.info

operands = [torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (3, 4), (3,))]
with aefast.backend({backend!r}):
    found = torch.autograd.grad(AF.linear_act(*operands, "gelu").square().sum(), operands)
expected = torch.autograd.grad(F.gelu(F.linear(*operands)).square().sum(), operands)
torch.testing.assert_close(found, expected)
print(aefast.__file__)
print(importlib.metadata.version("aefast") == aefast.__version__)
print(aefast.info.backends()["linear_act"]["cpu"])
"""


def test_installed_wheel_computes(installed):
    done = installed.python(USE.format(backend="cpu"))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [str(installed.site / "aefast" / "__init__.py"), "True", "None"]


PROJECT = """
import torch
from torch import nn
from torch.nn import functional as F
import aefast
from aefast.functional import linear_act
from aefast.patch import Report


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 8)

    def forward(self, x):
        return F.gelu(self.hidden(x))


net, x = Net(), torch.randn(5, 6)
expected = net(x)
torch.testing.assert_close(linear_act(x, net.hidden.weight, net.hidden.bias, "gelu"), expected)
report: Report = aefast.patch(net)
torch.testing.assert_close(net(x), expected)
print(report)
"""


def test_installed_wheel_serves_a_project(installed):
    (installed.cwd / "project.py").write_text(PROJECT)
    done = installed.python("import project")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [
        "1 swapped, 0 left as they were",
        "  forward  F.gelu(self.hidden(x)) → linear_act",
    ]


def test_installed_wheel_shows_what_serves(installed):
    done = installed.aefast("info")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"aefast\W+{re.escape(aefast.__version__)}", done.stdout)
    assert "kernels: " in done.stdout


BENCH = """
import itertools, sys
from aefast import cli
from aefast.bench.cases import CASES

every = CASES["linear_act"]
CASES["linear_act"] = lambda *arguments: itertools.islice(every(*arguments), 1)
sys.exit(cli.main(["bench", "linear_act", "--quick"]))
"""


def test_installed_wheel_benchmarks(installed):
    done = installed.python(BENCH)
    assert done.returncode == 0, done.stdout
    assert re.search(r"linear_act/\S+-fwdbwd.*×", done.stdout)


def test_installed_wheel_trains(installed):
    pytest.importorskip("sklearn", reason='the digits come with "aefast[train]"')
    done = installed.aefast(
        *("train", "--data", "digits", "--epochs", "1", "--hidden", "16", "--latent", "4", "--device", "cpu"),
        *("--no-compare", "--out", "run"),
    )
    assert done.returncode == 0, done.stdout
    assert (installed.cwd / "run" / "model.safetensors").exists()


def test_without_a_compiler_the_wheel_is_pure_and_says_so(pure, sources):
    (wheel,) = pure.wheels
    assert re.fullmatch(r"aefast-[\d.]+-py3-none-any\.whl", wheel.name)
    assert contents(wheel) == installed_sources(sources)
    assert "Root-Is-Purelib: true" in metadata(wheel, "WHEEL")
    (line,) = (line for line in pure.stdout.splitlines() if "pure-Python" in line)
    assert "aefast: pure-Python install" in line
    assert line.endswith("no C++ compiler on PATH")


def test_pure_wheel_falls_back_to_eager(installed_pure):
    done = installed_pure.python(USE.format(backend="auto"))
    assert done.returncode == 0, done.stdout
    file, _, reason = done.stdout.splitlines()
    assert file == str(installed_pure.site / "aefast" / "__init__.py")
    assert "was not built into this installation" in reason
    done = installed_pure.aefast("info")
    assert done.returncode == 0, done.stdout
    assert reason in " ".join(done.stdout.split())


def test_pure_wheel_refuses_the_backend_by_name(installed_pure):
    done = installed_pure.python(USE.format(backend="cpu"))
    assert done.returncode == 1
    assert (
        "BackendError: backend 'cpu' cannot serve linear_act: libaefast_cpu.so was not built" in done.stdout
    )


def test_asking_for_the_cuda_library_without_nvcc_fails(cuda_without_nvcc):
    assert cuda_without_nvcc.returncode != 0
    assert cuda_without_nvcc.wheels == []
    message = " ".join(cuda_without_nvcc.stdout.split())
    assert "AEFAST_BUILD_CUDA=1, but no CUDA compiler (nvcc) was found on PATH or in CUDACXX" in message
    assert "Traceback" not in message


def test_asking_for_the_cuda_library_without_any_compiler_fails(build, tmp_path):
    done = build(AEFAST_BUILD_CUDA="1", PATH=tmp_path)
    assert done.returncode != 0
    assert done.wheels == []
    assert "the compiled libraries were asked for and cannot be built: no C++ compiler on PATH" in done.stdout
