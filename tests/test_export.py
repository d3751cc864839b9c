"""What is exported under the eager backend runs where aefast is not installed, and gives what the model gives."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aefast
import aefast.functional as AF
from aefast import _library
from aefast.models import MODELS
from aefast.models.sparse import SPARSITIES
from aefast.ops import _registry

WIDTH = 12
SIZES = (1, 7)


class Shipped(nn.Module):
    """The codes and the reconstructions of a model, as docs/models.md ships them."""

    def __init__(self, name, **options):
        super().__init__()
        self.model = MODELS[name](input_size=WIDTH, **options)
        # Thresholds of batchtopk come from training passes.
        self.model(torch.rand(8, WIDTH))

    def forward(self, x):
        code = self.model.encode(x)
        made = self.model.decode(code)
        return (*code, made) if isinstance(code, tuple) else (code, made)


class Written(nn.Module):
    """Layers that `aefast.patch` finds in a Sequential and in a method."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 3))
        self.hidden = nn.Linear(3, 8)
        self.output = nn.Linear(8, WIDTH)

    def forward(self, x):
        code = self.encoder(x)
        return code, self.output(F.silu(self.hidden(code)))


def patched():
    net = Written()
    assert len(aefast.patch(net).swapped) == 2
    return net


class Calling(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return (AF.linear_act(x, self.layer.weight, self.layer.bias, "elu", alpha=0.5),)


def dense(name, **options):
    return lambda: Shipped(name, hidden=(8,), latent=3, activation="gelu", **options)


def sparse(sparsity):
    options = {"k": 3} if "topk" in sparsity else {}
    return lambda: Shipped("sparse", latent=24, sparsity=sparsity, **options)


CASES = {name: dense(name) for name in sorted(MODELS) if name != "sparse"}
CASES["vae-bernoulli"] = dense("vae", likelihood="bernoulli")
CASES["infovae-points"] = dense("infovae", stochastic=False)
CASES |= {f"sparse-{sparsity}": sparse(sparsity) for sparsity in SPARSITIES}
CASES |= {"patched": patched, "linear_act": Calling}

SERVE = """
import sys
sys.modules["aefast"] = None
import torch

folder, found = sys.argv[1], {}
with torch.no_grad():
    for name, batches in torch.load(f"{folder}/batches").items():
        program = torch.export.load(f"{folder}/{name}.pt2").module()
        found[name] = [program(x) for x in batches]
torch.save(found, f"{folder}/found")
"""


def exported(module, *operands, sizes=None):
    with aefast.backend("eager"):
        return torch.export.export(module, operands, dynamic_shapes=sizes)


def ops_of_aefast(program):
    return [node for node in program.graph.nodes if getattr(node.target, "namespace", None) == "aefast"]


def run(*command):
    done = subprocess.run([sys.executable, "-c", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """By case: its program, what its module gives for each batch, and what the program gives in a process that cannot
    import aefast."""
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    batches = [torch.rand(size, WIDTH) for size in SIZES]
    programs, expected = {}, {}
    for name, make in CASES.items():
        module = make().eval()
        sizes = ({0: torch.export.Dim("batch")},)
        programs[name] = exported(module, torch.rand(3, WIDTH), sizes=sizes)
        torch.export.save(programs[name], folder / f"{name}.pt2")
        with torch.no_grad():
            expected[name] = [module(x) for x in batches]
    torch.save(dict.fromkeys(CASES, batches), folder / "batches")
    run(SERVE, folder)
    found = torch.load(folder / "found")
    return {name: (programs[name], expected[name], found[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_programs_run_without_aefast(served, name):
    program, expected, found = served[name]
    assert not ops_of_aefast(program)
    torch.testing.assert_close(found, expected)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, operands):
        return self.function(**operands)


# The shapes of batch_topk_encode's result depend on the values.
@pytest.mark.parametrize("name", sorted(_registry.OPS.keys() - {"batch_topk_encode"}))
def test_eager_is_exported_as_ops_of_torch(name):
    """Seeds that a program draws are among them."""
    op = _registry.OPS[name]
    for operands in op.samples(torch.device("cpu"), torch.float32):
        if all(one.numel() > 1 for one in operands.values() if isinstance(one, torch.Tensor)):
            break
    operands.pop("seed", None)
    assert not ops_of_aefast(exported(Call(op.function), operands))


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_draws_what_eager_draws(strict):
    x = torch.zeros(3, 8)
    module = Call(lambda x: AF.corrupt(AF.corrupt(x, "gaussian", std=1.0), "dropout", p=0.5))
    with aefast.backend("eager"):
        program = torch.export.export(module, ({"x": x},), strict=strict).module()
    # Draws by another rule agree for half of the seeds.
    for seed in range(8):
        torch.manual_seed(seed)
        expected = module({"x": x})
        torch.manual_seed(seed)
        torch.testing.assert_close(program({"x": x}), expected)


LOAD = """
import sys
from pathlib import Path
import torch
import aefast

aefast._library._FOLDER = Path(sys.argv[2])
torch.backends.mkldnn.matmul.fp32_precision = sys.argv[3]
folder = sys.argv[1]
torch.save(torch.export.load(f"{folder}/program.pt2").module()(torch.load(f"{folder}/x")), f"{folder}/found")
"""


@pytest.mark.parametrize(("precision", "error"), [("ieee", 1e-5), ("bf16", 0.1)])
def test_programs_of_fused_ops_run_in_a_process_that_has_called_none(tmp_path, precision, error):
    module, x = CASES["vae"]().eval(), torch.rand(3, WIDTH)
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
        torch.save(x, tmp_path / "x")
        run(LOAD, tmp_path, _library._FOLDER, precision)
        torch.testing.assert_close(torch.load(tmp_path / "found"), module(x), rtol=error, atol=error)
