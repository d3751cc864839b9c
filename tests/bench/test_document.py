import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from aefast.bench import document, readme
from aefast.bench.ceilings import Ceilings
from aefast.bench.measure import Result
from aefast.bench.timing import Timing
from aefast.errors import InputError
from aefast.ops._registry import Cost

ROOT = Path(__file__).resolve().parents[2]


def made(speedup: float = 1.0, failure: str | None = None, spread: float = 0.0, **given) -> dict:
    eager = [1e-3 * (1 + spread * (index % 2)) for index in range(40)]
    timings = {} if failure else {"eager": Timing(eager), "aefast": Timing([1e-3 / speedup] * 40)}
    result = Result(
        id="op/x-fwd",
        op="op",
        kind=given.pop("kind", "gelu"),
        dtype="fp32",
        mode="fwd",
        sizes={"batch": 8, "inputs": 4, "features": 2},
        errors=given.pop("errors", {"aefast": 1e-7, "eager": 2e-7}),
        timings=timings,
        peak_bytes={name: 8 if name == "eager" else 4 for name in timings},
        cost=Cost(100, 200, 300),
        floor=5e-4,
        floor_kind="flops",
        failure=failure,
        **given,
    )
    return document.make([result], {"fp32": Ceilings(1.0, 2.0, 3.0)}, "cpu", "auto")


def test_fields(tmp_path):
    path = tmp_path / "results.json"
    document.save(made(2.0), path)
    found = document.load(path)
    assert found == made(2.0)
    assert {
        "schema",
        "device",
        "backend",
        "versions",
        "commit",
        "dirty",
        "ceilings",
        "not_run",
        "cases",
    } == set(found)
    assert found["ceilings"] == {"fp32": {"bytes_per_s": 1.0, "flops_per_s": 2.0, "exps_per_s": 3.0}}
    (case,) = found["cases"]
    variant = case.pop("variants")["aefast"]
    assert case == {
        "id": "op/x-fwd",
        "op": "op",
        "kind": "gelu",
        "dtype": "fp32",
        "mode": "fwd",
        "sizes": {"batch": 8, "inputs": 4, "features": 2},
        "error": {"aefast": 1e-7, "eager": 2e-7},
        "failure": None,
        "missing": {},
        "cost": {"bytes": 100, "flops": 200, "exps": 300},
        "floor_ms": 0.5,
        "floor_kind": "flops",
    }
    assert variant["samples_ms"] == [0.5] * 40
    assert [variant[key] for key in ("median_ms", "p20_ms", "p80_ms", "peak_bytes")] == [0.5, 0.5, 0.5, 4]
    assert "graph" not in variant
    assert sum(line.startswith('{"id"') for line in path.read_text().splitlines()) == 1


def test_graph_replays_stand_beside_the_calls():
    (case,) = made(graph_timings={"aefast": Timing([1e-4] * 5)}, missing={"eager as a graph": "refused"})[
        "cases"
    ]
    assert case["variants"]["aefast"]["graph"]["median_ms"] == pytest.approx(0.1)
    assert case["missing"] == {"eager as a graph": "refused"}


def test_commit_is_that_of_the_checkout():
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not in a checkout")
    assert made()["commit"] == head.stdout.strip()


def test_missing_variants_are_grouped_by_reason():
    reasons = {"quack": "it is not installed"}
    cases = made(missing=reasons)["cases"] + made()["cases"] + made(missing=reasons, failure="wrong")["cases"]
    assert document.missing_variants(cases) == {("quack", "it is not installed"): ["op/x-fwd", "op/x-fwd"]}


def test_regressions():
    assert document.regressions(made(1.0), made(1.0)) == []
    assert document.regressions(made(0.96), made(1.0)) == []
    assert document.regressions(made(0.94), made(1.0)) == ["op/x-fwd: 0.94×, was 1.00×"]
    assert document.regressions(made(1.1), made(1.0)) == []
    assert document.regressions(made(failure="wrong"), made(1.0)) == ["op/x-fwd: fails: wrong"]
    assert document.regressions(made(1.0), made(failure="wrong")) == []


def test_noise_is_no_regression():
    """The rounds' ratios lie between 0.94 and 1.4: the median of the earlier run may have been 0.94 too."""
    assert document.regressions(made(0.94), made(1.0, spread=0.5)) != []
    assert document.regressions(made(0.94, spread=0.5), made(1.0, spread=0.5)) == []


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_files_without_results(tmp_path, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"results\.json"):
        document.load_results(path)


def test_errors_without_bound_are_null_in_the_file(tmp_path):
    results = made(failure="wrong", errors={"aefast": float("inf"), "eager": 1e-7})
    document.save(results, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["cases"][0]["error"] == {
        "aefast": None,
        "eager": 1e-7,
    }


def test_commit_of_a_copy_is_the_one_stated(monkeypatch):
    monkeypatch.setattr(document, "__file__", "/bench/document.py")
    monkeypatch.setenv("AEFAST_COMMIT", "abc")
    assert (made()["commit"], made()["dirty"]) == ("abc", None)


def test_readme_holds_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.replaced(text, ROOT / "bench" / "results") == text
    assert list((ROOT / "bench" / "results").glob("*.json"))


def test_readme_table():
    results = made(2.0)
    results["cases"] += made(4.0)["cases"] + made(failure="wrong")["cases"]
    row, _, failing = readme.table(results).splitlines()[-3:]
    assert row == "| `op` | gelu | fp32 | forward | 2 | 3.00× | 4.00× | 2.00× |"
    assert failing == "Wrong, and therefore not timed: op/x-fwd."


def test_joint_table_has_a_column_for_each_device():
    one, other = made(2.0), made(5.0, kind="relu")
    one["cases"] += made(4.0)["cases"]
    header, _, *rows = readme.joint_table([one, other]).splitlines()[2:]
    name = one["device"]["name"]
    assert header == f"| op | kind | dtype | mode | {name} | {name} |"
    assert rows == [
        "| `op` | gelu | fp32 | forward | 3.00× (2.00 to 4.00) |  |",
        "| `op` | relu | fp32 | forward |  | 5.00× |",
    ]


def with_compile(results: dict, speedup: float) -> dict:
    """`results` with code of torch.compile over which aefast's speed-up is that."""
    for case in results["cases"]:
        ours = case["variants"]["aefast"]
        samples = [sample * speedup for sample in ours["samples_ms"]]
        timing = {"median_ms": ours["median_ms"] * speedup, "samples_ms": samples}
        case["variants"]["compile"] = {**ours, **timing}
    return results


def test_joint_table_tells_what_torch_compile_reaches():
    one, other = with_compile(made(2.0), 1.5), made(2.0)
    one["cases"] += with_compile(made(4.0), 0.5)["cases"]
    name = one["device"]["name"]
    header, _, *rows = readme.joint_table([one, other]).splitlines()[-3:]
    assert header == f"| op | mode | {name} | {name} |"
    assert rows == ["| `op` | forward | 1.00× (0.50 to 1.50), 1 of 2 |  |"]
    assert "torch.compile" not in readme.joint_table([other])


@pytest.mark.parametrize("table", [readme.table, lambda results: readme.joint_table([results])])
def test_calls_too_short_for_the_table_are_counted(table):
    results, short = made(2.0), made(2.0)
    assert "Left out" not in table(results)
    for speedup in (0.8, 0.9, 1.2):
        (case,) = made()["cases"]
        case["variants"]["eager"]["median_ms"] = 0.04
        case["variants"]["aefast"]["median_ms"] = 0.04 / speedup
        short["cases"].append(case)
    name = results["device"]["name"]
    assert table(short) == table(results) + (
        f"\n\nLeft out are calls of which eager takes less than 50 µs: 3 of 4 on {name}, median 0.90×, "
        "67 % of them below 1."
    )


def test_device_name_says_threads_and_instructions():
    name = document.device_name("cpu")
    assert f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}" in name
    assert name.endswith(", AMX") == torch.cpu._is_amx_tile_supported()
    assert json.dumps(name)


def test_device_name_tells_processors_of_one_name_apart(monkeypatch, tmp_path):
    lines = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
    )
    (tmp_path / "cpuinfo").write_text(lines.format(25, 17) + "\n" + lines.format(25, 17))
    monkeypatch.setattr(document, "CPUINFO", tmp_path / "cpuinfo")
    assert document.device_name("cpu").startswith("AMD EPYC (family 25, model 17), ")
    # Processors of other makes have no such lines.
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert document.device_name("cpu").startswith(f"{platform.processor() or platform.machine()}, ")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("Intel(R) Xeon(R) Processor, 2 threads, AVX512", "intel-xeon-2-threads-avx512"),
        (
            "AMD EPYC (family 25, model 17), 2 threads, AVX512",
            "amd-epyc-family-25-model-17-2-threads-avx512",
        ),
        ("AMD EPYC 7763 64-Core Processor, 4 threads, AVX2", "amd-epyc-7763-64-core-4-threads-avx2"),
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Core(TM) i7 CPU @ 3.0GHz, 2 threads, DEFAULT", "intel-core-i7-3.0ghz-2-threads-default"),
    ],
)
def test_file_stem(name, stem):
    assert document.file_stem(name) == stem
