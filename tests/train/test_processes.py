"""Several processes train as one would, and end well if one of them does not."""

import json
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from aefast.data import Batches
from aefast.errors import InputError
from aefast.models import from_pretrained
from support import processes, training_workers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


def metrics(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(directory):
    return torch.cat([parameter.flatten() for parameter in from_pretrained(directory).parameters()])


@pytest.fixture
def run(tmp_path):
    """Runs two processes; what each ended with, None of one that was killed."""
    count = 0

    def start(directory, *, resume=False, signals=None, **options):
        nonlocal count
        count += 1
        arguments = (2, tmp_path / f"meeting-{count}", directory, resume, signals or {}, options)
        context = processes.prepared()
        started = [
            context.Process(target=training_workers.train, args=(rank, *arguments)) for rank in range(2)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            assert process.exitcode is not None
        files = [directory.with_name(f"{directory.name}-{rank}.pt") for rank in range(2)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]

    return start


@pytest.mark.parametrize(("model", "accumulate"), [("autoencoder", 1), ("autoencoder", 2), ("sparse", 1)])
def test_two_processes_are_as_one_with_the_joint_batch(run, tmp_path, model, accumulate):
    training_workers.trainer(tmp_path / "one", model).fit(compare=False)
    first, second = run(tmp_path / "two", model=model, accumulate=accumulate)
    assert first["step"] == second["step"] == 18
    assert torch.equal(first["weights"], second["weights"])
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"samples_per_s"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-4)


def test_what_is_told_is_of_the_network_that_is_saved(run, tmp_path):
    """Its running statistics are those of the first process; a layer of it is not used."""
    first, _ = run(tmp_path / "two", model="branches", accumulate=2)
    assert first["step"] == 18
    model = from_pretrained(tmp_path / "two", encoder=training_workers.Branches())
    held_out = training_workers.trainer(tmp_path / "other", "branches").held_out
    with torch.no_grad():
        sums = [(model(batch).loss.item() * len(batch), len(batch)) for batch in held_out.in_order()]
    loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert metrics(tmp_path / "two")[-1]["val_loss"] == pytest.approx(loss, rel=1e-6)


def test_codes_of_all_processes_are_compared_with_the_prior(run, tmp_path):
    """That the MMD of a group is that of all its codes, with its gradient, is a matter of the op's own tests."""
    first, second = run(tmp_path / "two", model="infovae")
    assert first["groups"] == second["groups"] == [2]
    assert first["step"] == second["step"] == 18
    assert torch.equal(first["weights"], second["weights"])
    # Afterwards each process may ask for what it likes.
    assert first["groups_left"] == second["groups_left"] == []


@pytest.mark.parametrize("grouped", [False, True])
def test_the_first_process_draws_alone(run, tmp_path, grouped):
    """Reconstructions of a model whose loss is of all processes' codes, when the others are done."""
    first, second = run(tmp_path / "two", model="infovae", plots=True, epochs=1, grouped=grouped)
    assert first["step"] == second["step"] == 6
    # As it was given.
    assert first["groups_left"] == second["groups_left"] == ([2] if grouped else [])
    assert (tmp_path / "two" / "plots" / "reconstructions.png").exists()
    # The other has not left before.
    assert second["is_drawn"]


def test_processes_validate_on_the_way_together(run, tmp_path):
    # Nothing is learnt at such a rate, so that the third validation ends the run, amid its second epoch.
    first, second = run(tmp_path / "two", validate_every=4, patience=2, lr=1e-12)
    assert first["step"] == second["step"] == 8
    assert torch.equal(first["weights"], second["weights"])
    assert [record["step"] for record in metrics(tmp_path / "two") if "val_loss" in record] == [4, 6, 8]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_stops_all(run, tmp_path, rank):
    first, second = run(tmp_path / "two", stops=(rank, 8))
    # Heeded with the line after the one that was logged when it asked.
    assert first["step"] == second["step"] == 10
    assert torch.equal(first["weights"], second["weights"])
    assert "val_loss" in metrics(tmp_path / "two")[-1]


def test_batches_of_each_process_go_on(run, tmp_path):
    whole = run(tmp_path / "whole", own_batches=True, epochs=2)
    before = run(tmp_path / "parts", own_batches=True, epochs=2, signals={0: (signal.SIGTERM, 2)})
    after = run(tmp_path / "parts", own_batches=True, epochs=2, resume=True)
    for rank in range(2):
        found = before[rank]["seen"] + after[rank]["seen"]
        assert len(before[rank]["seen"]) < 6
        assert torch.equal(torch.stack(found), torch.stack(whole[rank]["seen"]))
        # Each epoch has each of the process's samples once.
        assert len(set(torch.cat(found[:6]).tolist())) == 48


def test_a_signal_to_one_process_interrupts_both(run, tmp_path):
    found = run(tmp_path / "parts", signals={1: (signal.SIGTERM, 8)})
    assert [one["interrupted"] for one in found] == [signal.SIGTERM] * 2
    # Heeded with the line after the one that was logged when it came.
    assert [one["step"] for one in found] == [10, 10]
    assert run(tmp_path / "parts", resume=True)[0]["step"] == 18
    run(tmp_path / "whole")
    ours, theirs = metrics(tmp_path / "parts"), metrics(tmp_path / "whole")
    assert [(one["step"], one["loss"]) for one in ours] == [(one["step"], one["loss"]) for one in theirs]
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_a_process_ends_the_run_with_a_checkpoint(run, tmp_path, lost, capsys):
    found = run(tmp_path / "run", signals={lost: (signal.SIGKILL, 8)})
    assert found[lost] is None
    assert "a process of the run was lost after step" in found[1 - lost]["error"]
    assert "step-0000000006.safetensors, from which --resume goes on" in found[1 - lost]["error"]
    # One process can go on with what two began.
    alone = training_workers.trainer(tmp_path / "run")
    alone.console = Console(width=1000)
    assert alone.fit(resume=True, compare=False).step == 18
    assert "warning: the number of processes was 2 and is 1" in capsys.readouterr().out


def test_batches_are_shared_out():
    samples, rows = torch.arange(23.0)[:, None], torch.arange(23)
    shares = [Batches(samples, rows, batch_size=6, seed=1, share=(number, 3)) for number in range(3)]
    whole = Batches(samples, rows, batch_size=6, seed=1)
    # 6, 6, 6 and 5 rows, of which the last batch loses two.
    assert [len(share) for share in shares] == [4] * 3
    for batch, *parts in zip(whole.epoch(2), *(share.epoch(2) for share in shares), strict=True):
        size = len(batch) // 3
        assert torch.equal(torch.cat(parts), batch[: 3 * size])
    # Of 19 rows one is left over, which is none for each of three.
    few = Batches(samples, rows[:19], batch_size=6, seed=1, share=(0, 3))
    assert len(few) == len(list(few.epoch(0))) == 3
    with pytest.raises(InputError, match="batch_size=8: expected a multiple of the number of processes, 3"):
        Batches(samples, rows, batch_size=8, seed=1, share=(0, 3))


def torchrun(*program, out):
    """The finished run of two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    options = ["--data", "digits", "--hidden", 16, "--epochs", 2, "--out", out, "--device", "cpu"]
    command = [*launcher, *program, "train", *options]
    finished = processes.run(command, env=processes.environment(OMP_NUM_THREADS=1))
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def test_torchrun(tmp_path):
    # Only the first process writes and speaks.
    assert torchrun("-m", "aefast", out=tmp_path / "run").count("held out)") == 1
    assert [record["epoch"] for record in metrics(tmp_path / "run")] == [1, 2]


def test_threads_end_with_their_group(tmp_path):
    """One that frees a tensor while the interpreter ends would abort."""
    program = """
from pathlib import Path
from aefast.cli import main
main()
names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
print("threads left:", sum("gloo" in name for name in names), flush=True)
"""
    told = torchrun("--no-python", sys.executable, "-c", program, out=tmp_path / "run")
    assert told.count("threads left: 0") == 2, told
