"""Which backend serves a call: by name, by the environment, and by itself."""

import asyncio
import inspect
import logging
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import aefast
import aefast.functional as AF
import aefast.info
from aefast import _library
from aefast.errors import BackendError, InputError
from aefast.ops import OPS, _registry
from support import numerics
from support.processes import environment, run

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


@pytest.fixture
def fresh_choices():
    """The registry remembers its choices; within this it has none, and afterwards none of the test's."""
    memories = (_registry._resolve, _registry._launchers)
    for memory in memories:
        memory.cache_clear()
    yield
    for memory in memories:
        memory.cache_clear()


@pytest.fixture
def no_cpu_library(fresh_choices, monkeypatch):
    monkeypatch.setattr(_library, "load", lambda name: f"no {name} library, says the test")
    # In the interpreter, Triton would serve CPU tensors.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("has_mkl", [True, False])
def test_only_of_mkl_is_the_library_faster_at_large_products(has_mkl, monkeypatch):
    numerics.require_backend("cpu", "linear_act", "cpu", torch.float32)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    before = torch.ops.aefast_cpu.use_large_blas_products(False)
    try:
        assert _library.load.__wrapped__("cpu") is None
    finally:
        used = torch.ops.aefast_cpu.use_large_blas_products(before)
    assert used is not has_mkl


def layer():
    return AF.linear_act(torch.ones(4, 3), torch.ones(5, 3))


def test_a_call_that_a_backend_is_not_for(fresh_choices, caplog):
    numerics.require_backend("cpu", "mmd", "cpu", torch.float32)
    x, unfit = torch.ones(4, 3), ("cpu", "its kernels are not for this, says the test")
    assert _registry.choose("mmd", x) == "cpu"
    with caplog.at_level(logging.INFO, "aefast"):
        assert _registry.choose("mmd", x, unfit=unfit) != "cpu"
    assert "says the test" in caplog.text
    with aefast.backend("cpu"), pytest.raises(BackendError, match="cannot serve mmd: its kernels are not"):
        _registry.choose("mmd", x, unfit=unfit)
    with aefast.backend("cpu"):
        assert _registry.choose("mmd", x, unfit=("cuda", unfit[1])) == "cpu"


def test_gpus_that_are_too_old_get_the_reference(fresh_choices, monkeypatch):
    """A T4, which neither the CUDA library nor Triton has code for."""
    monkeypatch.setattr(_library, "load", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("H200", "T4")[index])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _registry._too_old.cache_clear()
    try:
        reason = _registry.refusal("cuda", "linear_act", "cuda", torch.float32)
        assert "cuda:1, T4, has compute capability 7.5, and kernels need 8.0 or later" in reason
        assert _registry.refusal("triton", "linear_act", "cuda", torch.float32) in (
            reason,
            _registry.triton_missing(),
        )
        assert _registry._resolve("auto", "linear_act", "cuda", torch.float32, None) == "eager"
        with pytest.raises(BackendError, match=r"7\.5"):
            _registry._resolve("cuda", "linear_act", "cuda", torch.float32, None)
    finally:
        _registry._too_old.cache_clear()


def test_calls_on_the_cpu_ask_nothing_of_cuda(fresh_choices, monkeypatch):
    """Which a forked process may not."""

    def refuse(index):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _registry._too_old.cache_clear()
    assert layer().shape == (4, 5)


def test_the_interpreter_takes_no_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16" in _registry.refusal("triton", "linear_act", "cpu", torch.bfloat16)
    assert _registry.refusal("triton", "linear_act", "cpu", torch.float32) == _registry.triton_missing()


def test_order_of_preference():
    assert [row.name for row in _registry.BACKENDS] == ["cuda", "triton", "cpu", "eager"]
    assert set(_registry.BACKEND_NAMES) == {"auto", "cuda", "triton", "cpu", "eager"}


def test_contexts_nest_and_end():
    outside = _registry.requested()
    with aefast.backend("cpu"):
        with aefast.backend("eager"):
            assert _registry.requested() == "eager"
            with aefast.backend("auto"):
                assert _registry.requested() == "auto"
            assert _registry.requested() == "eager"
        assert _registry.requested() == "cpu"
        with pytest.raises(KeyError), aefast.backend("eager"):
            raise KeyError
        assert _registry.requested() == "cpu"
    assert _registry.requested() == outside


def test_threads_do_not_see_each_others_backend():
    outside = _registry.requested()
    seen = {}
    meeting = threading.Barrier(3, timeout=60)

    def ask(name):
        seen[name, "before"] = _registry.requested()
        with aefast.backend(name):
            meeting.wait()
            seen[name, "within"] = _registry.requested()
            meeting.wait()

    workers = [threading.Thread(target=ask, args=(name,)) for name in ("cpu", "eager")]
    with aefast.backend("triton"):
        for worker in workers:
            worker.start()
        meeting.wait()
        assert _registry.requested() == "triton"
        meeting.wait()
        for worker in workers:
            worker.join()
    assert seen == {
        ("cpu", "before"): outside,
        ("cpu", "within"): "cpu",
        ("eager", "before"): outside,
        ("eager", "within"): "eager",
    }


def test_tasks_do_not_see_each_others_backend():
    async def ask(name):
        with aefast.backend(name):
            await asyncio.sleep(0)
            return _registry.requested()

    async def both():
        return await asyncio.gather(ask("cpu"), ask("eager"))

    assert asyncio.run(both()) == ["cpu", "eager"]


hands_contexts_on = pytest.mark.skipif(
    '_stash_obj_in_tls("context"' not in inspect.getsource(torch.autograd.graph),
    reason="this torch does not hand the context of a backward to autograd's threads",
)


class Nested(torch.autograd.Function):
    """In the backward another one, `depth` deep, and at the bottom `call()`."""

    @staticmethod
    def forward(ctx, x, depth, call):
        ctx.depth, ctx.call = depth, call
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth == 0:
            ctx.call()
        else:
            with torch.enable_grad():
                nested_backward(ctx.depth - 1, ctx.call)
        return grad, None, None


def nested_backward(depth, call):
    Nested.apply(torch.ones(1, requires_grad=True), depth, call).sum().backward()


@hands_contexts_on
def test_threads_of_autograd_ask_for_the_backend_of_who_started_the_backward():
    """On the CPU a backward gets a thread of its own where it is the 61st within others."""
    outside, seen = _registry.requested(), []

    def ask():
        before = _registry.requested()
        with aefast.backend("cpu"):
            within = _registry.requested()
        seen.append((threading.get_ident(), before, within, _registry.requested()))

    with aefast.backend("eager"):
        nested_backward(61, ask)
    nested_backward(61, ask)
    own, of_thread = threading.get_ident(), [one[1:] for one in seen]
    assert all(one[0] != own for one in seen)
    assert of_thread == [("eager", "cpu", "eager"), (outside, "cpu", outside)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "is_within",
    [pytest.param(False, marks=hands_contexts_on, id="around"), pytest.param(True, id="within")],
)
def test_checkpoints_on_cuda_recompute_on_the_backend_of_their_context(is_within):
    """The reference keeps other tensors than kernels do, which the checkpoint would tell."""
    x = torch.rand(64, 32, device="cuda", requires_grad=True)
    weight = torch.rand(16, 32, device="cuda", requires_grad=True)

    def function(x):
        return AF.linear_act(x, weight, None, "silu").square().sum()

    def within(x):
        with aefast.backend("eager"):
            return function(x)

    with aefast.backend("auto" if is_within else "eager"):
        checkpoint(within if is_within else function, x, use_reentrant=False).backward()
    found = x.grad, weight.grad
    x.grad = weight.grad = None
    within(x).backward()
    for ours, theirs in zip(found, (x.grad, weight.grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["cuda ", "CPU", "", "nvidia"])
def test_unknown_name(name):
    with pytest.raises(InputError) as caught, aefast.backend(name):
        pass
    assert str(caught.value) == f"backend must be one of auto, cuda, triton, cpu, eager, got {name!r}"


@pytest.mark.parametrize(("name", "backend"), [("triton", "triton"), ("eager", "eager"), ("", "auto")])
def test_environment_sets_the_backend(name, backend):
    code = "import aefast; from aefast.ops import _registry; print(_registry.requested())"
    done = run([sys.executable, "-c", code], env=environment(AEFAST_BACKEND=name))
    assert done.stdout.splitlines() == [backend]


def test_environment_with_an_unknown_name():
    code = "import torch, aefast.functional as AF; AF.linear_act(torch.ones(1, 2), torch.ones(1, 2))"
    done = run([sys.executable, "-c", code], env=environment(AEFAST_BACKEND="nvidia"))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(
        "AEFAST_BACKEND must be one of auto, cuda, triton, cpu, eager, got 'nvidia'"
    )


def test_a_context_beats_the_environment():
    code = (
        "import aefast, torch, aefast.functional as AF\n"
        "with aefast.backend('eager'):\n"
        "    print(AF.linear_act(torch.ones(1, 2), torch.ones(1, 2)).item())\n"
    )
    done = run([sys.executable, "-c", code], env=environment(AEFAST_BACKEND="cuda"))
    assert done.stdout.splitlines() == ["2.0"]


@NO_CUDA
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_here_says_why(name, monkeypatch, fresh_choices):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = f"backend '{name}' cannot serve linear_act: .*(CUDA|libaefast_cuda)"
    for _ in range(2):
        with pytest.raises(BackendError, match=message), aefast.backend(name):
            layer()
    message = message.replace("linear_act", "mlp")
    with pytest.raises(BackendError, match=message), aefast.backend(name):
        AF.mlp(torch.ones(2, 3), [torch.ones(4, 3)], [None], ["relu"])


@pytest.mark.gpu
def test_a_backend_for_another_device_says_why():
    message = "it serves cuda tensors, and these are on cpu"
    with pytest.raises(BackendError, match=message), aefast.backend("triton"):
        layer()


def test_a_missing_library_says_why(no_cpu_library):
    message = "backend 'cpu' cannot serve linear_act: no cpu library, says the test"
    with pytest.raises(BackendError, match=message), aefast.backend("cpu"):
        layer()


def test_auto_falls_down_the_table_and_says_so_once(no_cpu_library, caplog):
    with caplog.at_level(logging.INFO, logger="aefast"), aefast.backend("auto"):
        for _ in range(3):
            torch.testing.assert_close(layer(), torch.full((4, 5), 3.0))
        assert _registry.choose("linear_act", torch.ones(1)) == "eager"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("aefast", logging.INFO)
    assert record.getMessage() == (
        "linear_act on cpu runs on the eager backend (cpu: no cpu library, says the test)"
    )


def test_auto_says_nothing_of_backends_for_other_devices(fresh_choices, caplog, monkeypatch):
    numerics.require_backend("cpu", "linear_act", "cpu", torch.float32)
    monkeypatch.setattr(_library, "load", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with caplog.at_level(logging.INFO, logger="aefast"), aefast.backend("auto"):
        assert _registry.choose("linear_act", torch.ones(1)) == "cpu"
    assert caplog.records == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_info_has_every_op_on_every_backend(dtype):
    table = aefast.info.backends(dtype)
    assert set(table) == set(OPS) >= {"linear_act", "mlp"}
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    for op, row in table.items():
        assert list(row) == [backend.name for backend in _registry.BACKENDS]
        assert row["eager"] is None
        for name, reason in row.items():
            refusals = [_registry.refusal(name, op, device, dtype) for device in devices]
            assert reason == (None if None in refusals else refusals[0])
            assert reason != ""


@NO_CUDA
def test_info_says_why_a_backend_does_not_serve(no_cpu_library):
    row = aefast.info.backends()["mlp"]
    assert row["cuda"] == "no cuda library, says the test"
    assert row["triton"] == "torch finds no CUDA device, and TRITON_INTERPRET is not 1"
    assert row["cpu"] == "no cpu library, says the test"
