"""`aefast.patch`: what is swapped gives the same, what is not says why, and all of it can be undone."""

import copy
import functools
import io
import itertools
import pickle
import typing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import aefast
import aefast.functional as AF
from aefast.errors import AefastError, InputError
from aefast.patch import Report, patch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """The names of the fused ops in the order of their calls."""
    found = []

    def counted(name, function):
        def call(*arguments, **options):
            found.append(name)
            return function(*arguments, **options)

        return call

    for name in ("linear_act", "mlp", "reconstruction_loss"):
        monkeypatch.setattr(AF, name, counted(name, getattr(AF, name)))
    return found


def results(model, *arguments, seed=1):
    """The outputs of a model and the gradients of its parameters."""
    torch.manual_seed(seed)
    out = model(*arguments)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    return [out, *(gradient for gradient in gradients if gradient is not None)]


def check(model, *arguments):
    """That a patched model is made of the same parts and gives the same to rounding, and undone bit for bit."""
    before = results(model, *arguments)
    parts = [*model.named_modules(), *model.named_parameters()]
    keys, shown = list(model.state_dict()), repr(model)
    report = patch(model)
    assert list(model.state_dict()) == keys
    assert all(
        new[0] == old[0] and new[1] is old[1]
        for new, old in zip([*model.named_modules(), *model.named_parameters()], parts, strict=True)
    )
    assert repr(model) == shown
    torch.testing.assert_close(results(model, *arguments), before)
    report.undo()
    assert all(torch.equal(*pair) for pair in zip(results(model, *arguments), before, strict=True))
    assert not any(isinstance(module, aefast.patch._classes.Patched) for module in model.modules())
    return report


def swapped(report):
    return [(entry.where, entry.what) for entry in report.swapped]


def left(report):
    return {entry.where: entry.reason for entry in report.left}


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.ELU(0.5), nn.SELU(), nn.SiLU(), nn.GELU()),
    *(nn.GELU(approximate="tanh"), nn.Tanh(), nn.Sigmoid(), nn.Softplus()),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_sequential_of_any_activation(activation, calls):
    model = nn.Sequential(nn.Linear(6, 9), activation, nn.Linear(9, 4, bias=False))
    name = type(activation).__name__
    assert swapped(check(model, torch.randn(7, 6))) == [("0-2", f"Linear + {name} + Linear → mlp")]
    assert calls == ["mlp"]


def test_runs_end_where_they_must(calls):
    model = nn.Sequential(
        *(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.LeakyReLU(0.1)),
        *(nn.Linear(8, 8), nn.LeakyReLU(0.3), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)),
        *(nn.Unflatten(1, (2, 4)), nn.Sequential(nn.Linear(4, 5), nn.SiLU())),
    )
    report = check(model, torch.randn(9, 6))
    assert swapped(report) == [
        ("0-1", "Linear + Tanh → linear_act"),
        ("3-4", "Linear + LeakyReLU → linear_act"),
        ("5-7", "Linear + LeakyReLU + Linear → mlp"),
        ("11:0-1", "Linear + SiLU → linear_act"),
    ]
    assert left(report) == {
        "9": "it is followed by Unflatten, which is no activation that can be fused with it"
    }
    assert calls == ["linear_act", "linear_act", "mlp", "linear_act"]


@pytest.mark.parametrize(
    "follower",
    [nn.Mish(), nn.Softplus(2.0), nn.Softplus(threshold=1.0), nn.LeakyReLU(-0.1), nn.BatchNorm1d(4)],
    ids=str,
)
def test_what_is_no_activation_of_aefast_is_left(follower):
    model = nn.Sequential(nn.Linear(6, 4), follower)
    report = check(model, torch.randn(5, 6))
    assert swapped(report) == []
    assert f"followed by {type(follower).__name__}" in left(report)["0"]


def test_an_activation_with_hooks_is_left_and_said_to_have_them():
    model, seen = nn.Sequential(nn.Linear(6, 4), nn.ReLU()), []
    model[1].register_forward_hook(lambda module, arguments, out: seen.append(out))
    report = aefast.patch(model)
    assert left(report) == {"0": "the ReLU that follows it has hooks, or a forward of its own"}
    model(torch.randn(5, 6))
    assert len(seen) == 1


class Registered(nn.Module):
    """A family that knows its members, each name once."""

    members: typing.ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **options):
        if cls.__name__ in Registered.members:
            raise TypeError(f"{cls.__name__} is there twice")
        Registered.members[cls.__name__] = cls

    def __init__(self, size=6):
        super().__init__()
        self.size = size
        self.fc = nn.Linear(size, size)

    def __reduce__(self):
        return type(self), (self.size,)

    def forward(self, x):
        return F.relu(self.fc(x))


class Member(Registered):
    pass


def test_families_of_classes_get_no_members():
    model = Member()
    check(model, torch.randn(5, 6))
    assert Registered.members == {"Member": Member}
    patch(model)
    # As it is copied unpatched: by its arguments alone.
    copied = copy.deepcopy(model)
    assert isinstance(copied, Member) and isinstance(copied, aefast.patch._classes.Patched)
    assert copied.fc.weight.shape == (6, 6)


class InPlace(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.activation = activation
        self.body = nn.Sequential(
            nn.Sequential(nn.Linear(6, 6), activation, nn.Linear(6, 6), activation), nn.Dropout(inplace=True)
        )
        self.tail = nn.Sequential(nn.Linear(6, 6), activation, nn.ReLU(inplace=True))

    def forward(self, x):
        for layer in self.layers:
            h = self.activation(layer(x))
            h += x
            x = h
        x = self.body(x).mul_(2)
        return self.tail(x)


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.2), nn.ELU(0.5), nn.SELU(), nn.SiLU(), nn.GELU(), nn.Softplus()], ids=str
)
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_results_may_be_changed_in_place(activation, shape):
    name = type(activation).__name__
    assert swapped(check(InPlace(activation), torch.randn(shape))) == [
        ("forward", "self.activation(layer(x)) → linear_act"),
        ("body.0:0-3", f"Linear + {name} + Linear + {name} → mlp"),
        ("tail:0-1", f"Linear + {name} → linear_act"),
    ]


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        linear = functools.partial(nn.Linear, 6, 6, dtype=torch.complex64)
        self.body = nn.Sequential(linear(), nn.Tanh(), linear())
        self.stack = nn.ModuleList([linear()])
        self.first, self.second, self.activation = linear(), linear(), nn.Tanh()

    def forward(self, x):
        x = torch.tanh(self.first(self.body(x)))
        x = self.second(x).sigmoid()
        for layer in self.stack:
            x = self.activation(layer(x))
        return x.abs()


def test_operands_that_aefast_does_not_take(calls):
    report = check(Complex(), torch.randn(5, 6, dtype=torch.complex64))
    assert [what.rpartition(" ")[2] for _, what in swapped(report)] == ["linear_act"] * 3 + ["mlp"]
    assert calls == ["mlp", *["linear_act"] * 3]


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def with_hook():
    layer = nn.Linear(6, 4)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def with_forward():
    layer = nn.Linear(6, 4)
    layer.forward = lambda x: x[..., :4]
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Odd(6, 4), "Odd is a subclass of Linear, which may do something else"),
        (with_hook, "it has hooks, or a forward of its own"),
        (with_forward, "it has hooks, or a forward of its own"),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), "it is parametrized"),
    ],
)
def test_unusual_layers_are_left(make, reason):
    model = nn.Sequential(make(), nn.ReLU())
    report = patch(model)
    assert left(report) == {"0": reason}
    assert type(model) is nn.Sequential


def test_convolutions_are_left_and_nothing_is_touched():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    report = patch(model)
    assert (report.swapped, left(report)) == ((), {"0": "aefast has no op for convolutions"})
    assert type(model) is nn.Sequential
    assert "0  Conv2d: aefast has no op for convolutions" in str(report)
    assert patch(nn.Flatten()).left[0].reason == "it has no part that aefast has an op for"


class Net(nn.Module):
    """As people write them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.act = nn.GELU()
        self.second = nn.Linear(8, 8)
        self.stack = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.heads = nn.ModuleDict({"mean": nn.Linear(8, 3)})
        self.gate = nn.Linear(8, 3)
        self.plain = nn.Linear(3, 3)
        self.function = torch.tanh
        self.scale = 1.0
        self.calls = 0

    def encode(self, x):
        x = self.first(x)
        x = self.act(x)
        h = self.second(x)
        return F.leaky_relu(h, negative_slope=0.2)

    def forward(self, x, other=None, *, double=False):
        self.calls = self.calls + 1
        h = self.encode(x)
        for layer in self.stack:
            h = F.relu(layer(h))
        if self.training:
            h = F.dropout(h, 0.25)
        if other is not None:
            h = h + other
        mean = self.function(self.heads["mean"](h))
        gate = self.gate(h).sigmoid()
        return self.scale * self.plain(mean * gate) * (2 if double else 1)


SITES = [
    ("encode", "self.act(self.first(x)) → linear_act"),
    ("encode", "F.leaky_relu(self.second(x), negative_slope=0.2) → linear_act"),
    ("forward", "F.relu(layer(h)) → linear_act"),
    ("forward", "self.function(self.heads['mean'](h)) → linear_act"),
    ("forward", "self.gate(h).sigmoid() → linear_act"),
]


def test_a_hand_written_module(calls):
    model, x = Net(), torch.randn(5, 6)
    report = check(model, x)
    assert swapped(report) == SITES
    assert calls == ["linear_act"] * 6
    # The loop's layers are only known in each call, and so every layer of the module may be among them.
    assert left(report) == {}
    assert model.calls == 3


def test_what_changes_later_is_followed():
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    patch(model)
    x = torch.randn(5, 6)

    def both(*arguments, **options):
        torch.manual_seed(2)
        expected = twin(*arguments, **options)
        torch.manual_seed(2)
        torch.testing.assert_close(model(*arguments, **options), expected)
        return expected

    before = both(x)
    for change in (
        lambda net: net.eval(),
        lambda net: setattr(net, "scale", 3.0),
        lambda net: setattr(net, "act", nn.Mish()),
        lambda net: setattr(net, "function", torch.cos),
        lambda net: setattr(net.first, "weight", nn.Parameter(torch.ones(8, 6))),
        lambda net: net.second.register_forward_hook(lambda module, inputs, output: -output),
        lambda net: net.heads.update({"mean": Odd(8, 3)}),
        lambda net: parametrizations.orthogonal(net.gate),
        lambda net: net.double(),
    ):
        torch.manual_seed(3)
        change(model)
        torch.manual_seed(3)
        change(twin)
        x = x.to(model.first.weight.dtype)
        after = both(x)
        assert after.dtype != before.dtype or not torch.allclose(after, before)
        before = after
    both(x, torch.ones(8, dtype=torch.float64), double=True)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return F.silu(self.fc(x))


def derived_from(shift):
    class Derived(Base):
        def forward(self, x):
            return super().forward(x) + torch.sigmoid(self.fc(x)) + shift

    return Derived()


def test_super_and_closures():
    model = derived_from(shift=3.0)
    assert swapped(check(model, torch.randn(5, 6))) == [("forward", "torch.sigmoid(self.fc(x)) → linear_act")]


def passed_on(function):
    return function


class Decorated(Base):
    @passed_on
    def forward(self, x):
        return F.silu(self.fc(x))


class NotAlone(Base):
    def forward(self, x):
        h = self.fc(x)
        y = F.relu(h)
        return y + h


def test_what_cannot_be_rewritten_is_left():
    for module, reason in ((Decorated(), "forward: it is decorated"), (NotAlone(), "")):
        report = check(module, torch.randn(5, 6))
        assert swapped(report) == []
        assert "no activation that could be fused is applied to its output where" in left(report)["fc"]
        assert reason in left(report)["fc"]
    # Without a file behind it there is no source.
    space = {"Base": Base, "F": F}
    exec("class Made(Base):\n    def forward(self, x):\n        return F.silu(self.fc(x))", space)
    assert "forward: its source cannot be read" in left(patch(space["Made"]()))["fc"]


def test_a_source_that_has_changed_is_left(tmp_path, monkeypatch):
    text = "from torch import nn\nimport torch.nn.functional as F\n\n\nclass Net(nn.Module):\n"
    text += "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(6, 6)\n\n"
    text += "    def forward(self, x):\n        return F.silu(self.fc(x)) + 1\n"
    (tmp_path / "changed.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import changed

    assert swapped(check(changed.Net(), torch.randn(5, 6))) == [
        ("forward", "F.silu(self.fc(x)) → linear_act")
    ]
    (tmp_path / "changed.py").write_text(text.replace("+ 1", "- 1"))
    report = patch(changed.Net())
    assert report.swapped == ()
    assert "forward: its source is not, or no longer, what it was made from" in left(report)["fc"]


def test_blocks_of_one_class_share_a_class():
    model = nn.Sequential(*(Base() for _ in range(3)))
    patch(model)
    assert len({type(block) for block in model}) == 1


LOSSES = [
    *(nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.L1Loss(), nn.HuberLoss(delta=0.5), nn.SmoothL1Loss()),
    *(nn.BCELoss(), nn.BCEWithLogitsLoss(reduction="sum")),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{loss.reduction}")
def test_a_loss_and_both_its_gradients(loss, calls):
    pair = [torch.rand(7, 5, requires_grad=True) for _ in range(2)]
    before = loss(*pair)
    expected = torch.autograd.grad(before, pair)
    report = patch(loss)
    assert swapped(report) == [("", f"{type(loss).__name__} → reconstruction_loss")]
    after = loss(*pair)
    assert calls == ["reconstruction_loss"]
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(torch.autograd.grad(after, pair), expected)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (nn.MSELoss(reduction="none"), "its reduction is 'none'"),
        (nn.SmoothL1Loss(beta=0.5), "aefast has no such loss with this beta"),
        (nn.BCELoss(weight=torch.ones(3)), "aefast has no such loss with this weight"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "aefast has no such loss with this pos_weight"),
        (nn.CrossEntropyLoss(), "aefast has no such loss"),
    ],
)
def test_other_losses_are_left(loss, reason):
    original = type(loss)
    (entry,) = patch(loss).left
    assert entry.reason.startswith(reason)
    assert type(loss) is original


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_does_what_torch_does_where_aefast_would_not():
    loss, plain = nn.MSELoss(), nn.MSELoss()
    patch(loss)
    x, y = torch.rand(4, 3), torch.rand(4, 3)
    hole = x.clone()
    hole[0, 0] = float("nan")
    for pair in ((x, y[:1]), (hole, y), (x.half(), y.half()), (x.double(), y), (x[:0], y[:0])):
        expected = plain(*pair)
        torch.testing.assert_close(loss(*pair), expected, equal_nan=True, rtol=0, atol=0)
    loss.reduction = "none"
    assert torch.equal(loss(x, y), (x - y).square())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.MSELoss()(x.bfloat16(), y.bfloat16()).dtype == torch.float32
        patched = nn.L1Loss()
        patch(patched)
        assert patched(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    strict = nn.BCELoss()
    patch(strict)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        strict(x + 1, y)


class Objective(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.delta = 0.7

    def forward(self, x):
        y = self.fc(x)
        value = F.mse_loss(y, x) + F.huber_loss(input=y, target=x, delta=self.delta, reduction="sum")
        value = value + F.binary_cross_entropy_with_logits(y, x.sigmoid())
        return value + F.l1_loss(y, x, reduction="none").sum()


def test_losses_in_methods(calls):
    report = check(Objective(), torch.randn(5, 6))
    assert swapped(report) == [
        ("forward", f"{name} → reconstruction_loss")
        for name in ("mse_loss", "huber_loss", "binary_cross_entropy_with_logits")
    ]
    assert "its reduction is 'none'" in left(report)["forward"]
    assert calls == ["reconstruction_loss"] * 3


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.loss = nn.MSELoss()

    def forward(self, x):
        return self.loss(self.decoder(self.net(x)), x)


def patched_classes(model):
    return [type(module) for module in model.modules() if isinstance(module, aefast.patch._classes.Patched)]


def test_copies_are_patched_and_pickles_are_not():
    model, x = Whole(), torch.randn(5, 6)
    before = results(model, x)
    with patch(model):
        twin = copy.deepcopy(model)
        assert patched_classes(twin) == patched_classes(model)
        assert not {id(one) for one in twin.parameters()} & {id(one) for one in model.parameters()}
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        again = [
            pickle.loads(pickle.dumps(model, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
        ]
    torch.testing.assert_close(results(twin, x), before)
    for one in (loaded, *again):
        assert patched_classes(one) == []
        assert all(torch.equal(*pair) for pair in zip(results(one, x), before, strict=True))


class Reduced(Base):
    def __init__(self, options=None):
        super().__init__()
        self.options = options

    def __reduce__(self):
        return type(self), (self.options,)


class Exported(Base):
    def __reduce__(self):
        return nn.Identity, ()


def test_copies_and_pickles_of_what_says_how_it_is_made():
    model, exported = Reduced({"alpha": 1}), Exported()
    patch(model)
    patch(exported)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) is not Reduced
    assert twin.options == model.options
    assert twin.options is not model.options
    assert type(pickle.loads(pickle.dumps(model))) is Reduced
    assert type(copy.deepcopy(exported)) is nn.Identity


def test_under_compile_as_one_graph():
    model, x = Whole(), torch.randn(5, 6)
    model.eval()
    before = results(model, x)
    report = patch(model)
    # Without a code generator, whose work is not in question here.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, x), before)
    report.undo()
    torch.testing.assert_close(results(compiled, x), before)


def test_under_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model, x = Whole(), torch.randn(5, 6)
        twin = copy.deepcopy(model)
        wrapped, wrapped_twin = DistributedDataParallel(model), DistributedDataParallel(twin)
        report = patch(wrapped)
        assert ("module.decoder:0-2", "Linear + ReLU + Linear → mlp") in swapped(report)
        gradients = []
        for one in (wrapped, wrapped_twin):
            torch.manual_seed(1)
            one(x).backward()
            gradients.append([parameter.grad for parameter in one.parameters()])
        torch.testing.assert_close(*gradients)
    finally:
        dist.destroy_process_group()


def test_training_takes_the_same_course():
    models = Whole(), Whole()
    models[1].load_state_dict(models[0].state_dict())
    patch(models[0])
    losses = []
    for model in models:
        torch.manual_seed(4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(32, 6))
            loss.backward()
            optimizer.step()
        losses.append(loss)
    # Twenty steps enlarge roundings a little.
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_hooks_of_patched_modules_stay():
    model = Whole()
    seen = []
    for module in (model, model.decoder, model.loss):
        module.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    patch(model)
    model(torch.randn(5, 6))
    assert seen == ["Sequential", "MSELoss", "Whole"]


def test_a_second_patch_does_nothing():
    model = Whole()
    first = patch(model)
    classes = [type(module) for module in model.modules()]
    second = patch(model)
    assert second.swapped == ()
    assert left(second) == {name: "it is patched already" for name in ("net", "decoder", "loss")}
    second.undo()
    assert [type(module) for module in model.modules()] == classes
    first.undo()
    first.undo()
    assert patched_classes(model) == []


def test_undo_refuses_what_it_does_not_know():
    model = Whole()
    report = patch(model)
    before = type(model.decoder)
    model.decoder.__class__ = type("Other", (before,), {})
    with pytest.raises(AefastError, match="class of decoder has changed since, to Other"):
        report.undo()
    assert patched_classes(model) != []
    model.decoder.__class__ = before
    report.undo()
    assert patched_classes(model) == []


def test_kinds_and_skip():
    whats = {"dense": {"linear_act", "mlp"}, "losses": {"reconstruction_loss"}, "pythae": set()}
    for kinds in itertools.chain.from_iterable(itertools.combinations(whats, n) for n in range(4)):
        found = {what.rpartition(" ")[2] for _, what in swapped(patch(Whole(), kinds=kinds))}
        assert found == set().union(*(whats[kind] for kind in kinds))
    report = patch(Whole(), skip=["net", "loss"])
    assert swapped(report) == [("decoder:0-2", "Linear + ReLU + Linear → mlp")]
    assert left(report) == {"net": "it is skipped", "loss": "it is skipped"}


@pytest.fixture
def run_alone(monkeypatch):
    """The modules of torch whose own forward has run, in order."""
    found = []

    def recorded(module_class):
        forward = module_class.forward

        def run(self, *arguments):
            found.append(self)
            return forward(self, *arguments)

        return run

    for module_class in (nn.Linear, nn.ReLU, nn.GELU):
        monkeypatch.setattr(module_class, "forward", recorded(module_class))
    return found


# What runs alone where one of these is skipped, and the ops for the rest.
SKIPPED = {
    "decoder.0": (["decoder.0", "decoder.1", "decoder.2"], []),
    "decoder.1": (["decoder.0", "decoder.1", "decoder.2"], []),
    "decoder.2": (["decoder.2"], ["linear_act"]),
    "decoder": (["decoder.0", "decoder.1", "decoder.2"], []),
}


@pytest.mark.parametrize("name", SKIPPED)
@pytest.mark.parametrize("is_copy", [False, True], ids=["itself", "a copy"])
def test_skipped_children_of_a_sequential_run_alone(name, is_copy, run_alone, calls):
    model, x = Whole(), torch.randn(5, 3)
    report = patch(model, skip=[name])
    assert left(report)[name] == "it is skipped"
    model = copy.deepcopy(model) if is_copy else model
    model.decoder(x)
    alone, ops = SKIPPED[name]
    assert run_alone == [model.get_submodule(one) for one in alone]
    assert calls == ops


@pytest.mark.parametrize(
    ("name", "alone", "kept"),
    [
        ("first", ["first", "act", "stack.0", "stack.1"], SITES[1:2] + SITES[3:]),
        ("act", ["first", "act", "stack.0", "stack.1"], SITES[1:2] + SITES[3:]),
        ("stack.1", ["stack.0", "stack.1"], SITES[:2] + SITES[3:]),
        ("heads", ["stack.0", "stack.1", "heads.mean"], SITES[:2] + SITES[4:]),
    ],
)
def test_skipped_modules_that_methods_call_run_alone(name, alone, kept, run_alone):
    model = Net()
    report = patch(model, skip=[name])
    assert swapped(report) == kept
    assert left(report)[name] == "it is skipped"
    assert left(report)["forward"] == "it calls a module that is skipped, or may do so"
    model(torch.randn(5, 6))
    assert run_alone == [*(model.get_submodule(one) for one in alone), model.plain]


def test_the_reason_names_a_skipped_activation():
    assert left(patch(Whole(), skip=["decoder.1"]))["decoder.0"] == "the ReLU that follows it is skipped"


def test_what_is_skipped_is_not_touched():
    model = Whole()
    before = {name: (type(one), dict(vars(one))) for name, one in model.decoder.named_modules()}
    patch(model, skip=["decoder"])
    assert {name: (type(one), dict(vars(one))) for name, one in model.decoder.named_modules()} == before


def test_a_layer_of_two_parents_is_skipped_in_both(run_alone):
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {"one": nn.Sequential(shared, nn.ReLU()), "other": nn.Sequential(shared, nn.ReLU())}
    )
    patch(model, skip=["one"])
    model["other"](torch.randn(2, 4))
    assert run_alone[0] is shared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.relu}, "model must be a torch.nn.Module, got builtin_function_or_method"),
        (
            {"kinds": ("dens",)},
            "kinds must be among dense, losses, pythae, got 'dens'; did you mean 'dense'?",
        ),
        ({"kinds": "dense"}, "kinds must be a sequence of names, got 'dense'"),
        (
            {"skip": ["decode"]},
            "skip must be names of the model's modules, got 'decode'; did you mean 'decoder'?",
        ),
        ({"noise": "numpy"}, "noise must be one of fused, torch, got 'numpy'"),
    ],
)
def test_what_it_does_not_take(arguments, message):
    model = Whole()
    with pytest.raises(InputError) as error:
        patch(**{"model": model, **arguments})
    assert str(error.value) == f"patch: {message}"
    assert patched_classes(model) == []


def test_the_package_is_what_one_calls():
    report = aefast.patch(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert isinstance(report, Report)
    assert str(report) == "1 swapped, 0 left as they were\n  0-1  Linear + ReLU → linear_act"
    with pytest.raises(AttributeError, match="module 'aefast' has no attribute 'pach'"):
        aefast.pach  # noqa: B018
