"""`aefast bench`: exit codes, files, what a broken kernel gets, and the commands around it."""

import dataclasses
import json
import shutil
import signal
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aefast import cli
from aefast.bench import cases as all_cases
from aefast.bench import document, report, variants
from aefast.bench.cases import linear_act as linear_act_cases
from aefast.bench.cases import mlp as mlp_cases
from aefast.bench.cases import train
from aefast.bench.cli import FIRST_ON_CUDA, _ordered, _Run
from aefast.ops import _registry
from support.processes import environment, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def few(monkeypatch):
    """Two cases of each of two ops, one of them quick."""

    def layers(device, quick):
        for batch in (8,) if quick else (4, 8):
            yield linear_act_cases.case(batch, 8, 4, "tanh", torch.float32, device)

    def stacks(device, quick):
        for batch in (8,) if quick else (8, 16):
            yield mlp_cases.case(batch, (8, 4, 8), "gelu", torch.float32, device)

    monkeypatch.setattr(all_cases, "CASES", {"linear_act": layers, "mlp": stacks})


@pytest.fixture
def no_estimate(monkeypatch):
    monkeypatch.setattr(report, "_static", lambda: "The estimate.")


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments)])


def test_quick_cases_of_all_ops_come_first(few, tmp_path):
    ordered = _ordered(["linear_act", "mlp"], torch.device("cpu"), quick=False, is_short=True)
    assert [(case.op, case.sizes["batch"]) for case in ordered] == [
        *(("linear_act", 8), ("mlp", 8)),
        *(("linear_act", 4), ("mlp", 16)),
    ]
    path = tmp_path / "results.json"
    assert bench("--json", path) == 0
    ids = [case["id"] for case in document.load(path)["cases"]]
    assert ids == [
        f"{case}-fp32-{mode}"
        for case in (
            "linear_act/tanh-b8-8x4",
            "linear_act/tanh-b4-8x4",
            "mlp/gelu-b8-8x4x8",
            "mlp/gelu-b16-8x4x8",
        )
        for mode in ("fwd", "fwdbwd")
    ]


def test_order_on_cuda():
    """The targets, then quick cases with what matters most in front; compiled code only where it is asked for."""
    device = torch.device("cuda")
    ordered = _ordered(list(all_cases.CASES), device, quick=False, is_short=True)
    alone = [case for case in train.targets(device) if not case.is_compiled]
    assert [(case.id, case.is_compiled) for case in ordered[: len(alone)]] == [
        (case.id, False) for case in alone
    ]
    turn = ordered[len(alone) :][: len(all_cases.CASES)]
    assert [case.op for case in turn[: len(FIRST_ON_CUDA)]] == list(FIRST_ON_CUDA)
    assert {case.op for case in turn} == set(all_cases.CASES)
    quick = {case.id for op in all_cases.CASES for case in all_cases.CASES[op](device, True)}
    asked = {
        case.id for op in all_cases.CASES for case in all_cases.CASES[op](device, True) if case.is_compiled
    }
    assert {case.id for case in ordered if case.is_compiled} == asked
    # What torch.compile takes part in comes once more, behind the quick cases.
    again = [index for index, case in enumerate(ordered) if case.is_compiled and case.op == "train"]
    assert max(index for index, case in enumerate(ordered) if case.id in quick and index not in again) < min(
        again
    )
    whole = _ordered(list(all_cases.CASES), device, quick=False, is_short=False)
    assert {case.id for case in whole} == {case.id for case in ordered}
    assert asked < {case.id for case in whole if case.is_compiled}


def test_targets_alone(few, tmp_path, monkeypatch):
    """One that comes twice, without torch.compile and with it, is one case with all that took part."""
    monkeypatch.setattr(variants, "compiled", lambda function, device: function)
    case = linear_act_cases.case(8, 8, 4, "tanh", torch.float32, torch.device("cpu"))
    twice = [case, dataclasses.replace(case, is_compiled=True)]
    monkeypatch.setattr(train, "targets", lambda device: iter(twice))
    path = tmp_path / "results.json"
    assert bench("--targets", "--json", path) == 0
    found = document.load(path)["cases"]
    assert [one["id"] for one in found] == [
        "linear_act/tanh-b8-8x4-fp32-fwd",
        "linear_act/tanh-b8-8x4-fp32-fwdbwd",
    ]
    assert all(set(one["variants"]) == {"aefast", "eager", "compile"} for one in found)


def test_a_report_is_gone_on_with(few, no_estimate, tmp_path, monkeypatch):
    """What it has is not measured again, unless torch.compile is to take part and has not."""
    path = tmp_path / f"{document.file_stem(document.device_name('cpu'))}.json"
    assert bench("linear_act", "--quick", "--report", tmp_path, "--resume", "--no-estimates") == 0
    assert "The estimate." not in path.with_suffix(".md").read_text()
    before = {case["id"]: case for case in document.load(path)["cases"]}
    assert len(before) == 2
    assert bench("--report", tmp_path, "--resume") == 0
    page = path.with_suffix(".md").read_text()
    assert page.endswith("## The GPU kernels, from their machine code\n\nThe estimate.\n")
    after = {case["id"]: case for case in document.load(path)["cases"]}
    assert len(after) == 8 and before.items() <= after.items()
    assert all(f"`{id}`" in page for id in after)

    monkeypatch.setattr(variants, "compiled", lambda function, device: function)
    case = linear_act_cases.case(8, 8, 4, "tanh", torch.float32, torch.device("cpu"), is_compiled=True)
    monkeypatch.setattr(train, "targets", lambda device: iter([case]))
    assert bench("--targets", "--report", tmp_path, "--resume", "--no-estimates") == 0
    last = {case["id"]: case for case in document.load(path)["cases"]}
    assert set(last) == set(after)
    assert {id for id, case in last.items() if "compile" in case["variants"]} == set(before)


def test_a_report_of_other_code_is_not_gone_on_with(few, no_estimate, tmp_path, monkeypatch, capsys):
    assert bench("linear_act", "--quick", "--report", tmp_path, "--no-estimates") == 0
    monkeypatch.setattr(document, "_commit", lambda: ("another", False))
    assert bench("--quick", "--report", tmp_path, "--resume") == 2
    assert "--resume needs results of the same commit" in capsys.readouterr().err


def test_an_interrupted_run_leaves_its_report(few, no_estimate, tmp_path, monkeypatch):
    measured = _Run._measured
    seen = []

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(_Run, "_measured", interrupted)
    assert bench("--report", tmp_path) != 0
    stem = document.file_stem(document.device_name("cpu"))
    assert len(document.load(tmp_path / f"{stem}.json")["cases"]) == 1
    assert "`linear_act/tanh-b8-8x4-fp32-fwd`" in (tmp_path / f"{stem}.md").read_text()
    assert (tmp_path / f"{stem}-speedup.png").exists()


def test_a_limit_of_time_names_what_it_left_out(few, tmp_path, monkeypatch):
    from aefast.bench import ceilings

    path = tmp_path / "results.json"
    monkeypatch.setattr(ceilings, "measure", lambda *given: ceilings.Ceilings(1e10, 1e10, 1e10))
    assert bench("--json", path, "--limit", "1e-9") == 0
    found = document.load(path)
    assert found["cases"] == []
    assert len(found["not_run"]) == 8


def test_a_case_that_cannot_be_measured_costs_no_other(few, tmp_path, monkeypatch, capsys):
    def no_memory(device, quick):
        case = linear_act_cases.case(8, 8, 4, "relu", torch.float32, device)

        def make():
            raise torch.OutOfMemoryError("no memory")

        yield dataclasses.replace(case, make=make)

    monkeypatch.setitem(all_cases.CASES, "linear_act", no_memory)
    path = tmp_path / "results.json"
    assert bench("--quick", "--json", path) == 1
    failures = {case["id"]: case["failure"] for case in document.load_results(path)["cases"]}
    assert failures == {
        "linear_act/relu-b8-8x4-fp32-fwd": "OutOfMemoryError: no memory",
        "linear_act/relu-b8-8x4-fp32-fwdbwd": "OutOfMemoryError: no memory",
        "mlp/gelu-b8-8x4x8-fp32-fwd": None,
        "mlp/gelu-b8-8x4x8-fp32-fwdbwd": None,
    }


TOLD = """
import sys
from aefast import cli
from aefast.bench.cli import _Run

measured = _Run._measured

def told(*arguments):
    print("measuring", flush=True)
    return measured(*arguments)

_Run._measured = told
sys.exit(cli.main(["bench", "linear_act", "--json", sys.argv[1]]))
"""


def test_what_was_measured_survives_the_end_of_the_process(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, "-c", TOLD, str(path)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        # In the second case: the first has its result.
        assert [process.stdout.readline() for _ in range(2)] == ["measuring\n"] * 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    assert document.load_results(path)["cases"]


def test_a_run_that_measures_nothing_leaves_earlier_results(few, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("earlier")
    assert bench("--quick", "--json", path, "--backend", "nonsense") == 2
    assert path.read_text() == "earlier"


@pytest.mark.parametrize("launcher", ["linear_act", "linear_act_backward"])
def test_a_broken_kernel_gets_no_speedup(launcher, few, tmp_path, monkeypatch, capsys):
    kernels = _registry.kernels("cpu", "linear_act")
    working = getattr(kernels, launcher)

    def broken(*arguments):
        results = working(*arguments)
        # One element of the result, by as little as a dropped term of a sum may change it.
        results[0].view(-1)[0] += 1e-3
        return results

    monkeypatch.setattr(kernels, launcher, broken)
    path = tmp_path / "results.json"
    assert bench("linear_act", "--quick", "--json", path) == 1
    found = {case["mode"]: case for case in document.load(path)["cases"]}
    assert found["fwdbwd"]["failure"].startswith("aefast: wrong: errors")
    assert found["fwdbwd"]["variants"] == {}
    assert (found["fwd"]["failure"] is None) == (launcher == "linear_act_backward")
    assert "wrong" in capsys.readouterr().out


def test_report(few, no_estimate, tmp_path, capsys):
    assert bench("--report", tmp_path) == 0
    stem = document.file_stem(document.device_name("cpu"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"{stem}{end}" for end in (".json", ".md", "-speedup.png", "-scaling.png", "-roofline.png")
    }
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png")
    )
    page = (tmp_path / f"{stem}.md").read_text()
    assert page.startswith(f"# aefast on {document.device_name('cpu')}\n")
    for text in ("`linear_act/tanh-b8-8x4-fp32-fwd`", f"]({stem}-roofline.png)", "The estimate.", "fp32"):
        assert text in page
    assert f"written: {tmp_path / stem}.md" in capsys.readouterr().out


def test_report_tells_losses_and_what_is_missing(no_estimate):
    made = json.loads((ROOT / "bench/results/intel-xeon-2-threads-avx512.json").read_text())
    case = next(case for case in made["cases"] if case["variants"]["eager"]["median_ms"] > 0.05)
    slow = {
        **case["variants"]["eager"],
        "samples_ms": [2 * s for s in case["variants"]["eager"]["samples_ms"]],
    }
    slow["median_ms"] *= 2
    case["variants"] = {**case["variants"], "aefast": slow}
    made["cases"] = [
        {**case, "missing": {"quack": "quack is not installed"}},
        {**case, "id": "op/wrong", "failure": "aefast is wrong", "variants": {}, "missing": {}},
    ]
    made["not_run"] = ["op/late-fwd"]
    page = report.markdown(made, {"speedup": "x.png"}, "x.json")
    row = f"| `{case['id']}` | 0.50× | 0.50 to 0.50 |"
    assert page.count(row) == 1 and "torch.compile" not in page
    case["variants"]["compile"] = case["variants"]["eager"]
    made["cases"][0] = {**made["cases"][0], "variants": case["variants"]}
    compiled = report.markdown(made, {"speedup": "x.png"}, "x.json").partition("Slower than torch.compile")[2]
    assert row in compiled
    assert "- quack, from 1 cases of this run: quack is not installed" in page
    assert "- 1 cases, for want of time: from `op/late-fwd` on" in page
    assert "Wrong, and therefore not timed: op/wrong." in page


def test_comparison_names_what_became_slower(few, tmp_path, capsys):
    path = tmp_path / "before.json"
    assert bench("--quick", "--json", path) == 0
    before = document.load(path)
    for case in before["cases"]:
        for name in ("median_ms", "samples_ms"):
            value = case["variants"]["eager"][name]
            case["variants"]["eager"][name] = (
                value * 10 if name == "median_ms" else [10 * one for one in value]
            )
    document.save(before, path)
    assert bench("--quick", "--compare", path) == 1
    assert f"slower than in {path}: linear_act/tanh-b8-8x4-fp32-fwd: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": {"name": "another"}}, "results of the same device: another is not"),
        ({"backend": "cpu"}, "results of the same backend: cpu is not auto"),
        ({"cases": [{"id": "x"}]}, "lacks cases[0].op"),
    ],
)
def test_what_cannot_be_compared_is_told_before_the_run(change, message, few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aefast.bench.measure.measure", lambda *given: pytest.fail("measured"))
    path = tmp_path / "before.json"
    document.save({**document.make([], {}, "cpu", "auto"), **change}, path)
    assert bench("--quick", "--compare", path) == 2
    assert message in capsys.readouterr().err


def test_plots_that_cannot_be_drawn_are_told_before_the_run(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aefast.bench.measure.measure", lambda *given: pytest.fail("measured"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench("--report", tmp_path) == 2
    assert "--report draws with matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "OP must be one of"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--json", "/no/such/folder/x.json"], "--json must be a file in an existing folder"),
        (["--report", "/no/such/folder"], "--report must be an existing folder"),
        (["--limit", "0"], "--limit must be a positive number of seconds"),
        (["--limit", "nan"], "--limit must be a positive number of seconds"),
        (["--compare", "/no/such/file"], "cannot read results from"),
        (["--backend", "nonsense", "--quick"], "backend must be one of"),
        (["linear_act", "--targets"], "--targets names its cases itself, and takes no OP"),
        (["--resume"], "--resume goes on with a report, and needs --report"),
        (["linear_act", "--static"], "--static estimates every kernel and takes no OP"),
    ],
)
def test_bad_input_is_one_line_and_two(few, arguments, message, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_pytest_benchmark_runs_the_cases():
    found = run(
        [sys.executable, "-m", "pytest", "-q", "bench", "-k", "linear_act and relu-b1-8x8 and fwdbwd"],
        cwd=ROOT,
        env=environment(),
    )
    assert found.returncode == 0, found.stdout
    assert "2 passed, 1 skipped" in found.stdout
    assert "benchmark 'linear_act/relu-b1-8x8-fp32-fwdbwd': 2 tests" in found.stdout


@pytest.fixture
def python_without_aefast(tmp_path):
    """An interpreter that sees this one's packages, but not the editable installation of this checkout."""
    packages = tmp_path / "packages"
    packages.mkdir()
    # PYTHONPATH comes before the standard library, whose backports must not stand in for it there.
    hidden = ("__editable__", "aefast")
    for path in map(Path, site.getsitepackages()):
        for entry in path.iterdir():
            if not entry.name.startswith(hidden) and entry.stem not in sys.stdlib_module_names:
                (packages / entry.name).symlink_to(entry)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{packages}" exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


def test_gpu_script_leaves_logs_whatever_fails(tmp_path, python_without_aefast):
    """Where there is no GPU, the steps that need one fail, and the later ones are tried all the same."""
    if torch.cuda.is_available() or shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU, and the script would measure it")
    found = run(
        [ROOT / "bench/gpu.sh", tmp_path / "out", "120"],
        env=environment(PYTHON=python_without_aefast),
        cwd=tmp_path,
    )
    assert found.returncode == 1, found.stdout
    outcomes = dict(
        line.split(maxsplit=1) for line in (tmp_path / "out/summary.txt").read_text().splitlines()
    )
    steps = ["environment", "build", "info", "smoke", "targets", "tests", "alone", "benchmark"]
    assert list(outcomes) == steps
    assert "FAILED" in outcomes["environment"] and "FAILED" in outcomes["build"]
    assert "passed" in outcomes["info"]
    for name in ("targets", "benchmark"):
        assert outcomes[name].endswith("--device cuda needs a CUDA device, and torch finds none")
    assert {path.stem for path in (tmp_path / "out").glob("*.log")} == set(outcomes)


@pytest.mark.parametrize("arguments", [[], ["out", "0"], ["out", "x"], ["out", "1", "2"]])
def test_gpu_script_usage(arguments, tmp_path):
    found = run([ROOT / "bench/gpu.sh", *arguments], cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "usage: bench/gpu.sh OUTDIR [SECONDS]\n")
