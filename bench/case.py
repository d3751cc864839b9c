"""The cases of the benchmark: an op at one shape, or a model's training step, ready to be checked and timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from aefast import _library
from aefast.bench import timing, variants
from aefast.bench.timing import Variant
from aefast.bench.variants import COMPILED, COMPILED_GRAPHS, Rival
from aefast.models import Model
from aefast.ops import _philox
from aefast.ops._registry import OPS, Cost
from aefast.train import replay
from aefast.train.step import WARM_UP_STEPS, CapturedStep, EagerStep, make_optimizer

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
# Pre-activations, of the order of 1, are uncertain by less; a sum of 4096 float32 products is by some 3e-6.
KINK_WIDTH = 1e-5
# Inputs of so few numbers are drawn several times for the check: one draw says little of the errors of either side.
SMALL, DRAWS_OF_SMALL = 4096, 8


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Those that cases are made in: half precision where there are matrix instructions for it."""
    return (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, without which PyTorch's are a scalar loop."""
    is_missing = _library.load("cpu") is not None
    return not is_missing and "avx512bf16" in torch.ops.aefast_cpu.supported_instruction_sets()


@dataclass(frozen=True)
class Case:
    """An op, its kind (such as its activation), and its shape, in words for the id and in numbers in `sizes`.

    ``kind`` is empty for an op of one. ``sizes`` has "batch" unless it is of sets of points. ``is_compiled``: whether
    torch.compile takes part, which costs seconds a case.
    """

    op: str
    kind: str
    dims: str
    sizes: dict[str, int]
    dtype: torch.dtype
    device: torch.device
    is_compiled: bool = field(default=False, kw_only=True)
    rivals: Mapping[str, Rival] = field(default_factory=dict, kw_only=True)

    @property
    def id(self) -> str:
        parts = (self.kind, self.dims, DTYPE_NAMES[self.dtype])
        return f"{self.op}/{'-'.join(part for part in parts if part)}"

    @property
    def modes(self) -> tuple[str, ...]:
        raise NotImplementedError

    def trial(self, mode: str) -> Trial:
        raise NotImplementedError

    def _loaded_rivals(self, mode: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What those load that take part, and why the others do not."""
        reasons = {name: rival.missing(mode, self.device, self.dtype) for name, rival in self.rivals.items()}
        missing = {name: reason for name, reason in reasons.items() if reason is not None}
        loads = {name: rival.load for name, rival in self.rivals.items() if name not in missing}
        return collect(loads, missing), missing


@dataclass(frozen=True)
class Trial:
    """A case in one mode.

    ``truth`` are its results in float64, and ``found[name]`` those of each variant in ``timed``, whose calls go through
    ``sets`` sets of inputs. ``missing`` says why something does not take part. ``has_flips``: whether rounding to half
    precision puts pre-activations on the other side of a kink, so that single gradients differ by their whole size and
    only their norm can be held to anything. ``run_seconds`` and ``least_rounds`` are those of `timing.interleaved`.
    ``tolerance``, where it is given, is what every variant may differ from the truth by, relative to it, in place of
    what rounding explains.
    """

    truth: list[Tensor]
    found: dict[str, list[Tensor]]
    timed: dict[str, Variant]
    sets: int
    missing: dict[str, str]
    cost: Cost
    has_flips: bool = False
    run_seconds: float = 0.0
    least_rounds: int = timing.LEAST_ROUNDS
    tolerance: float | None = None


def collect(runs: Mapping[str, Callable[[], Any]], missing: dict[str, str]) -> dict[str, Any]:
    """The results of `runs`; what raises goes to `missing` instead, with what it raised."""
    found = {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except Exception as error:
            missing[name] = told(error)
    return found


def told(error: Exception) -> str:
    """Its type, and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def training_inputs(
    device: torch.device, dtype: torch.dtype, *shapes: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    """Normal draws that require gradients, the n-th scaled by ``scales[n]``."""
    return [
        (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def _forward(function: Callable[..., Any], inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _as_list(function(*inputs))


def _forward_backward(
    function: Callable[..., Any], inputs: list[Tensor], upstream: list[Tensor]
) -> list[Tensor]:
    out = _as_list(function(*inputs))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [*(one.detach() for one in out), *torch.autograd.grad(out, wanted, upstream)]


_RUN = {"fwd": _forward, "fwdbwd": _forward_backward}


def _gradient_of(output: Tensor) -> Tensor:
    """What flows into it: noise, and for a scalar, which is a loss, the 1 that ``backward()`` begins with."""
    return torch.ones_like(output) if output.dim() == 0 else torch.randn_like(output)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _joined(draws: Iterable[list[Tensor]]) -> list[Tensor]:
    """Each result of all draws as one tensor."""
    draws = list(draws)
    return draws[0] if len(draws) == 1 else [torch.stack(same) for same in zip(*draws, strict=True)]


def _as_list(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@dataclass(frozen=True)
class OpCase(Case):
    """An op at one shape, forward, and forward with backward.

    ``make()`` gives a fresh set of inputs, of which those that require gradients get them; ``aefast``, ``eager`` and
    what the rivals load take such a set and return a tensor or several. ``eager_forward``, where it is given, is the
    faster code that may be written when no gradient is wanted, and ``compilable`` what a compiler gets, which makes a
    backward of its own, in place of an `eager` whose backward is written by hand.

    ``arguments(*inputs)`` are those of the op's function, from which its cost is known.

    ``kinks(*inputs)``, where an activation has a kink, is true, broadcast to the output, for the outputs whose gradient
    rounding decides: those that depend on a pre-activation beside the kink.

    ``given_noise()``, for an op that draws noise, makes `aefast` and `eager` on noise of one seed: these are checked,
    and the others, which draw anew, are timed.
    """

    make: Callable[[], list[Tensor]]
    aefast: Callable[..., Any]
    eager: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    eager_forward: Callable[..., Any] | None = None
    compilable: Callable[..., Any] | None = None
    kinks: Callable[..., Tensor] | None = None
    given_noise: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        return ("fwd", "fwdbwd")

    def trial(self, mode: str) -> Trial:
        inputs = self.make()
        run = _RUN[mode]
        with torch.no_grad():
            upstream = [_gradient_of(one) for one in _as_list(self.eager(*inputs))]

        def fresh() -> tuple[list[Tensor], list[Tensor]]:
            return self.make(), [_gradient_of(one) for one in upstream]

        draws = [(inputs, upstream)]
        if sum(tensor.numel() for tensor in inputs) <= SMALL:
            draws += [fresh() for _ in range(DRAWS_OF_SMALL - 1)]
        exact = [[_exact(tensor) for tensor in drawn] for drawn, _ in draws]
        checked = [
            self._without_kinks(one, gradients) for one, (_, gradients) in zip(exact, draws, strict=True)
        ]
        checked_aefast, checked_eager = self.given_noise() if self.given_noise else (self.aefast, None)
        truth = _joined(
            run(checked_eager or self.eager, one, [gradient.double() for gradient in gradients])
            for one, gradients in zip(exact, checked, strict=True)
        )

        rivals, missing = self._loaded_rivals(mode)
        ours = variants.backends(self.op, self.device, self.dtype)
        eager = self.eager_forward if mode == "fwd" and self.eager_forward else self.eager
        functions = {name: self.aefast for name in ours} | {"eager": eager}
        if self.is_compiled:
            functions[COMPILED] = variants.compiled(self.compilable or self.eager, self.device)
        functions |= rivals
        contexts = {name: ours.get(name, contextlib.nullcontext) for name in functions}
        checks = functions | {name: checked_aefast for name in ours}
        if checked_eager is not None:
            checks["eager"] = checked_eager
            if self.is_compiled:
                checks[COMPILED] = variants.compiled(checked_eager, self.device)

        def results(name: str) -> list[Tensor]:
            with contexts[name]():
                return _joined(
                    run(checks[name], drawn, gradients)
                    for (drawn, _), gradients in zip(draws, checked, strict=True)
                )

        found = collect({name: lambda name=name: results(name) for name in functions}, missing)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *upstream))
        count = max(len(found), timing.input_sets(nbytes, self.device))
        sets = [(inputs, upstream), *(fresh() for _ in range(count - 1))]

        def timed(name: str) -> Variant:
            function = functions[name]
            return Variant(lambda index: run(function, *sets[index % count]), contexts[name])

        cost = OPS[self.op].cost(mode == "fwdbwd", **self.arguments(*inputs))
        has_flips = self.kinks is not None and torch.finfo(self.dtype).eps > 1e-6
        return Trial(truth, found, {name: timed(name) for name in found}, count, missing, cost, has_flips)

    def _without_kinks(self, exact: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
        """`upstream` for the check, in which outputs at a kink, of the inputs `exact`, get no gradient."""
        if self.kinks is None:
            return upstream
        with torch.no_grad():
            masked = self.kinks(*exact)
        return [one.masked_fill(masked, 0.0) for one in upstream]


@dataclass(frozen=True)
class Learner:
    """Something that trains: ``step(batch)`` updates `parameters`.

    ``loss(given)`` is the loss before the update, from what the step gave. ``prepare(batch)`` makes the next step, on a
    batch of that shape, one as they are timed, and leaves parameters and buffers as they were. ``arranged`` gives the
    parameters' gradients as those of the model that others are compared with.
    """

    parameters: list[nn.Parameter]
    step: Callable[[Tensor], Any]
    loss: Callable[[Any], Tensor] = lambda given: given
    prepare: Callable[[Tensor], None] = lambda batch: None
    arranged: Callable[[list[Tensor]], list[Tensor]] = list

    @classmethod
    def of_loss(
        cls,
        parameters: Iterator[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
        arranged: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> Learner:
        """One that takes steps as `EagerStep` does, with the loss ``loss(batch)``."""
        kept = list(parameters)
        optimizer = make_optimizer(kept, LEARNING_RATE)

        def step(batch: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            value = loss(batch)
            value.backward()
            optimizer.step()
            return value.detach()

        return cls(kept, step, arranged=arranged)

    @classmethod
    def of_graphs(cls, parameters: Iterator[nn.Parameter], loss: Callable[[Tensor], Tensor]) -> Learner:
        """`of_loss` of a loss that torch.compile records as CUDA graphs, whose outputs the next step overwrites."""
        kept = list(parameters)
        optimizer = torch.optim.Adam(kept, lr=LEARNING_RATE, fused=True, capturable=True)

        def step(batch: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            # Gradients lie in a graph's memory.
            optimizer.zero_grad(set_to_none=True)
            value = loss(batch)
            value.backward()
            optimizer.step()
            return value.detach().clone()

        def prepare(batch: Tensor) -> None:
            before = [parameter.detach().clone() for parameter in kept]
            for _ in range(GRAPH_WARM_UP_STEPS):
                step(batch)
            with torch.no_grad():
                for parameter, value in zip(kept, before, strict=True):
                    parameter.copy_(value)

        return cls(kept, step, prepare=prepare)

    def results(self, batch: Tensor) -> list[Tensor]:
        """The loss and the gradient of each parameter, from a step, on noise that is every learner's.

        Raises:
            RuntimeError: the step has left all parameters as they were.
        """
        self.prepare(batch)
        torch.manual_seed(NOISE_SEED)
        before = [parameter.detach().clone() for parameter in self.parameters]
        loss = self.loss(self.step(batch))
        if all(torch.equal(old, new) for old, new in zip(before, self.parameters, strict=True)):
            raise RuntimeError("the step updates no parameter")
        return [loss, *self.arranged([parameter.grad.clone() for parameter in self.parameters])]


LEARNING_RATE = 1e-3
# Steps of one model follow each other as in training, which leaves the heap and the caches as the next one finds them.
STEPS_SECONDS = 0.03
# Of as few as 5 rounds the interval of the speed-up would reach from the least to the largest.
ROUNDS_ON_CUDA = 15
# torch.compile's graphs run once, are recorded, and are replayed.
GRAPH_WARM_UP_STEPS = 3
NOISE_SEED = 11
# Each leaves a hundredth of the samples or less.
MOST_REDRAWS = 20


@contextlib.contextmanager
def noise_of_aefast() -> Iterator[None]:
    """Within it ``torch.randn_like`` and ``torch.rand_like`` give what aefast's ops draw in the same places."""

    def normals(like: Tensor, **options: Any) -> Tensor:
        return _philox.normals(_philox.seed_of(None, None, like, "randn_like"), like.shape, like.dtype)

    def uniforms(like: Tensor, **options: Any) -> Tensor:
        seed = _philox.seed_of(None, None, like, "rand_like")
        # In float64, where no value rounds to another side of a chance.
        return (_philox.words(seed, like.numel()).double() * 2.0**-32).reshape(like.shape)

    with mock.patch.object(torch, "randn_like", normals), mock.patch.object(torch, "rand_like", uniforms):
        yield


@dataclass(frozen=True)
class TrainingCase(Case):
    """A step on a model: forward, loss, backward and Adam's update, fused on all sides.

    ``make_model()`` gives a model on the device with fresh weights. What a rival loads is a function of that model,
    and gives a `Learner` with the same weights in the same order. ``is_undecided(twin, batch)`` tells, in float64, of
    which samples (batch,) rounding decides what the model does with them.
    """

    make_model: Callable[[], Model]
    features: int
    cost: Callable[[Model], Cost]
    is_undecided: Callable[[nn.Module, Tensor], Tensor] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        return ("step",)

    def trial(self, mode: str) -> Trial:
        model = self.make_model()
        exact = model.eager_twin().double()
        checked = without_kinks(exact, self._batch, self.is_undecided)

        rivals, missing = self._loaded_rivals(mode)
        ours = variants.backends("mlp", self.device, self.dtype)
        learners = {name: _fused(self.make_model, model) for name in ours} | {"eager": _eager(model)}
        if self.is_compiled:
            twin = model.eager_twin()
            loss = variants.compiled(lambda batch: model.eager_loss(twin, batch), self.device)
            learners[COMPILED] = Learner.of_loss(twin.parameters(), loss)
        if self.is_compiled and self.device.type == "cuda":
            recorded = model.eager_twin()
            loss_of_graphs = variants.compiled(
                lambda batch: model.eager_loss(recorded, batch), self.device, has_graphs=True
            )
            learners[COMPILED_GRAPHS] = Learner.of_graphs(recorded.parameters(), loss_of_graphs)
        learners |= collect({name: lambda make=make: make(model) for name, make in rivals.items()}, missing)
        contexts = {name: ours.get(name, contextlib.nullcontext) for name in learners}

        def results(name: str) -> list[Tensor]:
            with contexts[name](), noise_of_aefast():
                return learners[name].results(checked)

        found = collect({name: lambda name=name: results(name) for name in learners}, missing)
        # The steps that were checked have recorded the noise of the check.
        learners |= {name: _fused(self.make_model, model) for name in ours}
        with noise_of_aefast():
            torch.manual_seed(NOISE_SEED)
            loss = model.eager_loss(exact, checked.double())
        truth = [loss.detach(), *torch.autograd.grad(loss, list(exact.parameters()))]
        count = max(len(found), timing.input_sets(checked.numel() * checked.element_size(), self.device))
        batches = [self._batch() for _ in range(count)]

        def prepare(name: str) -> None:
            with contexts[name]():
                learners[name].prepare(batches[0])

        # Timed are steps as training goes on with them, on noise of their own: recorded before the clock starts.
        collect({name: lambda name=name: prepare(name) for name in found}, missing)

        def timed(name: str) -> Variant:
            step = learners[name].step
            return Variant(lambda index: step(batches[index % count]), contexts[name])

        has_flips = torch.finfo(self.dtype).eps > 1e-6
        all_timed = {name: timed(name) for name in found if name not in missing}
        least = ROUNDS_ON_CUDA if self.device.type == "cuda" else timing.LEAST_ROUNDS
        return Trial(
            truth, found, all_timed, count, missing, self.cost(model), has_flips, STEPS_SECONDS, least
        )

    def _batch(self) -> Tensor:
        return torch.rand(self.sizes["batch"], self.features, device=self.device).to(self.dtype)


def _fused(make_model: Callable[[], Model], like: Model) -> Learner:
    model = make_model()
    model.load_state_dict(like.state_dict())
    step = CapturedStep(model.train(), make_optimizer(model.parameters(), LEARNING_RATE))

    def prepare(batch: Tensor) -> None:
        """Records the step, which the first ones are not."""
        for _ in range(max(WARM_UP_STEPS, replay.WARM_UP_STEPS) + 1):
            step(batch)
        model.load_state_dict(like.state_dict())

    return Learner(list(model.parameters()), step, lambda terms: sum(terms.values()), prepare)


def _eager(model: Model) -> Learner:
    step = EagerStep(model, LEARNING_RATE)
    return Learner(list(step.twin.parameters()), step)


def without_kinks(
    twin: nn.Module,
    draw: Callable[[], Tensor],
    is_undecided: Callable[[nn.Module, Tensor], Tensor] | None,
) -> Tensor:
    """A batch from `draw`, of whose samples no pre-activation of `twin`, in float64, lies beside relu's kink, and none
    is undecided.

    Samples that have one are drawn again, in their places: noise belongs to places.
    """
    batch = draw()
    beside = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        beside.logical_or_((inputs[0].abs() < KINK_WIDTH).any(dim=1))

    hooks = [
        module.register_forward_pre_hook(note) for module in twin.modules() if isinstance(module, nn.ReLU)
    ]
    for _ in range(MOST_REDRAWS):
        beside.zero_()
        torch.manual_seed(NOISE_SEED)
        with torch.no_grad(), noise_of_aefast():
            twin(batch.double())
            if is_undecided is not None:
                beside |= is_undecided(twin, batch.double())
        if not beside.any():
            break
        batch[beside] = draw()[beside]
    for hook in hooks:
        hook.remove()
    return batch
