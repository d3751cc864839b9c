import dataclasses
import subprocess
import types

import pytest
import torch

from aefast import _library
from aefast.bench import ceilings, memory
from aefast.bench.ceilings import Ceilings
from aefast.ops._registry import OPS, Cost

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["bytes", "flops", "exps"])
def test_floor_is_that_of_the_busiest(kind):
    limits = Ceilings(bytes=1e9, flops=1e9, exps=1e9)
    cost = dataclasses.replace(Cost(bytes=1, flops=1, exps=1), **{kind: 1000})
    assert limits.floor(cost) == (pytest.approx(1e-6), kind)
    double = dataclasses.replace(cost, **{kind: 2000})
    assert limits.floor(double) == (pytest.approx(2e-6), kind)


def test_measured_ceilings():
    found = ceilings.measure(CPU, seconds=0.05)
    # Any machine of this century, however busy, and none yet.
    assert 1e7 < found.bytes < 1e13
    assert 1e8 < found.flops < 1e15
    assert 1e5 < found.exps < 1e13


@pytest.mark.parametrize(
    ("properties", "told", "clock"),
    [
        ({"clock_rate": 1_980_000}, None, 1.98e9),
        ({"uuid": "a-b"}, "1980\n", 1.98e9),
        ({"uuid": "a-b"}, "[N/A]\n", ceilings.FASTEST_CLOCK),
        ({"uuid": "a-b"}, FileNotFoundError("nvidia-smi"), ceilings.FASTEST_CLOCK),
        ({}, subprocess.CalledProcessError(6, "nvidia-smi"), ceilings.FASTEST_CLOCK),
    ],
)
def test_clock_of_a_gpu(properties, told, clock, monkeypatch):
    """CUDA 13 does not tell it; and nothing that fails on the way costs the benchmark."""

    def answer(command, **options):
        assert command[0] == "nvidia-smi"
        if isinstance(told, Exception):
            raise told
        return types.SimpleNamespace(stdout=told)

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**properties)
    )
    monkeypatch.setattr(subprocess, "run", answer)
    assert ceilings._clock(torch.device("cuda")) == pytest.approx(clock)


def test_cost_of_a_dense_layer():
    x, weight, bias = torch.empty(10, 3), torch.empty(5, 3), torch.empty(5)
    cost = OPS["linear_act"].cost
    assert cost(False, x, weight, bias, "gelu") == Cost(4 * (30 + 15 + 5 + 50), 2 * 10 * 3 * 5, 50)
    # Forward with act' stored; backward: gradient, act', x and weight in, three gradients out.
    backward = 4 * (30 + 15 + 5 + 2 * 50) + 4 * (2 * 50 + 30 + 15) + 4 * (30 + 15 + 5)
    assert cost(True, x, weight, bias, "gelu") == Cost(backward, 3 * 2 * 10 * 3 * 5, 50)
    assert cost(False, x, weight, None, "relu") == Cost(4 * (30 + 15 + 50), 2 * 10 * 3 * 5, 0)


def test_a_stack_of_one_costs_what_its_layer_does():
    x, weight, bias = torch.empty(10, 3), torch.empty(5, 3), torch.empty(5)
    for activation in ("identity", "relu", "silu", "softplus"):
        for backward in (False, True):
            layer = OPS["linear_act"].cost(backward, x, weight, bias, activation)
            assert OPS["mlp"].cost(backward, x, [weight], [bias], [activation]) == layer


def test_a_stack_saves_memory_traffic_between_layers():
    x, weights = torch.empty(10, 3), [torch.empty(7, 3), torch.empty(5, 7)]
    whole = OPS["mlp"].cost(False, x, weights, [None, None], ["relu", "relu"])
    first = OPS["linear_act"].cost(False, x, weights[0], None, "relu")
    second = OPS["linear_act"].cost(False, torch.empty(10, 7), weights[1], None, "relu")
    assert whole.flops == first.flops + second.flops
    assert whole.bytes == first.bytes + second.bytes - 2 * 4 * 70


def test_peak_memory_counts_what_is_held_at_once():
    def call(index):
        torch.ones(1000)
        return torch.ones(2000) + torch.ones(3000)[:2000]

    # Two operands of 8 and 12 kB and the result of 8; the first tensor is gone by then.
    assert memory.peak_bytes(call, CPU) == pytest.approx(28_000, abs=100)


def test_what_a_call_releases_is_none_of_its_memory():
    weight = torch.nn.Parameter(torch.ones(1000))

    def step(index):
        weight.grad = None
        (weight * 2).sum().backward()

    first, second = (memory.peak_bytes(step, CPU) for _ in range(2))
    assert first == second >= 4_000


def test_peak_memory_sees_the_kernels_own():
    assert _library.load("cpu") is None
    x, weight = torch.ones(64, 512), torch.ones(512, 512)
    ours = memory.peak_bytes(lambda index: torch.ops.aefast.linear_act(x, weight, None, "relu", "cpu"), CPU)
    assert ours >= 64 * 512 * 4
