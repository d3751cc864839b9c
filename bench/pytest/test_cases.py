"""The quick cases under pytest-benchmark, for its comparison and its history: ``pytest bench/``.

``pytest bench/ -k "mlp and gelu" --benchmark-autosave --benchmark-compare``. Each variant is timed by itself here; in
``aefast bench`` they take turns, which is what ratios between them should be taken from.
"""

import dataclasses

import pytest
import torch

from aefast.bench import timing
from aefast.bench.cases import CASES
from aefast.bench.measure import wrong

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
TRIALS = [
    pytest.param(case, mode, id=f"{device.type}-{case.id}-{mode}")
    for device in DEVICES
    for cases in CASES.values()
    for case in cases(device, True)
    for mode in case.modes
]


@pytest.mark.benchmark(max_time=0.1, min_rounds=5)
@pytest.mark.parametrize("name", ["aefast", "eager", "compile"])
@pytest.mark.parametrize(("case", "mode"), TRIALS)
def test_speed(case, mode, name, benchmark):
    if name == "compile" and not case.is_compiled:
        pytest.skip("torch.compile takes seconds a shape, and takes part in fewer")
    # Compiled code of earlier shapes would count towards the number that torch.compile makes of one function.
    torch.compiler.reset()
    torch.manual_seed(0)
    trial = dataclasses.replace(case, is_compiled=name == "compile").trial(mode)
    if name not in trial.timed:
        pytest.skip(trial.missing[name])
    reasons = wrong(trial, case.dtype)
    assert name not in reasons, reasons[name]
    variant = trial.timed[name]
    repetition = iter(range(1 << 62))

    def call():
        variant.call(next(repetition))
        timing.synchronize(case.device)

    benchmark.group = f"{case.id}-{mode}"
    benchmark.extra_info["floor_seconds_of"] = {"bytes": trial.cost.bytes, "flops": trial.cost.flops}
    with variant.context():
        benchmark(call)
