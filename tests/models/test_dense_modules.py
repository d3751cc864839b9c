"""LinearAct and MLP beside the plain PyTorch modules they stand for."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from aefast.errors import InputError
from aefast.kernels.activation import ACTIVATIONS
from aefast.nn import MLP, LinearAct


def assert_as_good_as(fused, eager, truth):
    """`fused` is at most twice as far from the float64 `truth` as `eager` is, up to rounding."""
    noise = torch.finfo(fused.dtype).eps * truth.abs().max().item()
    error = (fused.double() - truth).abs().max().item()
    assert error <= 2 * (eager.double() - truth).abs().max().item() + 2 * noise


def outputs_and_gradients(module, x):
    """Output, input gradient and parameter gradients by state dict key, of a weighted sum of the output."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    output = module(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_act_matches_its_eager_twin(activation):
    torch.manual_seed(1)
    layer = LinearAct(13, 7, activation=activation, negative_slope=0.2, alpha=1.5)
    x = torch.randn(3, 5, 13)
    fused = outputs_and_gradients(layer, x)
    eager = outputs_and_gradients(layer.eager(), x)
    truth = outputs_and_gradients(layer.eager().double(), x.double())
    for name, value in fused.items():
        twin = name if name in eager else f"0.{name}"
        assert_as_good_as(value, eager[twin], truth[twin])


def test_linear_act_has_the_parameters_of_linear():
    torch.manual_seed(3)
    layer = LinearAct(20, 10, activation="gelu")
    torch.manual_seed(3)
    linear = nn.Linear(20, 10)
    assert list(layer.state_dict()) == list(linear.state_dict())
    for ours, theirs in zip(layer.parameters(), linear.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert LinearAct(2, 3, bias=False).bias is None
    assert "bias" not in LinearAct(2, 3, bias=False).state_dict()


def test_linear_act_shows_its_options():
    shown = repr(LinearAct(4, 2, activation="leaky_relu", negative_slope=0.3))
    for part in ("in_features=4", "out_features=2", "activation=leaky_relu", "negative_slope=0.3"):
        assert part in shown


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_mlp_matches_its_eager_twin(activation, bias):
    torch.manual_seed(2)
    mlp = MLP((11, 17, 5, 9), activation, "tanh", bias=bias)
    x = torch.randn(6, 11)
    fused = outputs_and_gradients(mlp, x)
    eager = outputs_and_gradients(mlp.eager(), x)
    truth = outputs_and_gradients(mlp.eager().double(), x.double())
    assert fused.keys() == eager.keys()
    for name, value in fused.items():
        assert_as_good_as(value, eager[name], truth[name])


def test_mlp_and_sequential_exchange_state_dicts():
    mlp = MLP((8, 6, 4, 3), "silu")
    sequential = nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3))
    mlp.load_state_dict(sequential.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(mlp(x), sequential(x))
    assert [type(module) for module in mlp.eager()] == [type(module) for module in sequential]


class Adapted(nn.Module):
    """A layer with something added to its output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + 1


def add_hooks(mlp):
    mlp.layers[1].register_forward_hook(lambda layer, inputs, output: output + 1)


def add_pre_hooks(mlp):
    mlp.layers[1].register_forward_pre_hook(lambda layer, inputs: (inputs[0] + 1,))


def replace_forward(mlp):
    mlp.layers[1].forward = lambda x: torch.ones(len(x), 5)


def other_activation(mlp):
    mlp.add_module("2", LinearAct(6, 5, activation="tanh"))


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: nn.utils.spectral_norm(mlp.layers[1]),
        lambda mlp: nn.utils.parametrizations.spectral_norm(mlp.layers[1]),
        lambda mlp: prune.l1_unstructured(mlp.layers[0], "weight", amount=0.5),
        add_hooks,
        add_pre_hooks,
        replace_forward,
        lambda mlp: mlp.add_module("2", Adapted(mlp.layers[1])),
        lambda mlp: mlp.add_module("1", Adapted(nn.Identity())),
        other_activation,
    ],
    ids=[
        "spectral",
        "parametrized",
        "pruned",
        "hook",
        "pre-hook",
        "forward",
        "replaced",
        "added",
        "activation",
    ],
)
def test_mlp_respects_what_sits_on_its_children(change):
    torch.manual_seed(3)
    mlp = MLP((7, 6, 5, 4)).eval()
    change(mlp)
    # Hooks compute the weight from such a parameter anew at every call.
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(3, 7)
    output = mlp(x)
    expected = x
    for layer in mlp.children():
        expected = layer(expected)
    assert torch.equal(output, expected)


def test_mlp_runs_backward_hooks_of_its_children():
    mlp = MLP((4, 3, 2))
    seen = []
    mlp.layers[0].register_full_backward_hook(lambda *arguments: seen.append(1))
    mlp.layers[1].register_full_backward_pre_hook(lambda *arguments: seen.append(2))
    mlp(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert sorted(seen) == [1, 2]


def test_mlp_runs_hooks_of_all_modules():
    mlp, seen = MLP((4, 3, 2)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *arguments: seen.append(module))
    try:
        mlp(torch.randn(2, 4))
    finally:
        handle.remove()
    assert seen == [*mlp.layers, mlp]


def test_plain_mlp_does_not_call_its_children(monkeypatch):
    mlp = MLP((4, 3, 2))
    monkeypatch.setattr(LinearAct, "forward", None)
    assert mlp(torch.randn(2, 4)).shape == (2, 2)


def test_eager_twin_of_a_parametrized_layer_has_its_values():
    layer = torch.nn.utils.parametrizations.weight_norm(LinearAct(6, 5, activation="tanh"))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    x = torch.rand(4, 6)
    torch.testing.assert_close(layer.eager()(x), layer(x))


def test_eager_twin_is_a_copy():
    mlp = MLP((4, 3, 2))
    twin = mlp.eager()
    with torch.no_grad():
        twin[0].weight.zero_()
    assert mlp.layers[0].weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearAct(0, 3), "in_features=0: expected a positive integer"),
        (lambda: LinearAct(3, 2.0), "out_features=2.0"),
        (lambda: LinearAct(3, 3, activation="rleu"), "did you mean 'relu'"),
        (lambda: LinearAct(2**31, 3), "in_features=2147483648: expected a positive integer of at most"),
        (
            lambda: LinearAct(2**31 - 1, 2**31 - 1),
            "in_features=2147483647, out_features=2147483647: .*memory",
        ),
        (lambda: LinearAct(3, 3, activation=None), "LinearAct: activation must be one of"),
        (lambda: LinearAct(3, 3, activation=[]), "LinearAct: activation must be one of"),
        (lambda: LinearAct(3, 3, negative_slope=-1), "LinearAct: negative_slope must be a finite number"),
        (lambda: LinearAct(3, 3, alpha=float("nan")), "LinearAct: alpha must be a finite number"),
        (lambda: LinearAct(3, 3, alpha="1"), "LinearAct: alpha must be a finite number"),
        (lambda: MLP((3, 3), "Relu"), "MLP: activation must be one of .*did you mean 'relu'"),
        (lambda: MLP((3, 3), negative_slope=None), "MLP: negative_slope must be a finite number"),
        (lambda: MLP((3, 3), alpha=-0.5), "MLP: alpha must be a finite number"),
        (lambda: MLP((3,)), "features="),
        (lambda: MLP("34"), "features='34'"),
        (lambda: MLP((3, -1)), r"features\[1\]=-1"),
        (lambda: MLP((3, 2), output_activation="sigmoidal"), "output_activation must be.*'sigmoidal'"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
