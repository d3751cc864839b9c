import contextlib
import itertools
import time
import types

import pytest
import torch

from aefast.bench import timing
from aefast.bench.timing import Timing, Variant

CPU = torch.device("cpu")


def test_medians_and_quantiles():
    found = Timing([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.quantile(0.2), found.quantile(0.8), found.quantile(1.0)) == (
        3.0,
        2.0,
        5.0,
        5.0,
    )


def test_times_of_a_call():
    found = timing.interleaved(
        {"short": Variant(lambda index: time.sleep(1e-3)), "long": Variant(lambda index: time.sleep(4e-3))},
        CPU,
        seconds=0.2,
    )
    assert min(found["short"].samples) >= 1e-3
    assert min(found["long"].samples) >= 4e-3
    assert len(found["short"].samples) == len(found["long"].samples) >= 5


def test_rounds_take_turns_in_both_orders():
    order = []
    timing.interleaved(
        {
            name: Variant(lambda index, name=name: order.append((name, index)) or time.sleep(1e-3))
            for name in "ab"
        },
        CPU,
        seconds=0.0,
        least=4,
    )
    # Two rounds of warm-up, then four in turn; each call has the number of its round, to pick its inputs by.
    assert order[4:] == [
        (name, index) for index, pair in enumerate(("ab", "ba", "ab", "ba")) for name in pair
    ]


def test_variants_of_a_round_begin_at_different_sets():
    seen = {}

    def noting(name):
        def call(index):
            seen.setdefault(name, []).append(index % 6)
            time.sleep(1e-3)

        return Variant(call)

    timing.interleaved({name: noting(name) for name in "abc"}, CPU, sets=6, seconds=0.0, least=6)
    # Two rounds of warm-up before the six.
    assert seen["a"] == [0, 1, 0, 1, 2, 3, 4, 5]
    assert [(index + 2) % 6 for index in seen["a"]] == seen["b"]
    assert [(index + 4) % 6 for index in seen["a"]] == seen["c"]


def test_short_calls_are_timed_in_runs():
    seen = []
    found = timing.interleaved({"short": Variant(seen.append)}, CPU, seconds=0.0, least=5)
    runs = [later - earlier for earlier, later in itertools.pairwise(seen[2:])]
    assert len(seen) > 2 + 5 * 20 and set(runs) == {1}
    assert found["short"].median < 1e-5


def test_calls_follow_their_like_for_as_long_as_told():
    order = []
    variants = {
        name: Variant(lambda index, name=name: order.append(name) or time.sleep(1e-3)) for name in "ab"
    }
    timing.interleaved(variants, CPU, seconds=0.0, least=2, run_seconds=50e-3)
    runs = [(name, len(list(run))) for name, run in itertools.groupby(order[4:])]
    # Every round begins with the other one.
    assert [name for name, _ in runs] == ["a", "b", "a"]
    assert runs[1][1] == 2 * runs[0][1] and 2 <= runs[0][1] <= 50


def test_no_more_rounds_than_told():
    found = timing.interleaved({"short": Variant(lambda index: None)}, CPU, seconds=10.0, most=7)
    assert len(found["short"].samples) == 7


def test_calls_are_made_within_their_context():
    inside = []

    @contextlib.contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def call(index):
        assert inside == [True]

    timing.interleaved(
        {"one": Variant(call, context), "other": Variant(lambda index: None)}, CPU, seconds=0.0
    )
    assert inside == []


@pytest.mark.parametrize(
    ("nbytes", "sets"), [(0, 64), (1 << 20, 64), (16 << 20, 6), (40 << 20, 3), (1 << 30, 2)]
)
def test_inputs_exceed_the_cache(nbytes, sets):
    assert timing.input_sets(nbytes, CPU) == sets
    # Until a set's turn comes again, so much else is read; of small ones as many as are kept.
    assert (sets - 1) * nbytes >= 63 << 20 or nbytes < 1 << 20


def test_inputs_exceed_a_gpus_cache_twice(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert timing.input_sets(20 << 20, torch.device("cuda")) == 2 + 6


@pytest.mark.gpu
@pytest.mark.alone
def test_events_time_the_device_and_not_the_host():
    device = torch.device("cuda")
    matrix = torch.ones(4096, 4096, device=device)
    variants = {"product": Variant(lambda index: matrix @ matrix)}
    calls = timing.interleaved(variants, device, seconds=0.2)["product"].median
    # 1.4e11 operations; no device does them in less, and the launch alone takes 10 µs.
    assert 2e-5 < calls < 0.1
    replayed, refused = timing.graph_replays(variants)
    assert refused == {}
    # Between both the device's clock may fall or rise by half. The host's time would be a hundredth, and a graph's that
    # of its twenty calls.
    assert 0.5 < replayed["product"].median / calls < 2.0


@pytest.mark.gpu
def test_what_cannot_be_captured_says_why():
    ones, stream = torch.ones(8, device="cuda"), torch.cuda.current_stream()
    found, refused = timing.graph_replays(
        {"waits": Variant(lambda index: ones.sum().item()), "runs": Variant(lambda index: ones + 1)}
    )
    assert set(found) == {"runs"}
    assert set(refused) == {"waits"} and refused["waits"]
    # And nothing is left of it.
    assert torch.cuda.current_stream() == stream
    assert torch.rand(8, device="cuda").isfinite().all()


def test_replays_without_a_device(monkeypatch):
    """What of graph replay is not the device's: refusals, turns, and a graph's time shared by its calls."""

    class Graph:
        def replay(self):
            time.sleep(4e-3)

    def captured(call, first, calls):
        assert calls == 50
        if call(0) == "waits":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return Graph()

    monkeypatch.setattr(timing, "_captured", captured)
    monkeypatch.setattr(timing, "_run_on_cuda", timing._run_on_cpu)
    found, refused = timing.graph_replays(
        {"runs": Variant(lambda index: None), "waits": Variant(lambda index: "waits")}, sets=50, seconds=0.0
    )
    assert refused == {"waits": "operation not permitted when stream is capturing"}
    assert set(found) == {"runs"}
    # The fastest of five: beside other work a sleep may end late.
    assert 4e-3 <= 50 * min(found["runs"].samples) < 6e-3
