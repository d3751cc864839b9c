"""One training step, and several as one."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from aefast.errors import InputError
from aefast.models import Model
from aefast.models._base import check_choice
from aefast.nn.linear_act import check_positive_int
from aefast.train.graphs import recording
from aefast.train.replay import Replay
from aefast.train.schedule import Schedule
from aefast.train.update import Update, average

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Steps that are taken one by one before the rest is recorded: until then optimizers make their state, libraries their
# workspaces, and Triton its kernels.
WARM_UP_STEPS = 3

Batch = torch.Tensor | Sequence[torch.Tensor]
Loss = Callable[..., "torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]"]


def make_optimizer(parameters: Iterable[Any], lr: float) -> torch.optim.Adam:
    """Adam with its update fused into one kernel over all parameters, which come as any optimizer takes them.

    That kernel goes through a parameter's memory from one end to the other; where there are gaps, as in a slice of a
    larger tensor, the update is torch's plain one.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    groups = optimizer.param_groups
    if all(_has_no_gaps(one) for group in groups for one in group["params"]):
        return optimizer
    return torch.optim.Adam([{**group, "fused": False} for group in groups], lr=lr)


def _has_no_gaps(one: torch.Tensor) -> bool:
    # Memory like that of a tensor has its strides then alone.
    return torch.empty_like(one, device="meta").stride() == one.stride()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


class _Bfloat16Products:
    """Context in which products of float32 on the CPU may be formed from operands rounded to bfloat16, torch's too.

    It is a setting of the process: the first thread that enters saves what it was, and the last one that leaves puts
    that back.
    """

    _kinds = ("matmul", "conv", "rnn")
    _lock = threading.Lock()
    _inside = 0
    _before: ClassVar[list[str]] = []

    def __enter__(self) -> None:
        shared = _Bfloat16Products
        with self._lock:
            if shared._inside == 0:
                # Behind `torch.backends.mkldnn.matmul.fp32_precision` and so on, which take five times as long.
                shared._before = [torch._C._get_fp32_precision_getter("mkldnn", kind) for kind in self._kinds]
                for kind in self._kinds:
                    torch._C._set_fp32_precision_setter("mkldnn", kind, "bf16")
            shared._inside += 1

    def __exit__(self, *error: object) -> None:
        shared = _Bfloat16Products
        with self._lock:
            shared._inside -= 1
            if shared._inside == 0:
                for kind, precision in zip(self._kinds, shared._before, strict=True):
                    torch._C._set_fp32_precision_setter("mkldnn", kind, precision)


def _loss_of_model(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss that a model tells, and its terms if it tells them too."""
    output = model(batch)
    if not hasattr(output, "loss"):
        raise InputError(
            f"loss: expected loss(model, *batch), since what {type(model).__name__} gives, "
            f"{type(output).__name__}, has no .loss"
        )
    return output.loss, getattr(output, "terms", {"loss": output.loss})


def loss_of_own_forward(
    model: nn.Module, batch: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same with the loss among the terms, for a model whose terms may not add up to it."""
    loss, terms = _loss_of_model(model, batch)
    return loss, {**terms, "loss": loss}


def _with_terms(loss: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The scalar and the terms of what a loss gave."""
    value, terms = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, {"loss": loss})
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not isinstance(terms, Mapping):
        got = type(loss).__name__
        if isinstance(value, torch.Tensor):
            got = f"shape {tuple(value.shape)}" if value.numel() != 1 else f"one and {type(terms).__name__}"
        raise InputError(f"loss: expected a scalar tensor, or one and its terms by name, got {got}")
    for name, term in terms.items():
        if not isinstance(term, torch.Tensor) or term.numel() != 1:
            is_tensor = isinstance(term, torch.Tensor)
            got = f"shape {tuple(term.shape)}" if is_tensor else type(term).__name__
            raise InputError(f"loss: expected scalar tensors as terms, got {got} as {name!r}")
    return value, {name: term.detach() for name, term in terms.items()}


def _checked(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[nn.Parameter]:
    """The parameters of an optimizer that can train the model by one gradient a step."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    if not parameters:
        raise InputError("optimizer: expected one with parameters")
    if not {id(one) for one in parameters} & {id(one) for one in model.parameters()}:
        raise InputError(f"optimizer: expected one over parameters of the model, {type(model).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"optimizer: expected one that takes one gradient a step, {type(optimizer).__name__} asks for the loss "
            "again"
        )
    return parameters


def _check_number(value: Any, argument: str, expected: str, is_right: Callable[[float], bool]) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not is_right(value)):
        raise InputError(f"{argument}={value!r}: expected {expected}, or None")


class CapturedStep:
    """Forward, loss, backward, clipping and update, none of which waits for the device.

    On CUDA, steps are recorded as one CUDA graph, `steps_per_replay` of them at a time, after a few that are taken one
    by one; every replay draws fresh random numbers, counts its steps and takes its learning rates on the device. Steps
    that are left over are replayed from a graph of one step, which works in the same memory and is recorded when it is
    needed. Batches of another size or type than those recorded are taken one by one. So are all in fp16, whose loss
    scale decides whether there is an update, all of a model that says that it cannot be captured
    (`Model.can_be_captured`), all with a `schedule` for an optimizer that reads its learning rate on the host, such
    as SGD that is not fused, and all of an optimizer that counts its steps on the host, such as Adagrad.

    Works for any module, optimizer and loss that can be captured: shapes must not depend on the data, nothing may wait
    for the device, and an optimizer that has the option `capturable` gets it. Learning rates that are set in between,
    by torch's schedulers or by hand, are heeded; after another option of the optimizer is set, a parameter frozen or
    moved or the optimizer's state loaded, steps are recorded anew. What else the module or the loss reads in Python
    stays as it was when it was recorded: options that are changed afterwards need a new `CapturedStep`.

    On the CPU forward, loss and backward of a model of `aefast.models` are recorded too, after ten steps of one size,
    as the calls of kernels that they come to, which are made anew for each batch of that size: same bits, less
    overhead.
    Forwards in Python do not run then, and hooks of autograd's nodes do not; a model that has hooks of modules or of
    parameters, or modules of others, is left to itself. The
    update of torch's fused Adam and AdamW is made by a kernel of aefast's, with the state that the optimizer keeps, in
    one pass with clipping and the moving average: it equals torch's to rounding, and on x86-64 takes subnormal numbers
    for 0; profilers show no `Optimizer.step`. An optimizer that has hooks, is scheduled by torch or is of another kind
    makes its own step.

    Args:
        model: the module to train, on its device, in training mode.
        optimizer: over the module's parameters.
        loss: ``loss(model, *batch)`` gives a scalar, or one and its terms, scalars by name. By default the `.loss` and
            `.terms` that the models of `aefast.models` give; of any other module the loss is its one term.
        precision: "fp32"; "bf16" or "fp16", the type in which autocast lets matrix products be formed, fp16 with a loss
            scale that adapts. On the CPU bf16 leaves all tensors in float32 and rounds the operands of products alone,
            as ``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` does, which is more exact; it pays on processors
            with AMX and on AMD's with AVX512-BF16. It is so during the step, in other threads of the process too.
        clip_norm: largest norm of all gradients together; longer ones are scaled down to it. None for no limit.
        accumulate: into how many parts a batch is cut, whose gradients are summed: less memory, the same mean. A loss
            that compares samples with each other, as MMD does, compares those of a part.
        schedule: share of the optimizer's learning rates that each step takes. They are kept as `initial_lr` of its
            groups, and those that are there are taken, as torch's schedulers do.
        ema_decay: decay of an exponential moving average of the parameters after each step, and of the running
            statistics that go with them; None for none.
        steps_per_replay: steps of a CUDA graph, on the CPU one each; 0 records none, as `DistributedDataParallel` needs
            it.

    Attributes:
        schedule: the schedule that steps follow, to be exchanged for one of the same kind alone.
    """

    _replays = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Loss | None = None,
        precision: str = "fp32",
        clip_norm: float | None = None,
        accumulate: int = 1,
        schedule: Schedule | None = None,
        ema_decay: float | None = None,
        steps_per_replay: int = 1,
    ) -> None:
        check_choice(precision, "precision", PRECISIONS)
        check_positive_int(accumulate, "accumulate")
        if steps_per_replay != 0:
            check_positive_int(steps_per_replay, "steps_per_replay")
        _check_number(clip_norm, "clip_norm", "a number above 0", lambda norm: norm > 0)
        _check_number(ema_decay, "ema_decay", "a number from 0 to below 1", lambda decay: 0 <= decay < 1)
        self._parameters = _checked(optimizer, model)
        self.model = model
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self._loss = _loss_of_model if loss is None else loss
        self.device = self._parameters[0].device
        rounds_products = precision == "bf16" and self.device.type == "cpu"
        self._products = _Bfloat16Products if rounds_products else contextlib.nullcontext
        self._type = None if rounds_products else PRECISIONS[precision]
        self._scaler = torch.amp.GradScaler(self.device.type) if self._type is torch.float16 else None
        self.schedule = Schedule() if schedule is None else schedule
        # Steps taken, where the schedule reads them.
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)
        # By the name that torch's schedulers give it, it goes with the optimizer and its state: the rate of the moment
        # is a share of it.
        self._rates = [
            group["lr"] if self.schedule.is_constant else group.setdefault("initial_lr", float(group["lr"]))
            for group in optimizer.param_groups
        ]
        # What the average is of.
        self._averaged = [*self._parameters, *_statistics(model)]
        self.ema = None if ema_decay is None else [one.detach().clone() for one in self._averaged]
        self._decay = ema_decay
        of_parameters = () if self.ema is None else self.ema[: len(self._parameters)]
        self._update = Update(optimizer, of_parameters, ema_decay or 0.0)
        # By how many steps they are of: `steps_per_replay`, and 1.
        self._recordings: dict[int, _Recording] = {}
        is_replayed = (
            steps_per_replay > 0 and self.device.type == "cpu" and loss is None and self._scaler is None
        )
        self._replay = Replay(model, _loss_of_model) if is_replayed and accumulate == 1 else None
        # Steps of a replay, and of each group that is updated by a rate in the device's memory: where it lies.
        self._replayed = 0
        self._places: list[torch.Tensor | None] = []
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._prepare(steps_per_replay)

    def _prepare(self, steps_per_replay: int) -> None:
        """What steps on CUDA need."""
        self._warm: dict[_Form, int] = {}
        groups = self.optimizer.param_groups
        for group in groups:
            if "capturable" in group:
                group["capturable"] = True
        self._places = [
            torch.full_like(self._count, float(group["lr"]), dtype=torch.float32)
            if _reads_rate_on_device(self.optimizer, group)
            else None
            for group in groups
        ]
        are_rates_read = self.schedule.is_constant or None not in self._places
        if are_rates_read and self._scaler is None and getattr(self.model, "can_be_captured", True):
            self._replayed = steps_per_replay

    def __call__(self, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Train on a batch, tensors of (B, ...); the loss terms before the update, detached scalars by name."""
        self._begin()
        if self._replayed == 0:
            return self._alone(batch)
        return {name: values[0] for name, values in self.many([batch]).items()}

    def many(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Train on several batches in turn; the loss terms of each, (len(batches),) by name."""
        batches = [(batch,) if isinstance(batch, torch.Tensor) else tuple(batch) for batch in batches]
        if not batches:
            raise InputError("batches: expected at least one, got none")
        self._begin()
        terms: list[dict[str, torch.Tensor]] = []
        at = 0
        while at < len(batches):
            for group in (batches[at : at + self._replayed], batches[at : at + 1]):
                recording = self._recording_of(group)
                if recording is not None:
                    terms.append(recording.replay(group))
                    break
            else:
                one = self._alone(group[0])
                terms.append({name: value.reshape(1) for name, value in one.items()})
            at += len(group)
        if len(terms) == 1:
            return terms[0]
        return {name: torch.cat([one[name] for one in terms]) for name in terms[0]}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters and running statistics are their moving averages, if those are kept."""
        if self.ema is None:
            yield
            return
        kept = [one.detach().clone() for one in self._averaged]
        try:
            _copy(self.ema, self._averaged)
            yield
        finally:
            _copy(kept, self._averaged)

    def restart_average(self) -> None:
        """Let the moving average begin with the parameters as they are, for a model that was changed since."""
        if self.ema is not None:
            _copy([one.detach() for one in self._averaged], self.ema)

    @property
    def count(self) -> int:
        """Steps taken. Reading it waits for the device."""
        return int(self._count.item())

    def state_dict(self) -> dict[str, Any]:
        """What the step keeps beside the parameters and the optimizer's state: tensors, and numbers."""
        state: dict[str, Any] = {"count": self.count}
        if self.ema is not None:
            state["ema"] = list(self.ema)
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the step that `state` is of."""
        self._count.fill_(state["count"])
        if self.ema is not None:
            # A state without running statistics is of weights alone.
            _copy([*state["ema"], *self._averaged[len(state["ema"]) :]], self.ema)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    # Steps one by one

    def _begin(self) -> None:
        """Before steps: the optimizer has the parameters that it had, and its rates where the device reads them."""
        count = sum(len(group["params"]) for group in self.optimizer.param_groups)
        if count != len(self._parameters):
            raise InputError(
                f"optimizer: expected the {len(self._parameters)} parameters that it had when this step was made, got "
                f"{count}; make another CapturedStep of it"
            )
        # Who sets a rate may have put a number in its place.
        for group, place in zip(self.optimizer.param_groups, self._places, strict=False):
            if place is not None and group["lr"] is not place:
                # Filled with a number it waits for nothing.
                place.copy_(rate) if isinstance(rate := group["lr"], torch.Tensor) else place.fill_(rate)
                group["lr"] = place

    def _alone(self, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        if self.device.type != "cuda" or not self._replayed:
            return self._step(batch)
        form = _form_of(batch)
        self._warm[form] = self._warm.get(form, 0) + 1
        if self._warm[form] <= WARM_UP_STEPS:
            # Aligned as the graph's own will be, so that the kernels for it are loaded by then.
            batch = tuple(one.clone() for one in batch)
        # The optimizer has all its state by then.
        is_last = self._warm[form] == WARM_UP_STEPS
        before = _numbers(self.optimizer) if is_last else []
        # Where it will be recorded, so that autograd keeps to that stream.
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            terms = self._step(batch)
        current.wait_stream(self._stream)
        if is_last and (_numbers(self.optimizer) != before or not _is_on_device(self.optimizer)):
            # What a step changes on the host, a graph would have as it was.
            self._replayed = 0
        return terms

    def _step(self, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        if not self.schedule.is_constant:
            share = self.schedule(self._count)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].copy_(rate * share)
                else:
                    group["lr"] = rate * share.item()
        self._update.zero_grad()
        terms = self._gradients(batch)
        if self._scaler is None:
            self._update.step(self.clip_norm)
        else:
            if self.clip_norm is not None:
                self._scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self._parameters, self.clip_norm)
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self._update.average()
        if self.ema is not None:
            count = len(self._parameters)
            average(self.ema[count:], self._averaged[count:], self._decay)
        self._count.add_(1)
        return terms

    def _gradients(self, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """The gradients of the mean over the batch; the means of the terms."""
        if self.accumulate == 1:
            with self._products():
                terms = None if self._replay is None else self._replay(self.model, batch)
            return self._backward(batch, None) if terms is None else terms
        count = len(batch[0])
        if count == 0:
            raise InputError(f"batch: expected samples to cut into {self.accumulate} parts, got none")
        parts = list(zip(*(one.chunk(self.accumulate) for one in batch), strict=True))
        means: dict[str, torch.Tensor] = {}
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            with contextlib.nullcontext() if is_last else self._before_the_last():
                terms = self._backward(part, len(part[0]) / count)
            for name, term in terms.items():
                means[name] = means[name] + term if name in means else term
        return means

    def _backward(self, part: tuple[torch.Tensor, ...], share: float | None) -> dict[str, torch.Tensor]:
        """Gradients of a batch, or of a part whose loss counts as its share; the terms, counted so too."""
        with self._products():
            with _autocast(self.device, self._type):
                loss = self._loss(self.model, *part)
            loss, terms = _with_terms(loss)
            if share is not None:
                loss = loss * share
                terms = {name: term * share for name, term in terms.items()}
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        return terms

    @contextlib.contextmanager
    def _before_the_last(self) -> Iterator[None]:
        """Context of a part that others follow: no step ends with it, and processes exchange the sum of all parts."""
        models = [one for one in self.model.modules() if isinstance(one, Model)]
        is_exchanged = isinstance(self.model, nn.parallel.DistributedDataParallel)
        try:
            for one in models:
                one.ends_step = False
            with self.model.no_sync() if is_exchanged else contextlib.nullcontext():
                yield
        finally:
            for one in models:
                one.ends_step = True

    # Steps of a graph

    def _recording_of(self, group: Sequence[tuple[torch.Tensor, ...]]) -> _Recording | None:
        """What replays the group, which is recorded once its batches are warm; None if they are taken one by one."""
        if self._replayed == 0 or len(group) not in (1, self._replayed) or not CapturedStep._replays:
            return None
        form, *others = {_form_of(batch) for batch in group}
        if others:
            return None
        other = next(iter(self._recordings.values()), None)
        if other is not None and not other.is_current():
            self._recordings.clear()
            self._warm.clear()
            other = None
        is_warm = self._warm.get(form, 0) >= WARM_UP_STEPS
        if other is not None and other.form != form:
            # Batches that come one by one make room for those that come in whole groups.
            if not is_warm or len(group) == 1 or self._replayed in self._recordings:
                return None
            self._recordings.clear()
            other = None
        if len(group) not in self._recordings and is_warm:
            self._recordings[len(group)] = _Recording(self._step, self.optimizer, group, self._stream, other)
        return self._recordings.get(len(group))


# The shapes and dtypes of a batch's tensors.
_Form = tuple[tuple[torch.Size, torch.dtype], ...]


def _form_of(batch: tuple[torch.Tensor, ...]) -> _Form:
    return tuple((one.shape, one.dtype) for one in batch)


def _options(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    return (value for group in optimizer.param_groups for name, value in group.items() if name != "params")


def _state(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, Any]]:
    """Each parameter with each value that the optimizer keeps of it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for value in optimizer.state.get(parameter, {}).values():
                yield parameter, value


def _numbers(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The optimizer's options and state, but for tensors."""
    values = [*_options(optimizer), *(value for _, value in _state(optimizer))]
    return [one for one in values if not isinstance(one, torch.Tensor)]


def _is_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the tensors of the optimizer's state are where the parameters are."""
    return all(
        value.device == parameter.device
        for parameter, value in _state(optimizer)
        if isinstance(value, torch.Tensor)
    )


def _reads_rate_on_device(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the update of a group takes a learning rate from the device's memory without waiting for it."""
    is_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    return bool(group.get("fused") or (is_adam and group.get("capturable")))


@contextlib.contextmanager
def without_replays() -> Iterator[None]:
    """Within it `CapturedStep` takes steps on CUDA one by one: what a graph works in was allocated when it was made."""
    before, CapturedStep._replays = CapturedStep._replays, False
    try:
        yield
    finally:
        CapturedStep._replays = before


class _Recording:
    """Steps as a CUDA graph, with the memory that batches are copied to and terms come from.

    Args:
        step: what is recorded, for each batch.
        optimizer: its gradients are freed first, so that the graph has its own.
        group: batches of the sizes to come.
        stream: where steps were taken before.
        other: a recording of another number of the same steps, in whose memory this one works too. Only one of them is
            replayed at a time, and a replay writes there whatever it reads; what is read after it, the terms and
            gradients, each of them has for itself.

    Raises:
        InputError: something in a step cannot be recorded.
    """

    def __init__(
        self,
        step: Callable[[tuple[torch.Tensor, ...]], dict[str, torch.Tensor]],
        optimizer: torch.optim.Optimizer,
        group: Sequence[tuple[torch.Tensor, ...]],
        stream: torch.cuda.Stream,
        other: _Recording | None,
    ) -> None:
        self.form = _form_of(group[0])
        self._inputs = [tuple(torch.empty_like(one) for one in batch) for batch in group]
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        optimizer.zero_grad(set_to_none=True)
        try:
            pool = None if other is None else other._graph.pool()
            # Recording takes no step. Other threads, such as one that fetches batches, may allocate meanwhile.
            with recording(self._graph, stream, "thread_local", pool):
                terms = [step(batch) for batch in self._inputs]
                self._terms = {name: torch.stack([one[name] for one in terms]) for name in terms[0]}
        except RuntimeError as error:
            # Gradients that the failed graph has made are no one's.
            optimizer.zero_grad(set_to_none=True)
            # Ops of aefast say in these words what torch has an error of its own for.
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"model, loss, optimizer: expected a step that a CUDA graph can record, got {reason!r}; with "
                "steps_per_replay=0 steps are taken one by one"
            ) from error
        self._optimizer = optimizer
        self._gradients = [(one, one.grad) for group in optimizer.param_groups for one in group["params"]]
        self._recorded = self._values()

    def _values(self) -> list[Any]:
        """What the graph has as it was: numbers, and the memory of parameters and of the optimizer's state."""
        values = [*_options(self._optimizer), *(value for _, value in _state(self._optimizer))]
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                values += [parameter.requires_grad, parameter.data_ptr()]
        return values

    def is_current(self) -> bool:
        """Whether a replay does what a step would."""
        values = self._values()
        return len(values) == len(self._recorded) and all(
            one is other if isinstance(one, torch.Tensor) else one == other
            for one, other in zip(values, self._recorded, strict=True)
        )

    def replay(self, group: Sequence[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        for kept, batch in zip(self._inputs, group, strict=True):
            for to, one in zip(kept, batch, strict=True):
                to.copy_(one, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        # The next replay writes there.
        return {name: values.clone() for name, values in self._terms.items()}


def _statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running means and variances of batch normalizations, which are of the weights of the moment."""
    named = (dict(one.named_buffers(recurse=False)) for one in model.modules())
    found = (own.get(name) for own in named for name in ("running_mean", "running_var"))
    return [one for one in found if one is not None]


@torch.no_grad()
def _copy(values: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> None:
    for one, value in zip(to, values, strict=True):
        one.copy_(value)


class EagerStep:
    """The same step on the plain PyTorch twin of a model: what `CapturedStep` is compared with.

    Args:
        model: the model whose twin, with copied weights, is trained.
        lr: learning rate of Adam.
        precision: "fp32", or "bf16" or "fp16" by autocast, on the CPU too, where it is the fastest that PyTorch has;
            fp16 without a loss scale.
    """

    def __init__(self, model: Model, lr: float, precision: str = "fp32") -> None:
        self.model = model
        self.twin = model.eager_twin()
        self._type = PRECISIONS[check_choice(precision, "precision", PRECISIONS)]
        self.optimizer = make_optimizer(self.twin.parameters(), lr)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Train on a batch (B, features); the loss before the update, a detached scalar."""
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(batch.device, self._type):
            loss = self.model.eager_loss(self.twin, batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
