"""The update that `CapturedStep` makes on the CPU, beside the optimizer's own step."""

import copy
import platform
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import aefast
from aefast.train.update import Update
from support import numerics

STEPS = 4
OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True),
    "adam, options": lambda groups: torch.optim.Adam(
        groups, lr=0.01, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1, maximize=True, fused=True
    ),
    "adam, decoupled": lambda groups: torch.optim.Adam(
        groups, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, fused=True
    ),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=True),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True, fused=True),
    "not fused": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "tensor lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.01), fused=True),
    "adamw, tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01), fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 7), (7,), (), (0, 3), (5, 2))
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_gradients(some, step):
    """New ones at each step; the last parameter has one at every other."""
    for index, one in enumerate(some):
        generator = torch.Generator().manual_seed(100 * step + index)
        gradient = torch.randn(one.shape, generator=generator, dtype=torch.float64)
        one.grad = None if index == len(some) - 1 and step % 2 else gradient.to(one.dtype)


def groups_of(some):
    return [{"params": some[:2]}, {"params": some[2:], "lr": 0.03}]


def fused(some):
    return torch.optim.Adam(some, lr=0.01, fused=True)


def trained(some, optimizer, update=None, first=0):
    for step in range(first, first + STEPS):
        set_gradients(some, step)
        (optimizer if update is None else update).step()
    return some


def assert_same(found, expected, atol=0.0):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def rounding(dtype):
    """Between two updates of numbers below 4: at each step either rounds a parameter twice and what is added to it,
    which is 30 times as small, some ten times."""
    return STEPS * 4 * 3 * torch.finfo(dtype).eps


def rounding_of(name, dtype):
    """The same of one of OPTIMIZERS; 0 where the update is torch's."""
    is_own = dtype in (torch.float32, torch.float64) and name not in ("amsgrad", "not fused", "sgd")
    return rounding(dtype) if is_own else 0.0


@pytest.fixture
def cpu_library():
    numerics.require_backend("cpu", "mlp", "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_is_the_optimizers(instruction_set, name, dtype):
    expected, found = parameters(dtype), parameters(dtype)
    theirs, ours = (OPTIMIZERS[name](groups_of(some)) for some in (expected, found))
    trained(expected, theirs)
    trained(found, ours, Update(ours))
    assert_same(found, expected, rounding_of(name, dtype))
    assert_same(ours.state_dict(), theirs.state_dict(), rounding_of(name, dtype))


@pytest.mark.usefixtures("cpu_library")
def test_the_kernel_is_aefasts(monkeypatch):
    some = parameters()
    optimizer = fused(some)
    trained(some, optimizer)
    versions = [one._version for one in some]

    def fail(*arguments, **options):
        raise AssertionError("torch's kernel was called")

    monkeypatch.setattr(torch, "_fused_adam_", fail)
    trained(some, optimizer, Update(optimizer))
    assert all(one._version > before for one, before in zip(some, versions, strict=True))


class Own(torch.Tensor):
    """As of a library that has tensors of its own."""


def plain():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def with_gaps():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))[:, ::2]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    ("make", "layout", "copies", "eps", "backend"),
    [
        (plain, lambda gradient: gradient, 1, 1e-8, "eager"),
        (plain, lambda gradient: gradient, 1, 1e-8, "triton"),
        (plain, lambda gradient: gradient.t().contiguous().t(), 1, 1e-8, "auto"),
        (with_gaps, lambda gradient: gradient, 1, 1e-8, "auto"),
        (lambda: plain().as_subclass(Own), lambda gradient: gradient, 1, 1e-8, "auto"),
        (plain, lambda gradient: gradient, 2, 1e-8, "auto"),
        (plain, lambda gradient: gradient * 1e-19, 1, 0.0, "auto"),
    ],
    ids=["eager", "other backend", "other layout", "gaps", "subclass", "twice", "no epsilon"],
)
def test_the_kernel_is_torchs(make, layout, copies, eps, backend, monkeypatch):
    """Where aefast's does not take the operands, or the user wants none of its."""
    expected, found = nn.Parameter(make()), nn.Parameter(make())
    theirs, ours = (
        torch.optim.Adam([one] * copies, lr=0.01, eps=eps, fused=True) for one in (expected, found)
    )
    update = Update(ours)
    kernel, calls = torch._fused_adam_, []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        expected.grad = layout(torch.randn(expected.shape, generator=generator))
        found.grad = expected.grad.clone()
        theirs.step()
        with aefast.backend(backend), monkeypatch.context() as patch:
            patch.setattr(torch, "_fused_adam_", lambda *a, **options: calls.append(kernel(*a, **options)))
            update.step()
    assert len(calls) == STEPS
    assert_same(found, expected)
    assert_same(ours.state_dict(), theirs.state_dict())


def averages_of(some):
    return [one.detach().clone() for one in some]


def assert_clipped_and_averaged(
    optimizers, all_parameters, clip_norm, decay, atol, backend="auto", set_all=set_gradients
):
    """The update, beside torch's functions one after the other."""
    (theirs, ours), (expected, found) = optimizers, all_parameters
    expected_averages, averages = averages_of(expected), averages_of(found)
    update = Update(ours, averages, decay)
    for step in range(STEPS):
        for some in all_parameters:
            set_all(some, step)
        nn.utils.clip_grad_norm_(expected, clip_norm)
        theirs.step()
        for average, one in zip(expected_averages, expected, strict=True):
            average.lerp_(one.detach(), 1 - decay)
        with aefast.backend(backend):
            update.step(clip_norm)
        assert_same([one.grad for one in found], [one.grad for one in expected], atol)
    assert_same(found, expected, atol)
    assert_same(averages, expected_averages, atol)
    assert_same(ours.state_dict(), theirs.state_dict(), atol)


@pytest.mark.parametrize("clip_norm", [0.5, 1e6], ids=["long", "short"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clips_and_averages_as_torch_does(instruction_set, name, dtype, clip_norm):
    """The last parameter has no gradient at every other step, and is averaged nevertheless."""
    expected, found = parameters(dtype), parameters(dtype)
    optimizers = [OPTIMIZERS[name](groups_of(some)) for some in (expected, found)]
    for one, optimizer in zip((expected, found), optimizers, strict=True):
        trained(one, optimizer)
    assert_clipped_and_averaged(optimizers, (expected, found), clip_norm, 0.75, rounding_of(name, dtype))


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_average_that_forgets_is_the_parameter(instruction_set, dtype):
    """Whatever it was before; torch's lerp goes from the nearer end, too."""
    one = nn.Parameter(torch.ones(40, dtype=dtype))
    optimizer = fused([one])
    one.grad = torch.ones_like(one)
    optimizer.step()
    average = torch.full_like(one, 1e20)
    Update(optimizer, [average], 0.0).step()
    assert torch.equal(average, one)


def test_gradients_are_left_where_they_are_short_enough():
    some = parameters()
    optimizer = fused(some)
    trained(some, optimizer)
    set_gradients(some, 0)
    before = [(one.grad.clone(), one.grad._version) for one in some]
    Update(optimizer).step(1e6)
    for one, (gradient, version) in zip(some, before, strict=True):
        assert torch.equal(one.grad, gradient) and one.grad._version == version


@pytest.mark.usefixtures("cpu_library")
def test_clipping_and_averages_take_no_pass_of_their_own(monkeypatch):
    some = parameters()
    optimizer = fused(some)
    trained(some, optimizer)
    set_gradients(some, 0)
    versions = [one.grad._version for one in some]

    def fail(*arguments, **options):
        raise AssertionError("torch's function was called")

    for module, name in ((nn.utils, "clip_grad_norm_"), (torch, "_foreach_mul_"), (torch, "_foreach_lerp_")):
        monkeypatch.setattr(module, name, fail)
    averages = averages_of(some)
    Update(optimizer, averages, 0.5).step(0.5)
    assert sum(one.grad.square().sum().item() for one in some) ** 0.5 == pytest.approx(0.5, rel=1e-5)
    assert not torch.equal(averages[0], some[0]) and averages[0]._version == 1
    assert all(one.grad._version > before for one, before in zip(some, versions, strict=True))


def shared_gradients(some, step):
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    for one in some:
        one.grad = gradient


def gradients_with_gaps(some, step):
    for index, one in enumerate(some):
        generator = torch.Generator().manual_seed(100 * step + index)
        one.grad = torch.randn(8, 6, generator=generator)[::2]


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
@pytest.mark.parametrize("set_all", [shared_gradients, gradients_with_gaps])
def test_clips_gradients_that_the_kernel_does_not_take(set_all, backend):
    all_parameters = [[nn.Parameter(plain()), nn.Parameter(plain())] for _ in range(2)]
    optimizers = [fused([{"params": [one]} for one in some]) for some in all_parameters]
    for some, optimizer in zip(all_parameters, optimizers, strict=True):
        set_all(some, 0)
        optimizer.step()
    # Those that are shared are left to torch's clipping alone.
    is_own = set_all is shared_gradients and backend == "auto"
    atol = rounding(torch.float32) if is_own else 0.0
    assert_clipped_and_averaged(optimizers, all_parameters, 0.5, 0.75, atol, backend, set_all)


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ([3e30, 4e30], [0.6, 0.8]),  # whose squares no float32 can hold
        ([torch.inf, 1.0], [torch.nan, 0.0]),
        ([torch.nan, 1.0], [torch.nan, torch.nan]),
    ],
)
def test_gradients_beyond_measure(instruction_set, gradient, expected):
    """Those that are not finite are clipped as by torch's clip_grad_norm_."""
    one = nn.Parameter(torch.ones(2))
    optimizer = fused([one])
    one.grad = torch.ones(2)
    optimizer.step()
    one.grad = torch.tensor(gradient)
    Update(optimizer).step(1.0)
    torch.testing.assert_close(one.grad, torch.tensor(expected), equal_nan=True)


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_infinite_parameters_stay(instruction_set, name):
    """Such as a mask among the logits, which has no gradient."""
    one = nn.Parameter(torch.tensor([-torch.inf, 1.0, torch.inf]))
    optimizer = OPTIMIZERS[name]([one])
    update = Update(optimizer)
    for _ in range(3):
        one.grad = torch.tensor([0.0, 0.1, 0.0])
        update.step()
    assert one[0] == -torch.inf and one[2] == torch.inf and 0.9 < one[1] < 1
    assert optimizer.state[one]["exp_avg"][[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormal_moments_are_zeros(instruction_set, dtype):
    """On all threads, whose mode is left as it was."""
    small = torch.finfo(dtype).tiny / 4
    one = nn.Parameter(torch.ones(50_000, dtype=dtype))
    optimizer = fused([one])
    one.grad = torch.ones_like(one)
    optimizer.step()
    state = optimizer.state[one]
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind][::2] = small
    one.grad = (torch.arange(len(one)) % 2).to(dtype)
    before = one.detach().clone()
    Update(optimizer).step()
    if platform.machine() in ("x86_64", "AMD64"):
        assert not state["exp_avg"][::2].any() and not state["exp_avg_sq"][::2].any()
    assert torch.equal(one[::2], before[::2])
    assert (one[1::2] < before[1::2]).all()
    assert (torch.full((100_000,), small, dtype=dtype) * 0.5 > 0).all()


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_depends_on_nothing_but_itself(instruction_set, dtype):
    """Nor on where it is, nor on how many threads there are."""
    values = torch.randn(3, 40_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    threads = torch.get_num_threads()

    def updated(cut, count):
        torch.set_num_threads(count)
        some = [nn.Parameter(one.clone()) for one in values[0].split(cut)]
        optimizer = fused(some)
        averages = averages_of(some)
        update = Update(optimizer, averages, 0.5)
        for step in (1, 2, 1):
            for one, gradient in zip(some, values[step].split(cut), strict=True):
                one.grad = gradient.clone()
            update.step()
        return torch.cat([one.detach() for one in [*some, *averages]])

    try:
        expected = updated(40_003, 1)
        for cut, count in ((40_003, 2), (40_003, 3), (9_001, 2), (77, 2)):
            assert torch.equal(updated(cut, count), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("cpu_library")
def test_the_norm_depends_on_no_thread(instruction_set):
    values = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (40_003, 9, 8192)]
    threads = torch.get_num_threads()
    try:
        norms = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norms.add(torch.ops.aefast_cpu.gradient_norm(values))
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(torch.cat(values).double().norm().item(), rel=1e-14)


def test_a_group_may_have_parameters_of_several_dtypes():
    expected, found = ([*parameters(), *parameters(torch.float64)] for _ in range(2))
    theirs, ours = fused(expected), fused(found)
    trained(expected, theirs)
    trained(found, ours, Update(ours))
    assert_same(found, expected, rounding(torch.float32))


def test_calls_the_kernel_at_once(monkeypatch):
    some = parameters()
    optimizer = fused(some)
    trained(some, optimizer)
    before = [one.detach().clone() for one in some]

    def fail(self):
        raise AssertionError("the optimizer's own step was called")

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    trained(some, optimizer, Update(optimizer))
    assert not torch.equal(some[0], before[0])


def test_follows_what_is_loaded_and_changed():
    expected, found = parameters(), parameters()
    theirs, ours = fused(expected), fused(found)
    update = Update(ours)
    trained(expected, theirs)
    trained(found, ours, update)
    for optimizer in (theirs, ours):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = 0.5
    added = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    theirs.add_param_group({"params": [added[0]]})
    ours.add_param_group({"params": [added[1]]})
    trained([*expected, added[0]], theirs, first=STEPS)
    trained([*found, added[1]], ours, update, first=STEPS)
    assert_same([*found, added[1]], [*expected, added[0]], 2 * rounding(torch.float32))


def test_hooks_run():
    some = parameters()
    optimizer = fused(some)
    update = Update(optimizer)
    trained(some, optimizer, update)
    calls = []
    registrations = [
        (optimizer.register_step_pre_hook, "before"),
        (optimizer.register_step_post_hook, "after"),
        (register_optimizer_step_pre_hook, "before any"),
        (register_optimizer_step_post_hook, "after any"),
    ]
    for register, name in registrations:
        handle = register(lambda *_, name=name: calls.append(name))
        trained(some, optimizer, update)
        handle.remove()
        trained(some, optimizer, update)
    assert calls == [name for _, name in registrations for _ in range(STEPS)]


def test_schedulers_see_the_step():
    some = parameters()
    optimizer = fused(some)
    trained(some, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trained(some, optimizer, Update(optimizer))
    # It warns where it has seen no step.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_an_own_step_is_called():
    class Counting(torch.optim.Adam):
        count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure)

        def zero_grad(self, set_to_none=True):
            self.count += 100
            super().zero_grad(set_to_none)

    some = parameters()
    optimizer = Counting(some, fused=True)
    update = Update(optimizer)
    trained(some, optimizer, update)
    update.zero_grad()
    assert optimizer.count == STEPS + 100


def test_sparse_gradients_are_refused_as_by_the_optimizer():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.Adam(embedding.parameters(), fused=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Update(optimizer).step()


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_zero_grad_forgets(name):
    some = parameters()
    optimizer = OPTIMIZERS[name](groups_of(some))
    set_gradients(some, 0)
    Update(optimizer).zero_grad()
    assert all(one.grad is None for one in some)
