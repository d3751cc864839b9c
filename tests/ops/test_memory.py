"""Memory of large tensors, which the CPU library keeps for the next ones."""

import ctypes
import gc
import itertools
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import aefast
import aefast.functional as AF
from aefast import _library
from aefast.ops import _registry
from support import numerics

MEGABYTE = 1 << 20
# A megabyte in float32.
ROWS, COLS = 512, 512


@pytest.fixture(autouse=True)
def cpu_library():
    numerics.require_backend("cpu", "linear_act", "cpu", torch.float32)
    if torch.__version__ < "2.11":
        pytest.skip("this torch makes no tensors of the library's memory")


@pytest.fixture
def keep():
    """Sets the limit in bytes, for the length of a test, with nothing kept at first."""
    before = torch.ops.aefast_cpu.keep_memory(0)
    torch.ops.aefast_cpu.keep_memory(before)
    yield torch.ops.aefast_cpu.keep_memory
    torch.ops.aefast_cpu.keep_memory(before)


def output(rows=ROWS, cols=COLS, fill=1.0, dtype=torch.float32):
    """A new tensor (rows, cols) of one number, made by the library."""
    ones, column = torch.full((rows, 1), fill, dtype=dtype), torch.ones(cols, 1, dtype=dtype)
    with torch.no_grad():
        return AF.linear_act(ones, column)


def where_it_was(**options):
    out = output(**options)
    return out.data_ptr()


def changes(call):
    """The bytes that torch allocates and frees during a call, in order."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def large(changes):
    return [change for change in changes if abs(change) >= MEGABYTE // 4]


def test_memory_of_a_freed_tensor_is_that_of_the_next(keep):
    first = where_it_was()
    assert large(changes(lambda: output())) == []
    assert where_it_was() == first
    # Other shapes and types of up to a fourth less take it too.
    assert where_it_was(rows=ROWS * 3 // 4) == first
    assert where_it_was(rows=ROWS // 2, dtype=torch.float64) == first
    assert where_it_was(rows=ROWS * 3 // 4 - 1) != first
    assert where_it_was(rows=ROWS + 1) != first


def test_of_several_the_smallest_and_latest_is_taken(keep):
    sizes = [ROWS, ROWS + 32, ROWS + 64, ROWS + 32]
    kept = [output(rows=rows) for rows in sizes]
    places = [one.data_ptr() for one in kept]
    for index in (0, 1, 2, 3):
        kept[index] = None
    assert where_it_was(rows=ROWS + 1) == places[3]
    assert where_it_was(rows=ROWS) == places[0]
    assert where_it_was(rows=ROWS + 64) == places[2]


def test_tensors_in_use_share_nothing(keep):
    held = {}
    for turn in range(60):
        held[turn % 7] = output(rows=ROWS + turn % 5, fill=float(turn))
        for index, one in held.items():
            assert bool((one == float(turn - (turn - index) % 7)).all())
    assert len({one.data_ptr() for one in held.values()}) == 7


def test_views_and_gradients_hold_their_memory(keep):
    weight = torch.ones(COLS, 1, requires_grad=True)
    x = torch.full((4 * ROWS, 1), 2.0, requires_grad=True)
    out = AF.linear_act(x, weight)
    view = out[1:3, 5:7]
    out.sum().backward()
    del out
    others = [output(rows=4 * ROWS, fill=float(number)) for number in range(3)]
    assert view.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert x.grad.unique().tolist() == [float(COLS)] and len(others) == 3


def test_no_more_than_the_limit_lies_idle(keep):
    keep(3 * MEGABYTE)

    def work():
        several = [output() for _ in range(4)]
        del several
        keep(MEGABYTE)
        keep(0)
        output()

    at_once, kept = [MEGABYTE] * 4 + [-MEGABYTE], [-MEGABYTE] * 3
    assert large(changes(work)) == [*at_once, *kept, MEGABYTE, -MEGABYTE]
    assert keep(5) == 0 and keep(2 * MEGABYTE) == 5
    assert large(changes(lambda: output(rows=3 * ROWS))) == [3 * MEGABYTE, -3 * MEGABYTE]


def test_what_nobody_has_asked_for_in_long_is_freed(keep):
    def work(turns):
        output(rows=4 * ROWS)
        for _ in range(turns):
            output()

    assert large(changes(lambda: work(512))) == [4 * MEGABYTE, MEGABYTE]
    keep(0), keep(16 * MEGABYTE)
    assert large(changes(lambda: work(514))) == [4 * MEGABYTE, MEGABYTE, -4 * MEGABYTE]


def test_small_tensors_are_torchs(keep):
    assert changes(lambda: output(rows=64, cols=64))[-1] == -64 * 64 * 4


def test_such_a_tensor_is_one_like_others(keep, tmp_path):
    out = output(fill=3.0)
    assert out.untyped_storage().nbytes() == out.numel() * 4 and out.is_contiguous()
    torch.save(out, tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt"), out)
    assert torch.equal(pickle.loads(pickle.dumps(out)), out)
    shared = output(fill=3.0).share_memory_()
    assert shared.is_shared() and torch.equal(shared, out)
    assert output(fill=2.0).numpy().max() == 2.0
    out.resize_(ROWS, COLS // 2)
    with pytest.raises(RuntimeError, match="not resizable"):
        out.resize_(2 * ROWS, COLS)
    with pytest.raises(RuntimeError, match="not resizable"):
        out.untyped_storage().resize_(0)


def test_threads_take_and_free_at_once(keep):
    wrong = []

    def work(number):
        for turn in range(50):
            value = float(50 * number + turn)
            one = output(rows=ROWS + turn % 3, fill=value)
            if not bool((one == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def run(script, **environment):
    head = """
        import os, sys, torch
        import aefast.functional as AF
        ones, column = torch.ones(512, 1), torch.ones(512, 1)
        def output():
            with torch.no_grad():
                return AF.linear_act(ones, column)
    """
    source = textwrap.dedent(head) + textwrap.dedent(script)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("op", ["linear_act", "mlp"])
def test_memory_that_is_not_there_is_an_error_that_says_so(op):
    # 64 TiB of outputs, more than an address space holds.
    x, weight = torch.ones(1 << 23, 1), torch.ones(1 << 21, 1)
    call = {
        "linear_act": lambda: AF.linear_act(x, weight, None, "relu"),
        "mlp": lambda: AF.mlp(x, [weight], [None], ["relu"]),
    }[op]
    with pytest.raises(RuntimeError, match=r"can.t allocate memory|out of memory\. Tried to allocate"):
        call()


@pytest.mark.parametrize(("megabytes", "limit"), [(None, 512), ("0", 0), ("7", 7)])
def test_the_limit_of_the_environment(megabytes, limit):
    environment = {} if megabytes is None else {"AEFAST_CPU_CACHE_MB": megabytes}
    found = run("output(); print(torch.ops.aefast_cpu.keep_memory(0))", **environment)
    assert found.stdout == f"{limit << 20}\n", found.stderr


@pytest.mark.parametrize("megabytes", ["lots", "-1"])
def test_a_limit_that_is_no_number(megabytes):
    found = run("output()", AEFAST_CPU_CACHE_MB=megabytes)
    message = "AEFAST_CPU_CACHE_MB must be a whole number of megabytes, 0 or more, got"
    assert found.returncode != 0 and f"{message} '{megabytes}'" in found.stderr


def test_tensors_that_outlive_the_program():
    found = run("kept = output(); sys.modules['kept'] = output(); output(); print('done')")
    assert (found.returncode, found.stdout) == (0, "done\n"), found.stderr


def test_a_forked_process_goes_on():
    script = """
        import threading
        torch.set_num_threads(1)
        # Loads the library, which no child can do while another thread is at it.
        output()
        stop = threading.Event()
        def work():
            while not stop.is_set():
                output()
        thread = threading.Thread(target=work)
        thread.start()
        codes = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                is_right = all(bool((output() == 1).all()) for _ in range(5))
                os._exit(0 if is_right else 1)
            codes.append(os.waitpid(child, 0)[1])
        stop.set()
        thread.join()
        print(codes == [0] * 20)
    """
    found = run(script)
    assert found.stdout == "True\n", found.stderr


def test_nothing_is_kept_where_that_is_asked_for():
    with _library.without_kept_memory():
        assert large(changes(lambda: output())) == [MEGABYTE, -MEGABYTE]
        assert large(changes(lambda: output())) == [MEGABYTE, -MEGABYTE]
    output()
    gc.collect()
    assert large(changes(lambda: output())) == []


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = [
        *((f"other{index}", ctypes.c_size_t) for index in range(7)),
        ("uordblks", ctypes.c_size_t),
        *((f"other{index}", ctypes.c_size_t) for index in (7, 8)),
    ]


@pytest.mark.parametrize("name", sorted(_registry.OPS))
def test_calls_leave_nothing_behind(name):
    """Forward and backward, in the heap of the C library, where all that is not a tensor's memory comes from."""
    try:
        heap = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("this C library does not say how much of its heap is in use")
    heap.restype = Heap
    op, dtype = _registry.OPS[name], torch.float32
    numerics.require_backend("cpu", name, "cpu", dtype)
    sizes = {
        index: sample_size(sample) for index, sample in enumerate(op.samples(torch.device("cpu"), dtype))
    }
    smallest = min((index for index in sizes if sizes[index] > 0), key=sizes.get)
    sample = next(itertools.islice(op.samples(torch.device("cpu"), dtype), smallest, None))

    sample = numerics.with_gradients(sample)
    inputs = numerics.leaves(sample)

    def call():
        outputs = [one for one in numerics.outputs_of(op.function(**sample)) if one.requires_grad]
        torch.autograd.grad(outputs, inputs, [torch.ones_like(one) for one in outputs])

    def grown(calls):
        before = heap().uordblks
        for _ in range(calls):
            call()
        return (heap().uordblks - before) / calls

    with aefast.backend("cpu"):
        grown(200)
        # Half of the smallest block.
        assert min(grown(500) for _ in range(3)) < 16


def sample_size(sample):
    """Elements of all tensors of a sample, 0 if one of them is empty."""
    tensors = [one for value in sample.values() for one in (value if isinstance(value, list) else [value])]
    counts = [one.numel() for one in tensors if isinstance(one, torch.Tensor)]
    return 0 if 0 in counts else sum(counts)
