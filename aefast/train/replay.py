"""A model's loss and gradients on the CPU, by the calls that one of its steps has made."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from aefast.models import Model
from aefast.ops import _registry
from aefast.ops._library import IMPLEMENTATIONS, below_autograd

# Steps of one shape that go by before one is recorded, which takes a few milliseconds.
WARM_UP_STEPS = 10

Terms = dict[str, Tensor]
# (loss, terms by name) of a model and a batch.
LossOfModel = Callable[[nn.Module, Tensor], tuple[Tensor, Terms]]


class Replay:
    """The terms of a model's loss, and its parameters' gradients, without what finds out each time how to get them.

    Modules, checks, dispatch and autograd take an eighth of a step of 784-512-16 at batch 256 in bfloat16, and half of
    one at batch 2. What they come to is the same at each step: some ten calls of kernels. After `WARM_UP_STEPS` those
    of one step are recorded, and made again for each batch of its shape: bit for bit what the model does, noise
    included, since a seed is drawn at each.

    So it is for the models of `aefast.models` as they come, in training mode, whose `can_be_captured` says that nothing
    in a step depends on the values. Whatever else there is, such as hooks, a module of someone else's within,
    parameters that are replaced or frozen, autocast, a mode that watches dispatch or another backend, leaves the step
    to the model.
    """

    def __init__(self, model: nn.Module, loss: LossOfModel) -> None:
        self._model = model
        self._loss = loss
        self._can_be_recorded = isinstance(model, Model) and model.can_be_captured
        self._steps: dict[torch.Size, int] = {}
        self._recorded: _Recorded | None = None

    def __call__(self, batch: Sequence[Tensor]) -> Terms | None:
        """The terms, with the gradients in the parameters' ``.grad``; None if this step is the model's."""
        if not self._can_be_recorded or len(batch) != 1 or not _is_plain(batch[0]):
            return None
        (x,) = batch
        if self._recorded is not None:
            if self._recorded.fits(x):
                if self._recorded.is_current():
                    try:
                        return self._recorded(x)
                    except RuntimeError as error:
                        _told(error)
                        return None
                self._recorded = None
                self._steps.clear()
            return None
        steps = self._steps[x.shape] = self._steps.get(x.shape, 0) + 1
        if steps <= WARM_UP_STEPS or not _is_as_it_comes(self._model):
            return None
        self._model.check_samples(x)
        recorder = _Recorder(x)
        try:
            with recorder:
                loss, terms = self._loss(self._model, x)
                terms = {name: term.detach() for name, term in terms.items()}
                parameters = [one for one in self._model.parameters() if one.requires_grad]
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        except RuntimeError as error:
            _told(error)
            return None
        gradients = {
            one: gradient for one, gradient in zip(parameters, found, strict=True) if gradient is not None
        }
        if recorder.refusal is None:
            self._recorded = _Recorded(self._model, x, recorder, terms, gradients)
        else:
            self._can_be_recorded = False
        _accumulate(gradients, gradients.values(), _copied(gradients))
        return terms


def _told(error: RuntimeError) -> None:
    """What a kernel refuses, the model is asked for: it tells what is wrong."""
    _registry.logger.debug("replay: %s", error)


def _is_plain(x: Tensor) -> bool:
    """Whether a step on this batch, at this moment, is one like any other."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not x.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_anomaly_enabled()
        and (_registry.unexamined("mlp", x) or ("", None))[0] == "cpu"
    )


def _is_as_it_comes(model: nn.Module) -> bool:
    """Whether the model is made of modules that have nothing from elsewhere on them."""
    return (
        all(type(one).__module__.startswith("aefast.") or type(one) in _CONTAINERS for one in model.modules())
        and all(one.training and "forward" not in vars(one) for one in model.modules())
        and not any(_hooks_of(model.modules()))
        and not any(_has_hooks(one) for one in model.parameters())
    )


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity)


def _hooks_of(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """The dicts that hold the hooks of modules, and of all modules there are."""
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    hooks = [getattr(nn.modules.module, f"_global_{name}") for name in names]
    return hooks + [getattr(module, f"_{name}") for module in modules for name in names]


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _copied(gradients: dict[nn.Parameter, Tensor]) -> tuple[bool, ...]:
    """Which gradients cannot be their parameters' as they are: laid out otherwise, or in memory of another one."""
    storages = [one.untyped_storage().data_ptr() for one in gradients.values()]
    return tuple(
        gradient.stride() != parameter.stride() or storages.count(storage) > 1
        for (parameter, gradient), storage in zip(gradients.items(), storages, strict=True)
    )


@torch.no_grad()
def _accumulate(parameters: Iterable[Tensor], gradients: Iterable[Tensor], copied: Iterable[bool]) -> None:
    """As autograd does at its leaves."""
    for parameter, gradient, is_copied in zip(parameters, gradients, copied, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
        elif is_copied:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        else:
            parameter.grad = gradient


class _Recorded:
    """What was recorded of a step, and of what the model was then."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        recorder: _Recorder,
        terms: Terms,
        gradients: dict[nn.Parameter, Tensor],
    ) -> None:
        self._model = model
        self._batch = x.shape, x.stride(), x.dtype
        self._names = tuple(terms)
        self._parameters = tuple(gradients)
        self._copied = _copied(gradients)
        self._constants = recorder.constants
        self._run = recorder.compiled([*terms.values(), *gradients.values()])
        self._modules = tuple(model.modules())
        self._hooks = _hooks_of(self._modules)
        self._state = self._state_now()
        self._trained = tuple(model.parameters())
        self._are_trained = [one.requires_grad for one in self._trained]

    def fits(self, x: Tensor) -> bool:
        """Whether the batch is like the one of that step."""
        return (x.shape, x.stride(), x.dtype) == self._batch

    def is_current(self) -> bool:
        """Whether the model is as it was at that step but for the values in it."""
        state = self._state_now()
        return (
            not any(self._hooks)
            and len(state) == len(self._state)
            and all(map(operator.is_, state, self._state))
            and [one.requires_grad for one in self._trained] == self._are_trained
            and not any([_has_hooks(one) for one in self._trained])
        )

    def _state_now(self) -> list[Any]:
        """Everything that the modules have, settings and whether they are in training mode among it."""
        held = []
        for module in self._modules:
            of_module = module.__dict__
            held += of_module.values()
            held += of_module["_parameters"].values()
            held += of_module["_buffers"].values()
            held += of_module["_modules"].values()
        return held

    def __call__(self, x: Tensor) -> Terms:
        self._model.check_samples(x)
        with torch.no_grad(), below_autograd():
            found = self._run(x, *self._constants)
        terms = len(self._names)
        _accumulate(self._parameters, found[terms:], self._copied)
        return dict(zip(self._names, found[:terms], strict=True))


class _Recorder(TorchDispatchMode):
    """Within it, the calls of ops below autograd are made and noted, `x` being what they are made anew for.

    Attributes:
        constants: tensors that calls have taken, and no call has given: parameters and buffers among them.
        refusal: an op whose results cannot be noted, since they depend on values; None if there was none.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._last = self._graph.placeholder("x")
        self._nodes = {id(x): self._last}
        # As long as they live, their ids are theirs alone.
        self._kept: list[Any] = [x]
        self.constants: list[Tensor] = []
        self.refusal: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aefast":
            # In training the loss tells of numbers that are no probabilities; nobody who watches is told.
            args = tuple(
                argument.name == "checked" or value
                for argument, value in zip(func._schema.arguments, args, strict=True)
            )
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        results = list(out) if isinstance(out, (tuple, list)) else [out]
        is_shape = torch.Tag.dynamic_output_shape in func.tags
        if is_shape or not all(one is None or isinstance(one, Tensor) for one in results):
            # Without a tensor among its arguments it says something of types.
            if any(isinstance(one, Tensor) for one in pytree.tree_leaves((args, kwargs))):
                self.refusal = func
            return
        self._kept.append(out)
        if func is torch.ops.aten.detach.default:
            # Nothing that a replay makes has a history.
            self._nodes[id(out)] = self._node(args[0])
            return
        target = IMPLEMENTATIONS[func._opname] if func.namespace == "aefast" else func
        node = self._graph.call_function(target, *pytree.tree_map(self._node, (tuple(args), kwargs)))
        if isinstance(out, Tensor):
            self._nodes[id(out)] = node
        else:
            for index, one in enumerate(results):
                if one is not None:
                    self._nodes[id(one)] = self._graph.call_function(operator.getitem, (node, index))

    def _node(self, value: Any) -> Any:
        """What stands for a value in the graph: a tensor's node, or else the value."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            self._kept.append(value)
            with self._graph.inserting_after(self._last):
                self._last = self._graph.placeholder(f"constant{len(self.constants)}")
            self.constants.append(value)
            self._nodes[id(value)] = self._last
        return self._nodes[id(value)]

    def compiled(self, results: list[Tensor]) -> Callable[..., list[Tensor]]:
        """A function of x and the constants that makes the calls again and gives `results`."""
        self._graph.output([self._node(one) for one in results])
        return fx.GraphModule(nn.Module(), self._graph).forward
