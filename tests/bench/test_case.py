import contextlib
import dataclasses
import importlib
import math

import pytest
import torch

from aefast.bench import case as case_module
from aefast.bench import cases, cli, timing
from aefast.bench.case import Learner, OpCase
from aefast.bench.cases import CASES, epochs, train
from aefast.bench.cases import linear_act as linear_act_cases
from aefast.bench.cases import mlp as mlp_cases
from aefast.bench.ceilings import Ceilings
from aefast.bench.measure import Result, measure
from aefast.bench.timing import Timing
from aefast.bench.variants import Rival, backends, compiled
from aefast.ops import _registry
from aefast.ops._registry import Cost
from aefast.train import replay
from aefast.train.step import CapturedStep

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes=1e10, flops=1e11, exps=1e9)


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


def a_case(activation="tanh", batch=16) -> OpCase:
    return linear_act_cases.case(batch, 8, 4, activation, torch.float32, CPU)


def measured(case, mode, seconds=0.01) -> Result:
    return measure(case, mode, seconds, CEILINGS)


def result(eager: list[float], aefast: list[float], failure: str | None = None, **given) -> Result:
    kind = given.pop("kind", "gelu")
    sizes = {"batch": 8, "inputs": 64, "features": 64, **given}
    timings = {} if failure else {"eager": Timing(eager), "aefast": Timing(aefast)}
    return Result(
        f"linear_act/{kind}-b{sizes['batch']}-fp32-fwd",
        "linear_act",
        kind,
        "fp32",
        "fwd",
        sizes,
        {},
        timings,
        {"eager": 8, "aefast": 4},
        Cost(1, 1, 1),
        1e-6,
        "bytes",
        failure,
    )


@pytest.mark.parametrize("op", CASES)
def test_every_op_is_measured_in_every_mode(op):
    smallest = min(CASES[op](CPU, False), key=lambda case: math.prod(case.sizes.values()))
    case = dataclasses.replace(smallest, is_compiled=False)
    assert case.modes
    for mode in case.modes:
        # Timing has drawn as many numbers as there was time for, and one draw in 160 is beyond the bounds.
        torch.manual_seed(0)
        found = measured(case, mode)
        assert found.failure is None
        assert found.speedup > 0
        assert {"aefast", "eager"} <= set(found.timings) == set(found.errors) == set(found.peak_bytes)
        assert found.id == f"{case.id}-{mode}"
        assert found.floor > 0
        assert found.floor_kind in ("bytes", "flops", "exps")


def test_every_op_has_cases():
    assert {*_registry.OPS, "train", "patch", "epochs"} == set(CASES)


def test_ids_are_unique_and_quick_cases_are_among_all():
    for op, make in CASES.items():
        every = [case.id for case in make(CPU, False)]
        assert len(every) == len(set(every))
        assert {case.id for case in make(CPU, True)} <= set(every), op
    assert "train/autoencoder-784-512-16-b256-fp32" in {case.id for case in CASES["train"](CPU, True)}


def test_targets_on_cuda():
    """Among the quick cases and among all, each once; of quick ones they alone are compiled."""
    device = torch.device("cuda")
    named = {case.id: case.is_compiled for case in train.targets(device)}
    assert named == {
        f"train/{model}-784-512-16-b{batch}-{dtype}": is_compiled
        for dtype in ("bf16", "fp32")
        for model, batch, is_compiled in (
            *(("vae", 256, True), ("vae", 4096, False), ("vae", 65536, False)),
            *(("infovae", 256, False), ("infovae", 4096, True)),
        )
    }
    for quick in (True, False):
        found = list(train.cases(device, quick))
        ids = [case.id for case in found]
        assert len(ids) == len(set(ids))
        assert ids[: len(named)] == list(named)
        compiled_ids = {case.id for case in found if case.is_compiled}
        chosen = {id for id, is_compiled in named.items() if is_compiled}
        assert compiled_ids & set(named) == chosen
        assert (compiled_ids == chosen) == quick


def test_epochs_on_cuda_have_batches_of_one_size():
    """One of another size would be compiled as well."""
    for case in epochs.cases(torch.device("cuda"), False):
        assert not case.is_compiled or case.sizes["samples"] % case.sizes["batch"] == 0
    assert not any(case.is_compiled for case in epochs.cases(torch.device("cuda"), True))
    assert [case.sizes["samples"] for case in epochs.cases(CPU, True)] == [20_000]


def test_half_precision_where_it_has_instructions():
    dtypes = {case.dtype for case in CASES["linear_act"](torch.device("cuda"), True)}
    assert dtypes == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_a_wrong_result_is_not_timed(mode):
    case = a_case()
    case = dataclasses.replace(case, aefast=lambda *inputs: case.eager(*inputs) * (1 + 1e-5))
    found = measured(case, mode)
    assert found.failure.startswith("aefast: wrong: errors 1")
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

    case = dataclasses.replace(a_case(), aefast=Detached.apply)
    assert measured(case, "fwd").failure is None
    assert measured(case, "fwdbwd").failure is not None


def test_nan_is_wrong():
    case = dataclasses.replace(a_case(), aefast=lambda x, weight, bias: (x @ weight.t()) * float("nan"))
    assert "inf" in measured(case, "fwd").failure


def test_another_shape_is_wrong():
    case = dataclasses.replace(a_case(), aefast=lambda x, weight, bias: x[:, :1] @ weight[:1, :1])
    assert "inf" in measured(case, "fwd").failure


@pytest.mark.parametrize(
    "case",
    [a_case("relu"), mlp_cases.case(16, (8, 4, 4), "relu", torch.float32, CPU)],
    ids=lambda case: case.op,
)
def test_rounding_at_a_kink_is_nobodys_error(case):
    """A variant that is off by less than rounding passes although it takes the kink's other side."""
    make = case.make

    def at_the_kink():
        inputs = make()
        with torch.no_grad():
            inputs[0][0].zero_()
            for bias in (tensor for tensor in inputs if tensor.dim() == 1):
                bias.zero_()
        return inputs

    def shifted(x, *parameters):
        return case.eager(x + 1e-8, *parameters)

    case = dataclasses.replace(case, make=at_the_kink, aefast=shifted)
    assert measured(case, "fwdbwd").failure is None
    blind = dataclasses.replace(case, kinks=None)
    assert measured(blind, "fwdbwd").failure is not None


def with_rivals(case, **rivals):
    return dataclasses.replace(case, rivals=rivals)


def test_a_rival_takes_part():
    case = a_case()
    found = measured(with_rivals(case, torch=Rival("torch", lambda: case.eager)), "fwdbwd")
    assert set(found.timings) == {"aefast", "eager", "torch"}
    assert found.missing == {}
    assert found.speedup_over("torch") > 0


@pytest.mark.parametrize(
    ("rival", "reason"),
    [
        (Rival("no_such_package", lambda: None), "no_such_package is not installed"),
        (Rival("torch", lambda: None, ("fwdbwd",)), "torch has no fwd"),
        (Rival("torch", lambda: None, refuses=lambda device, dtype: f"not on {device}"), "not on cpu"),
        (
            Rival("torch", lambda: importlib.import_module("torch.no_such_module")),
            "ModuleNotFoundError: No module",
        ),
        (Rival("torch", lambda: lambda x, w, b: x @ x), "RuntimeError: "),
        (Rival("torch", lambda: lambda x, w, b: torch.tanh(x @ w.t())), "wrong: errors "),
    ],
)
def test_a_missing_rival_says_why(rival, reason):
    found = measured(with_rivals(a_case(), rival=rival), "fwd")
    assert found.failure is None
    assert set(found.timings) == {"aefast", "eager"}
    assert found.missing["rival"].startswith(reason)


def test_a_sloppy_rival_is_timed_and_its_error_told():
    case = a_case()
    rival = Rival("torch", lambda: lambda *inputs: case.eager(*inputs) * (1 + 1e-5))
    found = measured(with_rivals(case, rival=rival), "fwd")
    assert "rival" in found.timings
    assert found.errors["rival"] > 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", [a_case(), train.autoencoder(8, 16, 8, 2, torch.float32, CPU)])
def test_compiled_code_takes_part(case):
    found = measured(dataclasses.replace(case, is_compiled=True), case.modes[-1])
    assert found.missing.get("pythae", "") in ("", "pythae is not installed")
    assert "compile" in found.timings


def test_a_backend_of_its_own_is_a_variant_of_its_own(monkeypatch):
    assert list(backends("linear_act", CPU, torch.float32)) == ["aefast"]
    second = dataclasses.replace(_registry._BY_NAME["cpu"], name="second")
    monkeypatch.setattr(_registry, "BACKENDS", (*_registry.BACKENDS[:3], second, _registry.BACKENDS[3]))
    monkeypatch.setitem(_registry._BY_NAME, "second", second)
    assert list(backends("linear_act", CPU, torch.float32)) == ["aefast", "aefast[second]"]
    with _registry.backend("cpu"):
        assert list(backends("linear_act", CPU, torch.float32)) == ["aefast"]


def test_variants_run_on_their_backend():
    seen = []
    case = a_case()

    def aefast(*inputs):
        seen.append(_registry.requested())
        return case.aefast(*inputs)

    with _registry.backend("cpu"):
        measured(dataclasses.replace(case, aefast=aefast), "fwd")
    assert set(seen) == {"cpu"}


def test_calls_go_through_all_sets_of_inputs(monkeypatch):
    monkeypatch.setattr(timing, "MOST_SETS", 6)
    seen = []
    case = a_case()

    def noting(*inputs):
        seen.append(inputs[0].data_ptr())
        return case.eager(*inputs)

    trial = dataclasses.replace(case, aefast=noting).trial("fwd")
    seen.clear()
    for index in range(12):
        trial.timed["aefast"].call(index)
    assert trial.sets == 6
    assert len(set(seen[:6])) == 6 and seen[:6] == seen[6:]


def test_training_is_checked_by_its_gradients(monkeypatch):
    case = train.autoencoder(64, 16, 8, 2, torch.float32, CPU)
    found = measured(case, "step")
    assert found.failure is None
    assert found.errors["aefast"] < 1e-5

    fused = case_module._fused

    def wrong(make_model, like):
        learner = fused(make_model, like)
        return dataclasses.replace(learner, loss=lambda batch: learner.loss(batch) * (1 + 1e-5))

    monkeypatch.setattr(case_module, "_fused", wrong)
    # The loss is off, the gradients are those of the step.
    assert measured(case, "step").failure.startswith("aefast: wrong")


def test_a_step_that_does_nothing_is_no_step(monkeypatch):
    monkeypatch.setattr(CapturedStep, "__call__", lambda self, batch: {"loss": torch.zeros(())})
    found = measured(train.autoencoder(64, 16, 8, 2, torch.float32, CPU), "step")
    assert (found.failure, found.timings) == ("aefast: RuntimeError: the step updates no parameter", {})


def test_a_step_with_wrong_gradients_is_wrong(monkeypatch):
    step = CapturedStep.__call__

    def wrong(self, batch):
        terms = step(self, batch)
        self.model.encoder.layers[0].weight.grad *= 1 + 1e-4
        return terms

    monkeypatch.setattr(CapturedStep, "__call__", wrong)
    found = measured(train.autoencoder(64, 16, 8, 2, torch.float32, CPU), "step")
    assert found.failure.startswith("aefast: wrong")


def test_a_recorded_step_with_wrong_gradients_is_wrong(monkeypatch):
    """Those that are timed are recorded."""

    def wrong(self, batch):
        terms, gradients = recorded(self, batch)
        return terms, [gradient * (1 + 1e-4) for gradient in gradients]

    recorded = replay._Recorded.__call__
    monkeypatch.setattr(replay._Recorded, "__call__", wrong)
    found = measured(train.autoencoder(64, 16, 8, 2, torch.float32, CPU), "step")
    assert found.failure.startswith("aefast: wrong")


def test_timed_steps_are_recorded_before_the_clock_starts(monkeypatch):
    """On noise of their own."""
    normals, replays = torch.randn_like, []
    recorded = replay._Recorded.__call__

    def noting(self, batch):
        replays.append(torch.randn_like is normals)
        return recorded(self, batch)

    trial = train.vae(64, 16, 8, 2, torch.float32, CPU).trial("step")
    monkeypatch.setattr(replay._Recorded, "__call__", noting)
    trial.timed["aefast"].call(0)
    assert replays == [True]


@pytest.fixture
def trial_as_on_cuda(monkeypatch):
    """The trial of a step whose device is called CUDA, with what torch.compile makes of a loss."""

    def trial(compiled):
        batch = lambda self: torch.rand(8, 16)  # noqa: E731
        monkeypatch.setattr(case_module.TrainingCase, "_batch", batch)
        ours = {"aefast": contextlib.nullcontext}
        monkeypatch.setattr(case_module.variants, "backends", lambda op, device, dtype: ours)
        monkeypatch.setattr(case_module.variants, "compiled", compiled)
        monkeypatch.setattr(timing, "input_sets", lambda nbytes, device: 2)
        case = train.vae(8, 16, 8, 2, torch.float32, CPU)
        return dataclasses.replace(case, device=torch.device("cuda"), is_compiled=True).trial("step")

    return trial


def test_steps_on_cuda_are_compiled_without_graphs_and_with_them(trial_as_on_cuda):
    asked = []

    def compiled(loss, device, has_graphs=False):
        asked.append(has_graphs)
        return loss

    trial = trial_as_on_cuda(compiled)
    assert asked == [False, True]
    assert trial.missing == {}
    assert set(trial.timed) == {"aefast", "eager", "compile", "compile, CUDA graphs"}
    assert trial.least_rounds == 15
    for found in trial.found.values():
        torch.testing.assert_close(found, [one.float() for one in trial.truth], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("calls", [0, case_module.GRAPH_WARM_UP_STEPS + 1])
def test_graphs_that_fail_are_missing_with_their_reason(trial_as_on_cuda, calls):
    """In the check, or in the steps behind it."""
    seen = []

    def compiled(loss, device, has_graphs=False):
        def failing(batch):
            seen.append(has_graphs)
            if sum(seen) > calls:
                raise RuntimeError("output of CUDAGraphs has been overwritten\nand more")
            return loss(batch)

        return failing

    trial = trial_as_on_cuda(compiled)
    reason = "RuntimeError: output of CUDAGraphs has been overwritten"
    assert trial.missing == {"compile, CUDA graphs": reason}
    assert set(trial.timed) == {"aefast", "eager", "compile"}


@pytest.mark.parametrize(
    ("device", "has_graphs", "mode"),
    [
        ("cpu", False, None),
        ("cuda", False, "max-autotune-no-cudagraphs"),
        ("cuda", True, "max-autotune"),
    ],
)
def test_modes_of_torch_compile(device, has_graphs, mode, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: options["mode"])
    assert compiled(torch.sin, torch.device(device), has_graphs) == mode


def test_a_trial_says_how_many_rounds_it_takes_at_least():
    case = a_case()
    trial = dataclasses.replace(case.trial("fwd"), least_rounds=9)

    class Prepared(OpCase):
        def trial(self, mode):
            return trial

    fields = {one.name: getattr(case, one.name) for one in dataclasses.fields(case)}
    assert len(measured(Prepared(**fields), "fwd", seconds=0.0).timings["eager"].samples) == 9


def test_eager_code_that_loses_digits_is_no_measure():
    case = a_case()

    def inexact(x, weight, bias):
        exact = case.eager(x, weight, bias)
        return exact if x.dtype == torch.float64 else exact * (1 + 1e-3)

    found = measured(dataclasses.replace(case, eager=inexact, eager_forward=None), "fwd")
    assert found.failure.startswith("eager: wrong") and found.timings == {}


def a_half_precision_stack(aefast=None):
    case = mlp_cases.case(256, (64, 32, 32, 64), "relu", torch.bfloat16, CPU)
    return case if aefast is None else dataclasses.replace(case, aefast=aefast)


def test_half_precision_at_kinks_is_held_by_norms():
    """Rounding to bfloat16 puts units of the second layer on the other side of the kink, on all sides alike."""
    assert measured(a_half_precision_stack(), "fwdbwd").failure is None

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.2

    eager = a_half_precision_stack().eager
    found = measured(a_half_precision_stack(lambda x, *rest: eager(Scaled.apply(x), *rest)), "fwdbwd")
    assert found.failure.startswith("aefast: wrong")


def test_results_have_the_dtype_of_eagers():
    eager = a_half_precision_stack().eager
    found = measured(a_half_precision_stack(lambda *inputs: eager(*inputs).float()), "fwd")
    assert found.failure == "aefast: wrong: results of torch.float32"


@pytest.mark.parametrize("activation", linear_act_cases.ACTIVATIONS)
def test_eager_forward_is_the_same_function(activation):
    for case in (a_case(activation), mlp_cases.case(16, (8, 4, 8), activation, torch.float32, CPU)):
        inputs = [tensor.detach() for tensor in case.make()]
        assert torch.equal(case.eager(*inputs), case.eager_forward(*inputs))


def test_a_kernel_that_raises_fails_its_case():
    def raising(*inputs):
        raise RuntimeError("launch failed\nat length")

    found = measured(dataclasses.replace(a_case(), aefast=raising), "fwd")
    assert (found.failure, found.timings, found.speedup) == ("aefast: RuntimeError: launch failed", {}, None)


def test_learner_steps():
    layer = torch.nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    learner = Learner.of_loss(layer.parameters(), lambda batch: layer(batch).square().mean())
    loss, *gradients = learner.results(torch.ones(2, 3))
    assert [one.shape for one in gradients] == [(3, 3), (3,)]
    # Adam's first step has the length of the learning rate in every coordinate.
    assert torch.allclose(before - layer.weight, 1e-3 * gradients[0].sign(), atol=1e-6)
    assert loss > 0


def test_cost_of_a_step():
    cost = train.step_cost(10, [(3, 2), (2, 3)], torch.float32, 3)
    parameters = 3 * 2 + 2 + 2 * 3 + 3
    assert cost.flops == 2 * 10 * (3 * (6 + 6) - 6)
    assert cost.bytes == 4 * (2 * 30 + 2 * (20 + 30) + 10 * parameters)
    assert cost.exps == 30


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
    slow = result([1e-3] * 50, [1.25e-3] * 50, kind="relu", batch=1)
    fast = result([1e-3] * 50, [0.5e-3] * 50)
    short = result([10e-6] * 50, [13e-6] * 50)
    lines = cli.summary([slow, fast, short, result([1.0], [1e-9], failure="wrong")])
    assert lines == [
        "linear_act fwd: 2 cases of eager ≥ 50 µs, median 1.40×, 1 below 0.97× with 95 % confidence,"
        " worst 0.80× (0.80 to 0.80: linear_act/relu-b1-fp32-fwd); overhead on 1 shorter ones: at most 3.0 µs",
        "  inputs ≤ 256: gelu 2.00×; together median 2.00× of 1 cases",
    ]
    stack = dataclasses.replace(fast, op="mlp", timings={**fast.timings, "aefast": Timing([0.25e-3] * 50)})
    assert cli.summary([fast, stack])[-1] == (
        "gelu, silu, tanh at inputs ≤ 256, all ops and modes: median 3.00× of 2 cases"
    )


def test_a_file_of_cases_is_all_that_an_op_needs(tmp_path, monkeypatch):
    (tmp_path / "new_op.py").write_text("def cases(device, quick):\n    yield 'a case'\n")
    monkeypatch.setattr(cases, "__path__", [*cases.__path__, str(tmp_path)])
    found = cases.find()
    assert list(found["new_op"](CPU, True)) == ["a case"]
    assert set(found) == {*CASES, "new_op"}
