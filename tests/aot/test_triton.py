"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 within the budgets of kernels/triton/aot.py."""

import importlib
import inspect
import json
import os
import pkgutil
from pathlib import Path

import pytest
import torch

from aefast.bench import sass

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton")
package = importlib.import_module("aefast.kernels.triton")
aot = importlib.import_module("aefast.kernels.triton.aot")
tuning = importlib.import_module("aefast.kernels.triton.tuning")

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("compiled_once")]

SIGNATURES = aot.signatures()


def of_signatures(chosen):
    """Parametrizes a test by those of SIGNATURES and their targets."""
    return pytest.mark.parametrize(
        "signature, capability",
        [
            pytest.param(signature, capability, id=f"{signature.name} sm_{capability}".replace(" ", "/"))
            for signature in filter(chosen, SIGNATURES)
            for capability in signature.targets
        ],
    )


def has_tiles(signature):
    """Whether the kernel multiplies tiles or goes over pairs of points; about half of all that is compiled."""
    return signature.name.split()[0] in ("gemm", "gaussian_head", "mmd", "nearest")


@pytest.fixture(scope="class")
def codes(request):
    """codes(signature, capability) -> its code. All that the class's tests ask for is disassembled at once."""
    made, failures = {}, {}
    for item in request.session.items:
        if item.cls is request.cls:
            signature, capability = item.callspec.params["signature"], item.callspec.params["capability"]
            try:
                made[signature.name, capability] = sass.compiled(signature, capability)
            except Exception as error:  # it is that of its own test
                failures[signature.name, capability] = error
    found = dict(zip(made, sass.disassembled(list(made.values())), strict=True))

    def code_of(signature, capability):
        if failure := failures.get((signature.name, capability)):
            raise failure
        return found[signature.name, capability]

    return code_of


# Two classes, since a class's tests stay in one process.
class TestKernelsOfTiles:
    @of_signatures(has_tiles)
    def test_budget(self, signature, capability, codes, aot_row):
        check_budget(signature, capability, codes(signature, capability), aot_row)


class TestOtherKernels:
    @of_signatures(lambda signature: not has_tiles(signature))
    def test_budget(self, signature, capability, codes, aot_row):
        check_budget(signature, capability, codes(signature, capability), aot_row)


def check_budget(signature, capability, code, aot_row):
    matrix = code.matrix(capability)
    aot_row(
        (
            signature.name,
            capability,
            code.registers,
            signature.registers,
            code.spills,
            code.shared,
            code.load_bits,
            matrix,
        )
    )
    assert code.spills == 0 and code.stack == 0
    assert code.registers <= signature.registers
    assert code.load_bits >= signature.load_bits
    assert code.shared <= {80: 163, 90: 227, 100: 227}[capability] * 1024
    assert (matrix > 0) == signature.matrix


def test_every_kernel_has_a_signature():
    covered = {signature.kernel for signature in SIGNATURES}
    for module in pkgutil.iter_modules(package.__path__):
        members = inspect.getmembers(importlib.import_module(f"{package.__name__}.{module.name}"))
        for name, member in members:
            if isinstance(member, triton.JITFunction) and name.endswith("_kernel"):
                assert member in covered, f"{module.name}.{name} has no signature in aot.py"


def test_the_selection_is_launched_as_it_is_compiled(monkeypatch):
    selection = importlib.import_module("aefast.kernels.triton.selection")
    launched = {}
    kernel = {(2,): lambda *arguments, **options: launched.update(options)}
    monkeypatch.setattr(selection, "largest_kernel", kernel)
    for signature in SIGNATURES:
        if signature.kernel.__name__ == "largest_kernel" and signature.types["elements"] == "*fp32":
            k = int(signature.name.split()[1])
            selection.select(torch.zeros(2, 4096), torch.zeros(2, k), torch.zeros(2, k, dtype=torch.int64))
            assert launched == {**signature.constants, **signature.options, "num_warps": signature.warps}


def test_shipped_tables_name_only_compiled_tiles():
    """A table's tile is one of those above."""
    known = {*tuning.TILES_TENSOR, *tuning.TILES_FMA, *tuning.TILES_ODD}
    for path in (Path(package.__path__[0]) / "tuned").glob("*.json"):
        for key, row in json.loads(path.read_text())["rows"].items():
            assert row["candidate"] in ("fused", "unfused"), key
            assert row["candidate"] == "unfused" or tuning.Tile.parse(row["tile"]) in known, key
