import dataclasses

import pytest
import torch

from aefast.bench import cli
from aefast.bench.case import MODES, Case, Result, measure
from aefast.bench.cases import CASES
from aefast.bench.cases import linear_act as linear_act_cases
from aefast.bench.ceilings import Ceilings
from aefast.bench.timing import Timing

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes=1e10, flops=1e11, exps=1e9)


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


def a_case(activation="tanh", batch=16):
    return linear_act_cases.case(batch, 8, 4, activation, CPU)


def with_variant(case: Case, name: str, function) -> Case:
    return dataclasses.replace(case, variants={**case.variants, name: function})


def result(eager: list[float], aefast: list[float], failure: str | None = None, **labels) -> Result:
    labels = {"activation": "gelu", "batch": 8, "inputs": 64, "features": 64, **labels}
    timings = {"eager": Timing(eager), "aefast": Timing(aefast)}
    peak_bytes = {"eager": 8, "aefast": 4}
    return Result(
        "linear_act/x-fwd", "linear_act", "fwd", labels, {}, timings, peak_bytes, 1e-6, "bytes", failure
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", CASES)
def test_every_op_is_measured_in_every_mode(op, mode):
    case = next(iter(CASES[op](CPU, True)))
    found = measure(case, mode, seconds=0.01, ceilings=CEILINGS)
    assert found.failure is None
    assert found.speedup > 0
    assert set(found.timings) == set(found.errors) == {"aefast", "eager"}
    assert found.id == f"{case.id}-{mode}"
    assert found.floor > 0
    assert found.floor_kind in ("bytes", "flops", "exps")


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_result_is_not_timed(mode):
    case = a_case()
    case = with_variant(case, "aefast", lambda *inputs: case.variants["eager"](*inputs) * (1 + 1e-5))
    found = measure(case, mode, seconds=0.01, ceilings=CEILINGS)
    assert found.failure.startswith("aefast: errors 1")
    assert (found.timings, found.speedup, found.overhead, found.speedup_interval) == ({}, None, None, None)


def test_a_wrong_gradient_is_not_timed():
    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight, bias)
            return torch.tanh(torch.nn.functional.linear(x, weight, bias))

        @staticmethod
        def backward(ctx, grad):
            return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)

    case = with_variant(a_case(), "aefast", Detached.apply)
    assert measure(case, "fwd", seconds=0.01, ceilings=CEILINGS).failure is None
    assert measure(case, "fwdbwd", seconds=0.01, ceilings=CEILINGS).failure is not None


def test_nan_is_wrong():
    case = with_variant(a_case(), "aefast", lambda x, weight, bias: (x @ weight.t()) * float("nan"))
    assert "inf" in measure(case, "fwd", seconds=0.01, ceilings=CEILINGS).failure


@pytest.mark.parametrize(("op", "batch"), [("linear_act", 16), ("mlp", 16)])
def test_rounding_at_a_kink_is_nobodys_error(op, batch):
    """A variant that is off by less than rounding passes although it takes the kink's other side."""
    if op == "linear_act":
        case = a_case("relu", batch)
    else:
        from aefast.bench.cases import mlp

        case = mlp.case(batch, (8, 4, 4), "relu", CPU)
    make = case.make

    def at_the_kink():
        inputs = make()
        with torch.no_grad():
            first = inputs[0]
            first[0].zero_()
            for bias in (tensor for tensor in inputs if tensor.dim() == 1):
                bias.zero_()
        return inputs

    def shifted(x, *parameters):
        return case.variants["eager"](x + 1e-8, *parameters)

    case = dataclasses.replace(case, make=at_the_kink)
    case = with_variant(case, "aefast", shifted)
    assert measure(case, "fwdbwd", seconds=0.01, ceilings=CEILINGS).failure is None
    blind = dataclasses.replace(case, kinks=None)
    assert measure(blind, "fwdbwd", seconds=0.01, ceilings=CEILINGS).failure is not None


def test_interval_of_paired_rounds():
    # Both sides slow down together in half of the rounds: the ratio does not move.
    eager = [2e-3, 6e-3] * 20
    low, high = result(eager, [seconds / 2 for seconds in eager]).speedup_interval
    assert (low, high) == pytest.approx((2.0, 2.0))
    ratios = [1.0 + 0.01 * index for index in range(101)]
    low, high = result([1e-3 * ratio for ratio in ratios], [1e-3] * 101).speedup_interval
    assert low == pytest.approx(1.40, abs=0.011)
    assert high == pytest.approx(1.61, abs=0.011)


def test_summary():
    slow = result([1e-3] * 50, [1.25e-3] * 50, activation="relu", batch=1)
    fast = result([1e-3] * 50, [0.5e-3] * 50)
    short = result([10e-6] * 50, [13e-6] * 50)
    lines = cli.summary([slow, fast, short, result([1.0], [1e-9], failure="wrong")])
    assert lines[0] == (
        "linear_act fwd: 2 cases of eager ≥ 50 µs, median 1.40×, 1 below 0.97× with 95 % confidence,"
        " worst 0.80× (0.80 to 0.80: relu, batch 1, 64 → 64); overhead on 1 shorter ones: at most 3.0 µs"
    )
    assert lines[1] == "  gelu, inputs ≤ 256: median 2.00× of 1 cases"
