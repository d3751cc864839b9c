"""Which layers and activations are fused, and what a patched module calls in their place.

Everything is looked at anew in each call: a layer that has got hooks, or was replaced, is called as before.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.patch._classes import is_plain

Activation = tuple[str, dict[str, float]]
"""A name that `aefast.functional.linear_act` takes, and the parameter it reads."""

# Modules, functions and methods of tensors by the name that torch has for them.
MODULES = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
}
METHODS = ("relu", "tanh", "sigmoid")
FUNCTIONS: dict[Callable[..., Tensor], str] = {
    torch.relu: "relu",
    torch.selu: "selu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    **{getattr(F, name): name for name in MODULES.values() if name != "identity"},
}
# What torch's functions take behind the input, in order, and what its modules have as attributes.
_PARAMETERS = {
    "relu": ("inplace",),
    "leaky_relu": ("negative_slope", "inplace"),
    "elu": ("alpha", "inplace"),
    "selu": ("inplace",),
    "silu": ("inplace",),
    "gelu": ("approximate",),
    "softplus": ("beta", "threshold"),
}
# Other callables may have no hash.
_FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)
# Their results are kept for the backward, where torch keeps their operand and lets results be changed in place. Who
# gets them cannot be known: at the end of a run, they are copied.
_KEEP_RESULT = frozenset(("leaky_relu", "elu", "selu", "softplus"))


def _activation(name: str, given: Mapping[str, Any]) -> Activation | None:
    """torch's `name` with the parameters `given`, or None where aefast has no such activation."""
    if name == "gelu":
        approximate = given.get("approximate", "none")
        return {"none": ("gelu", {}), "tanh": ("gelu_tanh", {})}.get(approximate)
    if name == "softplus":
        is_default = given.get("beta", 1) == 1 and given.get("threshold", 20) == 20
        return (name, {}) if is_default else None
    if name == "leaky_relu":
        slope = given.get("negative_slope", 0.01)
        return (name, {"negative_slope": slope}) if slope >= 0 else None
    if name == "elu":
        alpha = given.get("alpha", 1.0)
        return (name, {"alpha": alpha}) if alpha >= 0 else None
    return name, {}


def of_module(module: Any) -> Activation | None:
    """The activation that `module` is, or None."""
    name = MODULES.get(type(module))
    if name is None or not is_plain(module):
        return None
    return _activation(name, {key: getattr(module, key) for key in _PARAMETERS.get(name, ())})


def of_function(
    function: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] = {}
) -> Activation | None:
    """The activation that ``function(x, *arguments, **named)`` is, or None."""
    name = FUNCTIONS.get(function) if isinstance(function, _FUNCTION_TYPES) else None
    parameters = _PARAMETERS.get(name, ())
    if name is None or len(arguments) > len(parameters) or not named.keys() <= set(parameters):
        return None
    return _activation(name, {**dict(zip(parameters, arguments, strict=False)), **named})


def is_linear(module: Any) -> bool:
    """Whether `module` is a torch.nn.Linear that does nothing but what its class does."""
    return type(module) is nn.Linear and is_plain(module) and _are_tensors(*parameters_of(module))


def parameters_of(linear: nn.Linear) -> tuple[Any, Any]:
    """Its weight and bias. A module's own lookup, at a microsecond each, is one of a short call's larger parts."""
    registered = linear._parameters
    if "weight" in registered and "bias" in registered:
        return registered["weight"], registered["bias"]
    return linear.weight, linear.bias


def _are_tensors(weight: Any, bias: Any) -> bool:
    """That none of them is of a subclass, such as a quantized or a distributed one."""
    return type(weight) in (nn.Parameter, Tensor) and type(bias) in (nn.Parameter, Tensor, type(None))


def why_not_linear(module: nn.Linear) -> str | None:
    """Why `is_linear` says no, or None."""
    if type(module) is not nn.Linear:
        if torch.nn.utils.parametrize.is_parametrized(module):
            return "it is parametrized"
        return f"{type(module).__name__} is a subclass of Linear, which may do something else"
    if not is_plain(module):
        return "it has hooks, or a forward of its own"
    if not _are_tensors(module.weight, module.bias):
        return f"its weight is a {type(module.weight).__name__}"
    return None


Layer = tuple[nn.Linear, Activation]


def run_at(
    modules: Sequence[nn.Module], index: int, skipped: Collection[int] = ()
) -> tuple[list[Layer], int]:
    """The dense layers that one op evaluates from `index` on, and the index behind them; none without an activation
    among them. Those at `skipped` are left alone."""
    layers: list[Layer] = []
    settings: dict[str, float] = {}
    count = len(modules)
    while index < count and index not in skipped and is_linear(modules[index]):
        has_follower = index + 1 < count and index + 1 not in skipped
        follower = of_module(modules[index + 1]) if has_follower else None
        activation = follower or ("identity", {})
        if any(settings.get(key, value) != value for key, value in activation[1].items()):
            break
        settings.update(activation[1])
        layers.append((modules[index], activation))
        index += 1 if follower is None else 2
    if all(name == "identity" for _, (name, _) in layers):
        return [], 0
    return layers, index


def through(modules: Sequence[nn.Module], x: Any, skipped: Collection[int] = ()) -> Any:
    """What ``nn.Sequential(*modules)`` gives for x."""
    index = 0
    while index < len(modules):
        layers, end = run_at(modules, index, skipped)
        out = _of_layers(layers, x) if layers else None
        x, index = (modules[index](x), index + 1) if out is None else (out, end)
    return x


def through_heads(
    modules: Sequence[nn.Module], heads: Sequence[nn.Module], x: Tensor
) -> tuple[Tensor, ...] | None:
    """What each of `heads`, linear layers, gives for ``nn.Sequential(*modules)(x)``, all of them by one product; None
    where one op does not evaluate them all."""
    layers, end = run_at(modules, 0)
    if not layers or end != len(modules) or not all(map(is_linear, heads)):
        return None
    weights, biases = zip(*map(parameters_of, heads), strict=True)
    if len(heads) == 1:
        return (_stack(layers, x, weights[0], biases[0]),)
    if any(bias is None for bias in biases):
        return None
    out = _stack(layers, x, torch.cat(weights), torch.cat(biases))
    return out.split([weight.shape[0] for weight in weights], 1)


def _of_layers(layers: Sequence[Layer], x: Any) -> Tensor | None:
    """What `layers` give for x, or None where their op does not take it."""
    linear, (name, settings) = layers[-1]
    is_alone = len(layers) == 1
    try:
        out = AF.linear_act(x, *parameters_of(linear), name, **settings) if is_alone else _stack(layers, x)
    except InputError:
        return None
    return out.clone() if name in _KEEP_RESULT and out.requires_grad else out


def _stack(
    layers: Sequence[Layer], x: Tensor, last_weight: Tensor | None = None, last_bias: Tensor | None = None
) -> Tensor:
    """`layers`, and behind them one of these parameters, without an activation, where they are given."""
    weights, biases, names = [], [], []
    settings: dict[str, float] = {}
    for linear, (name, parameter) in layers:
        weight, bias = parameters_of(linear)
        weights.append(weight)
        biases.append(bias)
        names.append(name)
        settings.update(parameter)
    if last_weight is not None:
        weights.append(last_weight)
        biases.append(last_bias)
        names.append("identity")
    return AF.mlp(x, weights, biases, names, **settings)


def is_sequential(module: nn.Module) -> bool:
    """Whether a call of `module` is one of each of its children in turn, and of nothing else."""
    return isinstance(module, nn.Sequential) and is_plain(module) and runs_through(type(module))


def runs_through(module_class: type[nn.Module]) -> bool:
    return module_class.forward in (nn.Sequential.forward, sequential_forward)


def sequential_forward(self: nn.Sequential, input: Any) -> Any:
    return through(list(self._modules.values()), input, indices_of(self.aefast_skipped, self))


def indices_of(names: Collection[str], module: nn.Sequential) -> Collection[int]:
    """The places of the children of these names."""
    return [index for index, name in enumerate(module._modules) if name in names] if names else ()


def apply(activation: Any, linear: Any, x: Any) -> Any:
    """``activation(linear(x))``, for whatever these are."""
    out = None
    if is_linear(linear):
        is_module = isinstance(activation, nn.Module)
        found = of_module(activation) if is_module else of_function(activation)
        if found is not None:
            out = _of_layers([(linear, found)], x)
    return activation(linear(x)) if out is None else out


def applied(
    function: Callable[..., Tensor], arguments: Sequence[Any], named: Mapping[str, Any]
) -> Callable[[Any, Any, Any], Any]:
    """``site(called, linear, x)``, which is ``called(linear(x), *arguments, **named)``, and fused where it is
    `function` that is called."""
    found = of_function(function, arguments, named)

    def site(called: Any, linear: Any, x: Any) -> Any:
        out = _of_layers([(linear, found)], x) if called is function and is_linear(linear) else None
        return called(linear(x), *arguments, **named) if out is None else out

    return site


def method_applied(name: str) -> Callable[[Any, Any], Any]:
    """``site(linear, x)``, which is the method `name` of ``linear(x)``, one of `METHODS`."""

    def site(linear: Any, x: Any) -> Any:
        out = _of_layers([(linear, (name, {}))], x) if is_linear(linear) else None
        return getattr(linear(x), name)() if out is None else out

    return site
