"""A model's loss and gradients on the CPU, by the calls that one of its steps has made."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from aefast.models import Model
from aefast.models._reconstruction import DecoderLoss
from aefast.nn._hooks import OF_ALL_MODULES, has_hooks
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

    def __getstate__(self) -> dict[str, Any]:
        """Copies record steps of their own."""
        return {**self.__dict__, "_recorded": None, "_steps": {}}

    def __call__(self, model: nn.Module, batch: Sequence[Tensor]) -> Terms | None:
        """The terms, with the gradients in the parameters' ``.grad``; None if this step is the model's."""
        is_known = self._can_be_recorded and model is self._model and len(batch) == 1
        if not is_known or not _is_plain(batch[0]):
            return None
        (x,) = batch
        if self._recorded is None:
            return self._record(x)
        if not self._recorded.fits(x):
            return None
        if not self._recorded.is_current():
            self._recorded = None
            self._steps.clear()
            return None
        self._model.check_samples(x)
        found = _attempt(self._recorded, x, self._recorded.draws, self._recorded.changed)
        if found is None:
            return None
        terms, gradients = found
        _accumulate(self._recorded.parameters, gradients)
        return terms

    def _record(self, x: Tensor) -> Terms | None:
        """The terms of a step that is recorded; None before it is time, or if the model has something else on it."""
        steps = self._steps[x.shape] = self._steps.get(x.shape, 0) + 1
        if steps <= WARM_UP_STEPS or not _is_as_it_comes(self._model):
            return None
        self._model.check_samples(x)
        recorder = _Recorder(self._model, x)

        def step(x: Tensor) -> tuple[Terms, dict[nn.Parameter, Tensor]]:
            with recorder:
                loss, terms = self._loss(self._model, x)
                parameters = [one for one in self._model.parameters() if one.requires_grad]
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                terms = {name: term.detach() for name, term in terms.items()}
            pairs = zip(parameters, found, strict=True)
            return terms, {one: gradient for one, gradient in pairs if gradient is not None}

        found = _attempt(step, x, True, list(self._model.buffers()))
        if found is None:
            return None
        terms, gradients = found
        run = recorder.compiled([*terms.values(), *gradients.values()])
        if run is None:
            self._can_be_recorded = False
        else:
            self._recorded = _Recorded(self._model, x, recorder, run, tuple(terms), tuple(gradients))
        _accumulate(tuple(gradients), tuple(gradients.values()))
        return terms


def _attempt(step: Callable[[Tensor], Any], x: Tensor, draws: bool, changed: Sequence[Tensor]) -> Any:
    """What `step` gives of x; None, with the generator and the tensors `changed` as they were, if a kernel refuses.

    The model itself, which takes the step then, tells what is wrong.
    """
    random = torch.get_rng_state() if draws else None
    before = [one.clone() for one in changed]
    try:
        return step(x)
    except RuntimeError as error:
        _registry.logger.debug("replay: %s", error)
        if random is not None:
            torch.set_rng_state(random)
        with torch.no_grad():
            for one, value in zip(changed, before, strict=True):
                one.copy_(value)
        return None


def _is_plain(x: Tensor) -> bool:
    """Whether a step on this batch, at this moment, is one like any other."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not (x.requires_grad or x.is_inference())
        and torch.is_grad_enabled()
        and not _hooks_of_saved_tensors(True)
        and not torch.is_anomaly_enabled()
        and (_registry.unexamined("mlp", x) or ("", None))[0] == "cpu"
    )


_hooks_of_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks


def _is_as_it_comes(model: nn.Module) -> bool:
    """Whether the model is made of modules that have nothing from elsewhere on them."""
    modules = tuple(model.modules())
    return (
        all(type(one).__module__.startswith("aefast.") or type(one) in _CONTAINERS for one in modules)
        and all(one.training and "forward" not in vars(one) for one in modules)
        and not any(getattr(one, "_compiled_call_impl", None) for one in modules)
        and not any(has_hooks(one) for one in modules)
        and not any(_has_hooks(one) for one in model.parameters())
    )


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity)


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


@torch.no_grad()
def _accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """As autograd does at its leaves: a gradient that is laid out otherwise than its parameter is copied."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
        elif gradient.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        else:
            parameter.grad = gradient


class _Recorded:
    """What was recorded of a step, and of what the model was then.

    Attributes:
        parameters: those that the gradients are of.
        draws: whether the step draws random numbers.
        changed: buffers that it changes.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        recorder: _Recorder,
        run: Callable[..., list[Tensor]],
        names: tuple[str, ...],
        parameters: tuple[nn.Parameter, ...],
    ) -> None:
        self.parameters = parameters
        self.draws = recorder.draws
        self.changed = recorder.changed
        self._names = names
        self._run = run
        self._constants = recorder.constants
        self._batch = x.shape, x.stride(), x.dtype
        self._modules = tuple(model.modules())
        self._trained = tuple(model.parameters())
        self._are_trained = [one.requires_grad for one in self._trained]
        # What modules and their losses have, and what is in the dicts among it.
        self._held = [vars(one) for one in self._modules]
        values = [value for held in self._held for value in held.values()]
        self._held += [value for value in values if isinstance(value, dict)]
        self._held += [value.options for value in values if isinstance(value, DecoderLoss)]
        self._state = self._state_now()

    def fits(self, x: Tensor) -> bool:
        """Whether the batch is like the one of that step."""
        return (x.shape, x.stride(), x.dtype) == self._batch

    def is_current(self) -> bool:
        """Whether the model is as it was at that step but for the numbers in its tensors."""
        state = self._state_now()
        return (
            len(state) == len(self._state)
            and all(map(operator.is_, state, self._state))
            and [one.requires_grad for one in self._trained] == self._are_trained
            and not any([_has_hooks(one) for one in self._trained])
            and not any(OF_ALL_MODULES)
        )

    def _state_now(self) -> list[Any]:
        state = [type(one).forward for one in self._modules]
        for held in self._held:
            state += held.values()
        return state

    def __call__(self, x: Tensor) -> tuple[Terms, list[Tensor]]:
        with torch.no_grad(), below_autograd():
            found = self._run(x, *self._constants)
        return dict(zip(self._names, found, strict=False)), found[len(self._names) :]


class _Recorder(TorchDispatchMode):
    """Within it, the calls of ops below autograd are made and noted, `x` being what they are made anew for.

    Attributes:
        constants: tensors that calls have taken, and no call has given: parameters, buffers, and numbers.
        changed: buffers among them that calls have written to.
        draws: whether a call draws random numbers.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self._buffers = {id(one) for one in model.buffers()}
        self._own = {id(one) for one in model.parameters()} | self._buffers
        self._is_refused = False
        # Whether a call has written to what another one has made.
        self._is_written = False
        self._graph = fx.Graph()
        self._last = self._graph.placeholder("x")
        self._nodes = {id(x): self._last}
        # As long as they live, their ids are theirs alone.
        self._kept: list[Any] = [x]
        # What calls of PyTorch's operators have given.
        self._values: dict[fx.Node, Tensor] = {}
        self.constants: list[Tensor] = []
        self.changed: list[Tensor] = []
        self.draws = False

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
                self._is_refused = True
            return
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for one in pytree.tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name)):
                if id(one) in self._buffers:
                    self.changed.append(one)
                else:
                    self._is_written = True
        self._kept.append(out)
        if func is torch.ops.aten.detach.default:
            # Nothing that a replay makes has a history.
            self._nodes[id(out)] = self._node(args[0])
            return
        target = IMPLEMENTATIONS[func._opname] if func.namespace == "aefast" else func
        node = self._graph.call_function(target, *pytree.tree_map(self._node, (tuple(args), kwargs)))
        if isinstance(out, Tensor):
            self._nodes[id(out)] = node
            if target is func:
                self._values[node] = out
        else:
            for index, one in enumerate(results):
                if one is not None:
                    self._nodes[id(one)] = self._graph.call_function(operator.getitem, (node, index))

    def _node(self, value: Any) -> Any:
        """What stands for a value in the graph: a tensor's node, or else the value."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            # What comes from nowhere else, as from hooks of saved tensors, may be another one the next time.
            self._is_refused |= id(value) not in self._own and value.dim() > 0
            self._kept.append(value)
            self._nodes[id(value)] = self._constant(value)
        return self._nodes[id(value)]

    def _constant(self, value: Tensor) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.placeholder(f"constant{len(self.constants)}")
        self.constants.append(value)
        return self._last

    def compiled(self, results: list[Tensor]) -> Callable[..., list[Tensor]] | None:
        """A function of x and the constants that makes the calls again and gives `results`; None if these, or what
        calls have taken, depend on anything else."""
        self._graph.output([self._node(one) for one in results])
        if self._is_refused:
            return None
        if not self._is_written and all(
            one.layout is torch.strided for one in (*results, *self._values.values())
        ):
            self._fold(results)
        for node in reversed(self._graph.nodes):
            if (
                not node.users
                and (node in self._values or node.target is operator.getitem)
                and _is_pure(node.target)
            ):
                self._graph.erase_node(node)
        return fx.GraphModule(nn.Module(), self._graph).forward

    def _fold(self, results: list[Tensor]) -> None:
        """Makes constants of what depends on shapes alone, such as the loss's gradient by itself and means' of that.

        Whoever is given a result may write to it, so that nothing in its memory is one.
        """
        given = {one.untyped_storage().data_ptr() for one in results}
        folded: set[fx.Node] = set()
        for node, value in self._values.items():
            is_known = node.target in _OF_SHAPES or (
                bool(node.all_input_nodes)
                and folded.issuperset(node.all_input_nodes)
                and _is_pure(node.target)
            )
            if is_known and value.untyped_storage().data_ptr() not in given:
                folded.add(node)
        for node in folded:
            if not folded.issuperset(node.users):
                node.replace_all_uses_with(self._constant(self._values[node]))


# Their values depend on no argument's.
_OF_SHAPES = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("ones_like", "zeros_like", "full_like", "new_zeros", "new_ones")
)


def _is_pure(target: Any) -> bool:
    return target is operator.getitem or not (
        target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
    )
