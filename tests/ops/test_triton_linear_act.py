"""The Triton kernels of linear_act and mlp in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import contextlib
import itertools
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import triton.runtime.interpreter as interpreter

from aefast.kernels.activation import (
    ACTIVATIONS,
    NEED_BIAS,
    NEED_WEIGHT,
    NEED_X,
    STORES_DERIVATIVE,
    specification,
)
from aefast.kernels.triton import linear_act as kernels
from aefast.kernels.triton import mlp as stacks
from aefast.kernels.triton import tuning
from aefast.kernels.triton.tuning import Tile
from support import numerics

pytestmark = pytest.mark.interpret

SLOPE, ALPHA = 0.05, 0.7
SMALL = Tile(64, 32, 4, 2)
CANDIDATES = {
    "unfused": ("unfused", None, None),
    "fused": ("fused", SMALL, False),
    "fused-descriptors": ("fused", SMALL, True),
}
# float64 has no fused candidate.
CASES = [
    pytest.param(candidate, dtype, id=f"{candidate}-{str(dtype).removeprefix('torch.')}")
    for candidate in CANDIDATES
    for dtype in (torch.float32, torch.float16, torch.float64)
    if candidate == "unfused" or dtype != torch.float64
]

EAGER = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
    "elu": lambda x: F.elu(x, ALPHA),
    "selu": F.selu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every buffer starts as NaN, so that an element no kernel wrote is seen."""

    def poisoned(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def normal(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def close(got, eager, exact, what):
    """err(kernel) <= 2 err(eager torch, same dtype) + 2 noise.

    The noise is one rounding of the largest value: both sides round their result to the dtype, and eager's
    error may by luck be smaller than that. In float64 the reference sums, rounds and cancels (1 - tanh^2) as
    eager does; 16 roundings stand for that."""
    assert got.dtype == eager.dtype and got.shape == eager.shape, what
    if exact.numel() == 0:
        return
    noise = torch.finfo(got.dtype).eps * exact.abs().max().item()
    error = (got.double() - exact).abs().max().item()
    eager_error = 16 * noise if got.dtype == torch.float64 else (eager.double() - exact).abs().max().item()
    allowed = 2 * eager_error + 2 * noise
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def eager_stack(x, weights, biases, activations, grad, dtype):
    """Final output and the gradients of x, every weight and every bias, computed by torch in `dtype`."""
    leaves = [x, *weights, *(b for b in biases if b is not None)]
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    y, layers = leaves[0], len(weights)
    free_biases = iter(leaves[1 + layers :])
    for weight, bias, activation in zip(leaves[1 : 1 + layers], biases, activations, strict=True):
        y = EAGER[activation](F.linear(y, weight, None if bias is None else next(free_biases)))
    gradients = torch.autograd.grad(y, leaves, grad.to(dtype))
    return [y.detach(), *gradients]


def check_layer(x, weight, bias, activation, grad):
    spec = specification(activation, SLOPE, ALPHA)
    out, derivative = kernels.linear_act(x, weight, bias, spec, True)
    assert (derivative is not None) == (activation in STORES_DERIVATIVE)
    saved = derivative if derivative is not None else None if activation == "identity" else out
    needs = NEED_X | NEED_WEIGHT | (0 if bias is None else NEED_BIAS)
    dx, dweight, dbias = kernels.linear_act_backward(grad, x, weight, saved, spec, needs)
    got = [out, dx, dweight] + ([dbias] if bias is not None else [])
    eager = eager_stack(x, [weight], [bias], [activation], grad, x.dtype)
    exact = eager_stack(x, [weight], [bias], [activation], grad, torch.float64)
    for what, *values in zip(["out", "dx", "dweight", "dbias"], got, eager, exact, strict=False):
        close(*values, f"{what} of {activation}")
    if derivative is not None:  # an inference forward stores nothing and gives the same output
        again, nothing = kernels.linear_act(x, weight, bias, spec, False)
        assert nothing is None
        close(again, eager[0], exact[0], "out without derivative")


@pytest.mark.parametrize("candidate, dtype", CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, candidate, dtype):
    M, N, K = (72, 24, 40) if candidate == "fused-descriptors" else (67, 19, 35)
    x, weight = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1, scale=0.3)
    bias, grad = normal(N, dtype=dtype, seed=2), normal(M, N, dtype=dtype, seed=3)
    with tuning.force(*CANDIDATES[candidate]):
        check_layer(x, weight, bias, activation, grad)


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize(
    "M, N, K",
    [(0, 3, 5), (3, 0, 5), (3, 5, 0), (1, 1, 1), (1, 17, 16), (16, 1, 1), (129, 7, 3), (64, 33, 64)],
)
def test_sizes(M, N, K, candidate):
    for dtype, activation, with_bias in [
        (torch.float32, "gelu", True),
        (torch.float16, "relu", False),
        (torch.float64, "tanh", True),
        (torch.float32, "identity", True),
    ]:
        x, weight = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1)
        bias, grad = normal(N, dtype=dtype, seed=2) if with_bias else None, normal(M, N, dtype=dtype, seed=3)
        with tuning.force(*CANDIDATES[candidate]):
            check_layer(x, weight, bias, activation, grad)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_strides(candidate):
    """Transposed, sliced with a step, broadcast and column-offset operands."""
    dtype, M, N, K = torch.float32, 60, 28, 24
    plain_x, plain_weight = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1)
    bias, plain_grad = normal(2 * N, dtype=dtype, seed=2)[::2], normal(M, N, dtype=dtype, seed=3)
    xs = {
        "contiguous": plain_x,
        "transposed": plain_x.t().contiguous().t(),
        "stepped": normal(2 * M, 3 * K, dtype=dtype, seed=4)[::2, ::3],
        "offset columns": normal(M, K + 9, dtype=dtype, seed=5)[:, 9:],
        "expanded rows": normal(1, K, dtype=dtype, seed=6).expand(M, K),
    }
    weights = {
        "contiguous": plain_weight,
        "transposed": plain_weight.t().contiguous().t(),
        "stepped": normal(N, 2 * K, dtype=dtype, seed=7)[:, ::2],
    }
    grads = {
        "transposed": plain_grad.t().contiguous().t(),
        "one value": normal(1, 1, dtype=dtype, seed=8).expand(M, N),
        "one row": normal(1, N, dtype=dtype, seed=9).expand(M, N),
    }
    with tuning.force(*CANDIDATES[candidate]):
        for x in xs.values():
            check_layer(x, plain_weight, bias, "silu", plain_grad)
        for weight in weights.values():
            check_layer(plain_x, weight, bias, "elu", plain_grad)
        for grad in grads.values():
            check_layer(plain_x, plain_weight, bias, "sigmoid", grad)
            check_layer(plain_x, plain_weight, bias, "identity", grad)


@pytest.mark.parametrize("candidate, dtype", CASES)
def test_mlp(candidate, dtype):
    widths = (24, 40, 8, 16, 32) if candidate == "fused-descriptors" else (23, 40, 7, 17, 33)
    activations, batch = ["gelu", "elu", "identity", "softplus"], 70
    specs = ",".join(specification(activation, SLOPE, ALPHA) for activation in activations)
    x, grad = normal(batch, widths[0], dtype=dtype), normal(batch, widths[-1], dtype=dtype, seed=1)
    weights = [
        normal(n, k, dtype=dtype, seed=2 + i, scale=k**-0.5)
        for i, (k, n) in enumerate(itertools.pairwise(widths))
    ]
    biases = [normal(n, dtype=dtype, seed=9 + n) for n in widths[1:]]
    biases[2] = None
    with tuning.force(*CANDIDATES[candidate]):
        saved = stacks.mlp(x, weights, biases, specs, True)
        gradients = stacks.mlp_backward(grad, x, weights, saved, specs, "1" + "1111" + "1101")
        final = stacks.mlp(x, weights, biases, specs, False)
    assert len(saved) == 4 + 1 and len(final) == 1
    got = [saved[3], *gradients]
    eager = eager_stack(x, weights, biases, activations, grad, dtype)
    exact = eager_stack(x, weights, biases, activations, grad, torch.float64)
    for position, values in enumerate(zip(got, eager, exact, strict=True)):
        close(*values, f"mlp result {position}")
    close(final[0], eager[0], exact[0], "mlp without saving")


@pytest.mark.parametrize("candidate", ["unfused", "fused"])
def test_mlp_computes_only_what_is_needed(candidate, monkeypatch):
    dtype, widths, specs = torch.float32, (5, 6, 7, 3), "relu,tanh,identity"
    x, grad = normal(4, 5, dtype=dtype), normal(4, 3, dtype=dtype, seed=1)
    weights = [normal(n, k, dtype=dtype, seed=n) for k, n in itertools.pairwise(widths)]
    biases = [normal(n, dtype=dtype, seed=n) for n in widths[1:]]
    products = []
    monkeypatch.setattr(stacks, "product", lambda op, a, b: products.append(op) or kernels.product(op, a, b))
    with tuning.force(*CANDIDATES[candidate]):
        arguments = (grad, x, weights, stacks.mlp(x, weights, biases, specs, True), specs)
        full = stacks.mlp_backward(*arguments, "1" * 7)
        products.clear()
        dweight, dbias = stacks.mlp_backward(*arguments, "0" + "001" + "010")
    assert products == ["wgrad"]
    assert torch.equal(dweight, full[1 + 2]) and torch.equal(dbias, full[1 + 3 + 1])
    assert stacks.mlp_backward(*arguments, "0" * 7) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_results_do_not_depend_on_tiles_or_loads(dtype, monkeypatch):
    # The interpreter's dot is BLAS's, whose order of K changes with the tile's shape as no GPU's does. In
    # float64 the order is lost in rounding to float32.
    def dot(self, a, b, d, *options):
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    x, grad = normal(130, 72, dtype=dtype), normal(130, 40, dtype=dtype, seed=1)
    weights = [normal(72, 72, dtype=dtype, seed=2, scale=0.1), normal(40, 72, dtype=dtype, seed=3, scale=0.1)]
    biases = [normal(72, dtype=dtype, seed=4), normal(40, dtype=dtype, seed=5)]
    specs = "gelu,tanh"

    def run(tile, descriptors):
        with tuning.force("fused", tile, descriptors):
            saved = stacks.mlp(x, weights, biases, specs, True)
            return [*saved, *stacks.mlp_backward(grad, x, weights, saved, specs, "1" * 5)]

    first = run(SMALL, False)
    for tile, descriptors in [
        (SMALL, False),
        (SMALL, True),
        (Tile(64, 64, 4, 2), False),
        (Tile(128, 32, 8, 3), True),
        (Tile(128, 128, 8, 3), False),
    ]:
        for position, (value, again) in enumerate(zip(first, run(tile, descriptors), strict=True)):
            assert torch.equal(value, again), f"result {position} changes with {tile}, {descriptors=}"


def test_bias_gradient_is_the_same_fused_and_unfused():
    """Given the same g, both candidates sum its columns in the same order."""
    g = normal(333, 40, dtype=torch.float32)
    saved = normal(333, 56, dtype=torch.float32, seed=1)
    weight = torch.zeros(40, 56)
    weight[torch.arange(40), torch.arange(40)] = 1.0  # g @ weight copies columns exactly
    sums = []
    for candidate in ("fused", "unfused"):
        with tuning.force(*CANDIDATES[candidate]):
            sums.append(stacks.inner_gradient(g, weight, saved, "tanh", True))
    assert torch.equal(sums[0][0], sums[1][0]) and torch.equal(sums[0][1], sums[1][1])


def test_split_weight_gradient(monkeypatch):
    """A large batch splits over programs; the count is a function of the shape alone."""
    assert kernels.split_count(512, 784, 512, 2)[0] == 1
    assert kernels.split_count(16, 32, 65536, 2)[0] == 32
    for K in (1, 2047, 2048, 4097, 99991):
        splits, step = kernels.split_count(16, 32, K, 4)
        assert step % tuning.BLOCK_K[4] == 0 and (splits - 1) * step < K <= splits * step
    launched = []
    original = kernels.split_sum_kernel
    monkeypatch.setattr(
        kernels,
        "split_sum_kernel",
        type("Spy", (), {"__getitem__": lambda _, grid: launched.append(grid) or original[grid]})(),
    )
    x, g = normal(4099, 24, dtype=torch.float32), normal(4099, 16, dtype=torch.float32, seed=1)
    exact = g.double().t() @ x.double()
    results = []
    for tile in (SMALL, SMALL, Tile(128, 64, 4, 3)):
        with tuning.force("fused", tile, tile is not SMALL):
            results.append(kernels.product("wgrad", g.t(), x))
        close(results[-1], g.t() @ x, exact, "dweight")
    assert len(launched) == 3
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1025])
def test_column_sums(rows):
    """One, several and (over 1024 partial sums) several passes' worth of partial sums."""
    partials = normal(rows, 19, dtype=torch.float32)
    got = kernels.sum_partials(partials.clone(), torch.float32)
    close(got, partials.sum(0), partials.double().sum(0), "column sums")
    assert torch.equal(got, kernels.sum_partials(partials.clone(), torch.float32))


def test_bias_gradient_is_accumulated_wide():
    """70000 ones in float16: a float16 sum would stop at 2048."""
    grad = torch.ones(1, 1, dtype=torch.float16).expand(4000, 3)
    _, dbias = kernels.outermost_gradient(grad, None, "identity", False, True)
    assert dbias.dtype == torch.float16 and dbias.tolist() == [4000.0] * 3


# --- the activations themselves ---------------------------------------------------------------------------


def through_kernel(values, activation, with_derivative):
    out = values.clone()
    derivative = torch.empty_like(values) if with_derivative else None
    kernels.apply_activation(out, derivative, specification(activation, SLOPE, ALPHA))
    return out, derivative


def slope_of(out, derivative, activation):
    """act' as a kernel of the backward has it, for what the forward gave."""
    one = torch.ones(1, 1, dtype=out.dtype).expand(out.numel(), 1)
    saved = out if derivative is None else derivative
    g, _ = kernels.outermost_gradient(
        one, saved[:, None], specification(activation, SLOPE, ALPHA), True, False
    )
    return g[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "identity"])
def test_pointwise_accuracy(activation, dtype):
    """Element by element, near 0, in the tails and at softplus's threshold: 16 units in the last place of the
    value, or of 1/2 for the gelus, whose formula (torch's, too) cancels in the tail: x * (1 + erf)/2."""
    grid = torch.cat([torch.linspace(-30, 30, 1201), torch.logspace(-8, 0, 60), -torch.logspace(-8, 0, 60)])
    x = torch.cat([grid, torch.tensor([0.0, 19.9999, 20.0, 20.0001, 60.0, -60.0, 200.0, -200.0])]).to(dtype)
    exact_x = x.double().requires_grad_()
    exact = EAGER[activation](exact_x)
    (slope,) = torch.autograd.grad(exact.sum(), exact_x)
    eps, floor = torch.finfo(dtype).eps, 0.5 if "gelu" in activation else torch.finfo(dtype).tiny
    got, derivative = through_kernel(x, activation, activation in STORES_DERIVATIVE)
    # For float64 the "exact" side rounds too.
    assert ((got.double() - exact).abs() <= 16 * eps * exact.detach().abs().clamp_min(floor)).all()
    if derivative is None:
        derivative = slope_of(got, None, activation)
    # act' from an output near saturation cancels, so its error is relative to act's largest slope, 1. torch's
    # softplus' jumps to 1 at the threshold, by exp(-20); its gelu_tanh' cancels in float64 as in any dtype.
    tolerance = max(64 * eps if activation == "gelu_tanh" else 16 * eps, 2.1e-9 * (activation == "softplus"))
    assert ((derivative.double() - slope).abs() <= tolerance * slope.abs().clamp_min(1.0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "identity"])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_inputs_of_every_size(activation, dtype):
    """Powers of large ones overflow, activations and derivatives do not."""
    x = numerics.of_every_size(dtype)
    out, derivative = through_kernel(x, activation, activation in STORES_DERIVATIVE)
    # Beyond 10⁴ no derivative changes any more, and torch's own are NaN for the largest numbers.
    bounded = x.double().clamp(-1e4, 1e4).requires_grad_()
    (slope,) = torch.autograd.grad(EAGER[activation](bounded).sum(), bounded)
    tolerance = 8 * torch.finfo(dtype).eps
    for got, true in ((out, EAGER[activation](x.double())), (slope_of(out, derivative, activation), slope)):
        torch.testing.assert_close(got, true.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity(activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0])
    for with_derivative in {False, activation in STORES_DERIVATIVE}:
        got, derivative = through_kernel(x, activation, with_derivative)
        # float64, because torch's float32 gelu is NaN at infinity on some processors.
        want = EAGER[activation](x.double()).float()
        assert torch.equal(got.isnan(), want.isnan()) and torch.allclose(got, want, equal_nan=True)
        assert derivative is None or derivative[0].isnan()
    with tuning.force(*CANDIDATES["fused"]):
        rows = torch.eye(5)
        rows[2, 3] = float("nan")
        spec = specification(activation, SLOPE, ALPHA)
        out, _ = kernels.linear_act(rows, torch.ones(5, 5), None, spec, False)
    assert out.isnan().all(1).tolist() == [False, False, True, False, False]


def test_relu_backward_keeps_infinite_gradients_out_of_the_dead_half():
    grad, out = torch.tensor([[float("inf"), float("inf")]]), torch.tensor([[0.0, 1.0]])
    g, _ = kernels.outermost_gradient(grad, out, "relu", True, False)
    assert g.tolist() == [[0.0, float("inf")]]


# --- choosing ---------------------------------------------------------------------------------------------


def test_unfused_is_the_default_and_float64_always_unfused(monkeypatch):
    ask = ("linear_act", 128, 64, 32)
    cpu = torch.device("cpu")
    assert not tuning.plan(*ask, torch.float32, "ieee", cpu, True).fused
    with tuning.force("fused", SMALL):
        assert tuning.plan(*ask, torch.float32, "ieee", cpu, True) == tuning.Plan(True, SMALL, False)
        assert not tuning.plan(*ask, torch.float64, "ieee", cpu, True).fused
    monkeypatch.setenv("AEFAST_TRITON_CANDIDATE", "fused")
    assert tuning.plan(*ask, torch.float32, "ieee", cpu, True).fused
    monkeypatch.setenv("AEFAST_TRITON_CANDIDATE", "fast")
    with pytest.raises(ValueError, match="AEFAST_TRITON_CANDIDATE"):
        tuning.plan(*ask, torch.float32, "ieee", cpu, True)


def test_tables(tmp_path, monkeypatch):
    key = tuning.row_key("linear_act", 4000, 500, 784, torch.bfloat16, "ieee", True)
    assert key == "linear_act/m4096-n512-k1024/bfloat16/aligned"
    assert tuning.row_key("wgrad", 1, 0, 3, torch.float32, "tf32", False) == "wgrad/m1-n1-k4/float32-tf32/any"
    path = tmp_path / "nested" / "table.json"
    monkeypatch.setenv("AEFAST_TUNED", str(path))
    assert tuning.user_path("NVIDIA H200") == path and tuning.read_table(path, "NVIDIA H200") == {}
    rows = {key: {"candidate": "fused", "tile": str(SMALL), "descriptors": True}}
    tuning.write_table(path, "NVIDIA H200", rows)
    assert tuning.read_table(path, "NVIDIA H200") == rows and tuning.read_table(path, "another") == {}
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    assert Tile.parse(str(SMALL)) == SMALL
    head = {"schema": tuning.SCHEMA, "device": "NVIDIA H200"}
    bad_rows = (
        *({}, {"candidate": "fused"}, {"candidate": "fused", "tile": "64"}),
        {"candidate": "fused", "tile": "96x64-w4-s2"},
        {"candidate": "fused", "tile": str(tuning.TILES_TENSOR[0]), "descriptors": "yes"},
    )
    damaged = (
        *("{", "[]", json.dumps(head), json.dumps({**head, "rows": {key: []}})),
        *(json.dumps({**head, "rows": {key: row}}) for row in bad_rows),
    )
    for text in damaged:
        path.write_text(text)
        with pytest.raises(RuntimeError, match=r"table\.json cannot be read: .*delete it or fix it"):
            tuning.read_table(path, "NVIDIA H200")
    monkeypatch.delenv("AEFAST_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_path("NVIDIA H200") == tmp_path / "aefast" / "tuned" / "nvidia-h200.json"


def test_table_rows_reach_the_plan(tmp_path, monkeypatch):
    """A row decides; the user's row goes before the shipped one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Imaginary 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(tuning, "shipped_path", lambda name: tmp_path / "shipped.json")
    monkeypatch.setenv("AEFAST_TUNED", str(tmp_path / "user.json"))
    key = tuning.row_key("dgrad_act", 512, 256, 128, torch.float16, "ieee", True)
    other = tuning.row_key("wgrad", 512, 256, 128, torch.float16, "ieee", True)
    fused = {"candidate": "fused", "tile": "128x64-w4-s4", "descriptors": True}
    shipped = {key: {"candidate": "unfused"}, other: fused}
    tuning.write_table(tmp_path / "shipped.json", "Imaginary 1", shipped)
    tuning.write_table(tmp_path / "user.json", "Imaginary 1", {key: fused})
    tuning.forget()
    try:
        device = torch.device("cuda", 0)
        for operation in ("dgrad_act", "wgrad"):
            plan = tuning.plan(operation, 500, 260, 128, torch.float16, "ieee", device, True)
            assert plan == tuning.Plan(True, Tile(128, 64, 4, 4), True)
        assert not tuning.plan("dgrad", 500, 260, 128, torch.float16, "ieee", device, True).fused
    finally:
        tuning.forget()


def test_tuning_tries_descriptors_where_there_can_be_any(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary 1")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    tried = []

    def fastest(call, candidates, loads, margin):
        tried.append((len(candidates), loads))
        return {"candidate": "unfused"}

    monkeypatch.setattr(tuning, "_fastest", fastest)
    tuning.tune(
        [(64, 32, 48), (64, 33, 47)],
        (torch.float16,),
        device="cpu",
        operations=("dgrad", "gaussian_head"),
        path=tmp_path / "table.json",
        report=lambda line: None,
    )
    # The second shape is no head's: its outputs are odd in number.
    assert tried == [
        (len(tuning.TILES_TENSOR), (False, True)),
        (len(tuning.TILES_HEAD), (False, True)),
        (1, (False,)),
    ]


def test_tf32_follows_torch(monkeypatch):
    assert kernels.input_precision(torch.float32) == "ieee"
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert kernels.input_precision(torch.float32) == "tf32"
        assert kernels.input_precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
