import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aefast.bench import projection, scaling
from aefast.bench.projection import H200, NETWORKS, Network
from aefast.errors import InputError
from aefast.models import Autoencoder
from support.processes import environment, prepared, run

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WORLDS = (1, 2, 3, 8, 16, 24, 64, 512)
# One where nothing but the named figures costs anything.
IDEAL = dataclasses.replace(H200, latency=0.0, efficiency=1.0, host=0.0, bandwidth=math.inf)


# Formulae.


def ring_all_reduce(world, chunks):
    """Sums lists of `world` chunks around a ring; the result on each rank, and the chunks that each has sent."""
    held = [list(values) for values in chunks]
    sent = [0] * world
    for phase in (0, 1):
        for turn in range(world - 1):
            # In the first phase a chunk is added on its way; then the finished ones are handed around.
            messages = [
                (rank, (rank + phase - turn) % world, held[rank][(rank + phase - turn) % world])
                for rank in range(world)
            ]
            for rank, place, value in messages:
                neighbour = (rank + 1) % world
                held[neighbour][place] = value if phase else held[neighbour][place] + value
                sent[rank] += 1
    return held, sent


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_all_reduce_traffic_is_that_of_a_ring(world):
    chunks = [[rank * 10 + place for place in range(world)] for rank in range(world)]
    held, sent = ring_all_reduce(world, chunks)
    sums = [sum(column) for column in zip(*chunks, strict=True)]
    assert held == [sums] * world
    chunk_bytes = 12
    assert [count * chunk_bytes for count in sent] == [
        pytest.approx(projection.all_reduce_bytes(world, world * chunk_bytes))
    ] * world


@pytest.mark.parametrize("world", [w for w in WORLDS if w <= 64])
def test_mmd_pairs_and_gathered_codes_by_counting(world):
    batch = 3
    everybody = [(rank, row) for rank in range(world) for row in range(batch)]
    own = [code for code in everybody if code[0] == 0]
    assert projection.mmd_pairs(world, batch, 1) == sum(1 for _ in own for _ in everybody)
    assert projection.mmd_pairs(world, batch, 3) == 3 * len(own) * len(everybody)
    received = sum(20 for code in everybody if code[0] != 0)
    assert projection.all_gather_bytes(world, batch * 20) == received


def test_bytes_and_steps():
    assert projection.bytes_per_epoch(10**9, 784, 1) == 784 * 10**9
    assert projection.bytes_per_epoch(10**9, 784, 4) == 3136 * 10**9
    # 1,000 samples in batches of 2 × 30: 16 full ones and one of 40.
    assert projection.step_count(1000, 1, 2, 30) == 17
    assert projection.step_count(1000, 5, 2, 30) == 85
    assert projection.transfer_seconds(3, 100, 0.5, 50) == 3.5


@pytest.mark.parametrize("encoder", [(784, 512, 16), (20, 7, 5, 3), (4, 2)])
def test_parameters_and_operations_are_the_models(encoder):
    network = Network("", encoder)
    model = Autoencoder(input_size=encoder[0], hidden=encoder[1:-1], latent=encoder[-1])
    assert network.parameters == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        x = torch.rand(16, encoder[0], requires_grad=True)
        model.eager_loss(model.eager_twin(), x).backward()
    biases = sum(outputs for _, outputs in network.layers)
    assert counter.get_total_flops() == projection.step_flops(network.parameters - biases, 16)


def test_a_variational_encoder_has_two_heads():
    network = Network("", (784, 512, 16), heads=2)
    assert network.parameters == 784 * 512 + 512 + 512 * 32 + 32 + 16 * 512 + 512 + 512 * 784 + 784
    assert network.activations == 784 + 512 + 32 + 512 + 784


@pytest.mark.parametrize("world", WORLDS)
def test_hierarchical_transfers_move_as_much_as_flat_ones(world):
    """With all links of one speed and no latency only the bytes count."""
    flat = dataclasses.replace(IDEAL, nvlink=1.0, network=1.0)
    assert projection.all_reduce_seconds(world, 10**6, flat) == pytest.approx(
        projection.all_reduce_bytes(world, 10**6)
    )
    assert projection.all_gather_seconds(world, 10**6, flat) == projection.all_gather_bytes(world, 10**6)


def test_transfers_by_hand():
    hardware = dataclasses.replace(H200, latency=1.0, nvlink=10.0, network=2.0)
    # 8 GPUs: 14 messages, 2·7/8·80 bytes by NVLink. 4 nodes of them: 6 messages more, and 2·3/4·10 bytes.
    assert projection.all_reduce_seconds(8, 80, hardware) == pytest.approx(14 + 14)
    assert projection.all_reduce_seconds(32, 80, hardware) == pytest.approx(14 + 14 + 6 + 7.5)
    # 3 blocks from other nodes, then 7 times the 4 blocks of a GPU.
    assert projection.all_gather_seconds(32, 80, hardware) == pytest.approx(3 + 120 + 7 + 224)


def test_everything_grows():
    for network in NETWORKS:
        for smaller, larger in itertools.pairwise(WORLDS):
            before, after = (projection.project(network, world, 1024) for world in (smaller, larger))
            assert after.reduce > before.reduce
            assert after.gather >= before.gather
            assert after.mmd >= before.mmd
            assert after.overlapped >= before.overlapped
        for batch in (1, 64, 4096):
            before, after = (projection.project(network, 8, size) for size in (batch, 2 * batch))
            assert after.dense == pytest.approx(2 * before.dense)
            assert after.mmd == pytest.approx(4 * before.mmd)
            assert after.reduce == before.reduce


def test_step_by_hand():
    step = projection.Step(host=1.0, dense=6.0, update=1.0, mmd=2.0, gather=0.5, reduce=5.0)
    assert (step.device, step.communication, step.serial) == (9.0, 5.5, 14.5)
    # The backward takes 4 of the dense 6.
    assert step.exposed == pytest.approx(1.0)
    assert step.overlapped == pytest.approx(10.5)
    assert step.bound == "dense"
    assert dataclasses.replace(step, reduce=3.0).overlapped == pytest.approx(9.5)
    assert dataclasses.replace(step, reduce=30.0).bound == "all-reduce"
    assert dataclasses.replace(step, host=20.0).bound == "host"
    assert dataclasses.replace(step, host=20.0).serial == 20.0


# Where curves cross.


@pytest.mark.parametrize("threshold", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_smallest(threshold):
    assert projection.smallest(lambda number: number >= threshold, 1000) == threshold


def test_smallest_of_none():
    assert projection.smallest(lambda number: False, 1000) is None


def worlds():
    yield from range(1, H200.gpus)
    number = H200.gpus
    while True:
        yield number
        number += H200.gpus


@pytest.mark.parametrize("batch", [256, 4096])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.label)
def test_communication_overtakes_where_it_is_said(network, batch):
    for world in worlds():
        step = projection.project(network, world, batch)
        if step.communication > step.dense + step.update:
            break
    assert projection.bound_world(network, batch) == world
    if network.blocks:
        dense, nbytes = projection.dense_seconds(network, batch), batch * network.latent * 4
        first = next(world for world in worlds() if projection.all_gather_seconds(world, nbytes) > dense)
        assert projection.gather_world(network, batch) == first


@pytest.mark.parametrize("world", [8, 512])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.label)
def test_the_batch_that_hides_the_all_reduce(network, world):
    batch = projection.hiding_batch(network, world)
    assert projection.project(network, world, batch).exposed == 0
    assert projection.project(network, world, batch - 1).exposed > 0


def test_the_batch_that_hides_the_all_reduce_has_a_closed_form():
    for network in NETWORKS:
        for gradient_bytes in (2, 4):
            expected = 7 / 8 * gradient_bytes / 2 * IDEAL.flops / IDEAL.nvlink
            found = projection.hiding_batch(network, 8, IDEAL, gradient_bytes)
            assert found == math.ceil(expected)


def test_mmd_overtakes_the_dense_step_where_it_is_said():
    for network in NETWORKS:
        critical = projection.mmd_global_batch(network)
        if not network.blocks:
            assert critical is None
            continue
        for world in (1, 8, 64):
            below, above = (int(critical / world * factor) for factor in (0.99, 1.01))
            step = projection.project(network, world, below)
            assert step.mmd < step.dense
            step = projection.project(network, world, above)
            assert step.mmd > step.dense


def test_what_the_page_says_of_the_projection():
    small, large = Network("", projection.SMALL), Network("", projection.LARGE)
    info = Network("", projection.LARGE, heads=2, blocks=3)
    batch, total = scaling.RANK_BATCH, scaling.GLOBAL_BATCH
    for world in (1, 8, 64):
        step = projection.project(small, world, batch)
        assert step.bound == "host"
        assert projection.input_seconds(world, batch, small.features) > step.overlapped or world == 1
    assert all(projection.project(large, world, batch).bound == "dense" for world in scaling.WORLDS)
    assert projection.project(large, 8, batch).exposed == 0
    for network in (small, large, info):
        assert projection.project(network, 512, total // 512).bound == "all-reduce"
    assert projection.project(info, 512, batch).bound == "MMD"
    assert projection.project(info, 8, batch).gather < projection.project(info, 8, batch).reduce
    assert projection.project(info, 512, batch).gather > projection.project(info, 512, batch).reduce
    for network in NETWORKS:
        assert sum(projection.rank_bytes(network, 512, batch).values()) < 0.05 * H200.memory


def test_every_figure_has_a_source():
    for one in dataclasses.fields(projection.Hardware):
        assert one.metadata["source"]
        assert getattr(H200, one.name) > 0


# Fits and bad input.


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7, -2.0])
def test_exponent_of_a_power_law(power):
    xs = [2.0**index for index in range(9)]
    assert scaling.exponent(xs, [3 * x**power for x in xs]) == pytest.approx(power, abs=1e-9)


def test_exponent_is_that_of_the_upper_half():
    xs = [1, 2, 4, 8, 16, 32, 64]
    assert scaling.exponent(xs, [9, 9, 9, 8, 16, 32, 64]) == pytest.approx(1.0)
    assert scaling.exponent([1, 2], [1, 4]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaling.exponent([1], [1]), "at least two points"),
        (lambda: scaling.exponent([1, 2], [1, 0]), "positive values"),
        (lambda: projection.project(NETWORKS[0], 12, 64), "world=12: expected at most 8"),
        (lambda: projection.project(NETWORKS[0], 8, 0), "batch"),
        (lambda: projection.all_reduce_bytes(0, 8), "world"),
        (lambda: projection.step_count(-1, 1, 1, 1), "samples"),
        (lambda: projection.bytes_per_epoch(1, 1, 0), "value_bytes"),
        (lambda: scaling.launch(print, 0), "world"),
        (lambda: scaling.replaced("a page without marks", scaling.RESULTS), "scaling: begin"),
        (lambda: scaling.scaling(device="tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (lambda: scaling.scaling(json_path=Path("/no/such/folder/x.json")), "--json"),
        (lambda: scaling.scaling(docs=Path("/no/such/page.md")), "--docs"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_command_tells_a_mistake_in_one_line():
    done = run([sys.executable, "-m", "aefast.bench.scaling", "--device", "tpu"], env=environment())
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["error: scaling: --device must be cpu or cuda, got 'tpu'"]


# Processes.

WORKERS = """
import time
import torch
from torch.utils.flop_counter import FlopCounterMode

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from aefast.models import Autoencoder

def model():
    torch.manual_seed(3)
    return Autoencoder(input_size=12, hidden=(8,), latent=3, activation="tanh")

def gradients(rank, world, rows):
    wrapped = DistributedDataParallel(model())
    wrapped(torch.tensor(rows).chunk(world)[rank]).loss.backward()
    found = [parameter.grad.tolist() for parameter in wrapped.parameters()]
    return [found, torch.get_num_threads(), dist.get_backend()]

def fail(rank, world):
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()

def sleep(rank, world):
    time.sleep(60)
"""


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """A module that new processes import too: they inherit the path."""
    (tmp_path / "scaling_workers.py").write_text(WORKERS)
    monkeypatch.syspath_prepend(tmp_path)
    import scaling_workers

    yield scaling_workers
    del sys.modules["scaling_workers"]


@pytest.fixture(scope="module")
def prepared_processes():
    """Not spawned, for what does not hang on how they start; those of the joint batch are spawned."""
    prepared()
    with pytest.MonkeyPatch.context() as patch:
        start = functools.partial(scaling.mp.start_processes, start_method="forkserver")
        patch.setattr(scaling.mp, "spawn", start)
        yield


def test_gradients_of_two_processes_are_those_of_the_joint_batch(workers):
    torch.manual_seed(0)
    rows = torch.rand(10, 12)
    found = scaling.launch(workers.gradients, 2, (rows.tolist(),), timeout=30)
    model = workers.model()
    model(rows).loss.backward()
    for gradients, threads, backend in found:
        assert (threads, backend) == (1, "gloo")
        for ours, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(ours), parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_process_that_fails_ends_all_of_them(workers, prepared_processes):
    with pytest.raises(scaling.ProcessError, match="rank 1 has had enough"):
        scaling.launch(workers.fail, 2, timeout=30)
    assert multiprocessing.active_children() == []


def test_processes_that_do_not_finish_are_ended(workers, prepared_processes):
    start = time.monotonic()
    with pytest.raises(scaling.ProcessError, match="did not finish within 2 s"):
        scaling.launch(workers.sleep, 1, timeout=2)
    assert time.monotonic() - start < 15
    assert multiprocessing.active_children() == []


# Measurement.


@pytest.fixture(scope="module")
def rows(tmp_path_factory, prepared_processes):
    """One of each series, at a tiny size."""
    path = tmp_path_factory.mktemp("samples") / "samples.npy"
    scaling.write_samples(path, 96, 12)
    return [
        scaling.measure_step("batch", 8, (12, 8, 3), 8, CPU, 0.02),
        scaling.measure_step("batch", 16, (12, 8, 3), 16, CPU, 0.02),
        scaling.measure_step("width", 8, (12, 8, 8, 3), 16, CPU, 0.02),
        scaling.measure_epoch(path, (12, 8, 3), 32, CPU),
        scaling.measure_world(2, (200, 200, 10), 8, CPU, 3),
    ]


def test_rows(rows):
    assert [row["series"] for row in rows] == ["batch", "batch", "width", "samples", "world"]
    for row in rows:
        assert row["failure"] is None
        encoder = "-".join(map(str, row["labels"]["encoder"]))
        assert row["id"].startswith(f"scaling/{row['series']}-{row['x']}-{encoder}-b")
        assert {"aefast", "eager"} <= set(row["variants"])
        for variant in row["variants"].values():
            assert set(variant) == {"median_ms", "p20_ms", "p80_ms", "samples_ms", "peak_bytes"}
            assert 0 < variant["p20_ms"] <= variant["median_ms"] <= variant["p80_ms"]
        assert all(error < 1e-5 for error in row["error"].values())
    epoch, group = rows[3:]
    assert epoch["bytes_read"] == 96 * 12 * 4
    assert epoch["flops"] == projection.step_flops(Network("", (12, 8, 3)).parameters, 96)
    assert set(group["variants"]) == {"aefast", "eager", "aefast without all-reduce", "all-reduce"}
    assert all(len(variant["samples_ms"]) == 3 for variant in group["variants"].values())
    assert group["labels"]["crowded"] is (scaling.cores() < 2)
    assert group["labels"]["samples"] == 16


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="this system does not count bytes written")
def test_bytes_sent_are_those_of_the_formula(rows):
    group = rows[-1]
    nbytes = 4 * Network("", tuple(group["labels"]["encoder"])).parameters
    assert group["labels"]["bytes_sent"] == pytest.approx(projection.all_reduce_bytes(2, nbytes), rel=0.02)


def test_wrong_gradients_are_not_timed(monkeypatch):
    monkeypatch.setattr(scaling, "GRADIENT_TOLERANCE", 1e-12)
    row = scaling.measure_step("batch", 8, (12, 8, 3), 8, CPU, 0.02)
    assert row["failure"].startswith("eager: error")
    assert row["variants"] == {}
    (sheet,) = scaling.measured(scaling.make([row], "cpu", quick=True))
    assert sheet.rows[0][1].startswith("wrong: eager: error")


def test_gradients_without_the_other_processes_are_wrong():
    """What the check sees if nothing is all-reduced."""
    model = scaling._autoencoder((12, 8, 3), CPU)
    step = scaling.CapturedStep(model, scaling.make_optimizer(model.parameters(), 1e-3))
    own, joint = torch.rand(8, 12), torch.rand(24, 12)
    assert scaling.gradient_errors({"x": step}, model, own, torch.cat([own, joint]))["x"] > 0.01
    assert scaling.gradient_errors({"x": step}, model, own, own)["x"] < 1e-5


def test_document(rows, tmp_path):
    made = scaling.make(rows, "cpu", quick=True)
    path = tmp_path / "results.json"
    scaling.document.save(made, path)
    assert scaling.read(path) == json.loads(json.dumps(made))
    head = {"schema", "kind", "device", "versions", "commit", "dirty", "cores", "quick", "cases"}
    assert set(made) == head
    assert set(made["device"]) == {"type", "name", "machine"}
    for row in made["cases"]:
        fields = {"id", "series", "x", "labels", "flops", "bytes_read", "error", "failure", "variants"}
        assert set(row) == fields
    del made["kind"]
    scaling.document.save({**made, "cases": []}, path)
    with pytest.raises(InputError, match=r"results\.json holds no results of kind scaling"):
        scaling.read(path)


def test_tables(rows):
    sheets = scaling.measured(scaling.make(rows, "cpu", quick=True))
    assert [len(sheet.rows) for sheet in sheets] == [2, 1, 1, 1]
    for sheet in (*sheets, *scaling.projected()):
        assert {len(row) for row in sheet.rows} == {len(sheet.headings)}
    assert sheets[0].notes[0].startswith("Exponents, fitted from 8 to 16: time ")
    crowded = {**rows[-1], "labels": {**rows[-1]["labels"], "crowded": True}}
    made = {**scaling.make([crowded], "cpu", quick=True), "cores": 1}
    (sheet,) = scaling.measured(made)
    assert sheet.rows[0][0] == "2 (on 1 cores)"


def test_the_page_holds_the_committed_results_and_the_projection():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.replaced(page, scaling.RESULTS) == page
    results = list(scaling.RESULTS.glob("*.json"))
    assert results
    for path in results:
        assert path.stem == scaling.document.file_stem(scaling.read(path)["device"]["name"])
        assert scaling.read(path)["quick"] is False
