"""What an op is, which backends there are, and which of them serves a call."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from aefast import _library
from aefast.errors import BackendError, InputError

logger = logging.getLogger("aefast")


@dataclass(frozen=True)
class Cost:
    """The least that a call has to do: bytes moved to or from memory, floating-point operations of its products, and
    exponentials and logarithms."""

    bytes: int
    flops: int
    exps: int


@dataclass(frozen=True)
class Op:
    """One op: everything that backends, tests and the benchmark need to know of it.

    ``function`` is the public function and ``reference`` the same in plain PyTorch, differentiable and
    exact in float64. ``samples(device, dtype)`` yields their keyword arguments, among them empty, one-wide,
    prime and strided shapes. ``cost(backward, **arguments)`` is that of a forward, or of a forward that saves
    and the backward after it. ``terms(**arguments)``, of an op whose results are sums of terms that cancel, are the
    sums of the terms' magnitudes, in float64: one number for each output and then for each differentiable
    argument, the largest of its elements. Rounding errors are in proportion to them. ``launchers`` is the op whose
    kernels it runs on, where it has none of its own.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterator[dict[str, Any]]]
    cost: Callable[..., Cost]
    terms: Callable[..., list[float]] | None = None
    launchers: str | None = None


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op


@dataclass(frozen=True)
class Backend:
    """A row of `BACKENDS`.

    ``available(device_type)`` says why the backend can serve no tensors of such a device here, or None.
    ``supports(op, device_type, dtype)`` says why it cannot serve such tensors, or None. ``kernels(op)`` holds the op's
    launchers as attributes.
    """

    name: str
    available: Callable[[str], str | None]
    supports: Callable[[str, str, torch.dtype], str | None]
    kernels: Callable[[str], Any]


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _other_device(device_type: str, given: str) -> str | None:
    return None if given == device_type else f"it serves {device_type} tensors, and these are on {given}"


def _compiled_supports(device_type: str) -> Callable[[str, str, torch.dtype], str | None]:
    """Of the compiled library for `device_type`."""

    def supports(op: str, given: str, dtype: torch.dtype) -> str | None:
        reason = _other_device(device_type, given)
        if reason is not None or _library.load(device_type) is not None:
            return reason
        has_kernels = hasattr(getattr(torch.ops, f"aefast_{device_type}"), op)
        return None if has_kernels else f"libaefast_{device_type}.so has no kernels for {op}"

    return supports


# What the CUDA library is built for and Triton compiles for.
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def _too_old() -> str | None:
    """Why a GPU here runs no kernels, or None. Which of several a tensor is on makes no difference.

    Asking makes torch start CUDA, which is not for calls on the CPU: in a forked process it fails.
    """
    if torch.version.cuda is None:
        return None
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < _LEAST_CAPABILITY:
            has, needed = (".".join(map(str, one)) for one in (capability, _LEAST_CAPABILITY))
            name = torch.cuda.get_device_name(index)
            return (
                f"cuda:{index}, {name}, has compute capability {has}, and kernels need {needed} or later; "
                "CUDA_VISIBLE_DEVICES hides it from others"
            )
    return None


def _cuda_available(device_type: str) -> str | None:
    missing = _library.load("cuda") or (None if torch.cuda.is_available() else "torch finds no CUDA device")
    return missing or (_too_old() if device_type == "cuda" else None)


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; pip install "aefast[triton]"'
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


def _triton_available(device_type: str) -> str | None:
    if interpreting():
        return triton_missing()
    if torch.cuda.is_available():
        return triton_missing() or (_too_old() if device_type == "cuda" else None)
    return "torch finds no CUDA device, and TRITON_INTERPRET is not 1"


def _triton_supports(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if not interpreting():
        return _other_device("cuda", device_type)
    is_wrong = dtype == torch.bfloat16
    return _other_device("cpu", device_type) or (
        "Triton's interpreter miscalculates bfloat16" if is_wrong else None
    )


@functools.cache
def _triton_kernels(op: str) -> Any:
    return importlib.import_module(f"aefast.kernels.triton.{op}")


class _CompiledKernels:
    """The launchers that a compiled library registers with PyTorch."""

    def __init__(self, namespace: str):
        self._ops = getattr(torch.ops, namespace)

    def __getattr__(self, launcher: str) -> Any:
        overload = getattr(self._ops, launcher).default
        # What an overload's __call__ calls, without the Python frame around it.
        call = getattr(overload, "_op", overload)
        setattr(self, launcher, call)
        return call


@functools.cache
def _compiled_kernels(device_type: str) -> Any:
    # A program that was exported elsewhere names a backend that nobody has asked about here.
    missing = _library.load(device_type)
    if missing is not None:
        raise BackendError(f"backend {device_type!r} has no kernels here: {missing}")
    return _CompiledKernels(f"aefast_{device_type}")


def _anything(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    return None


def _no_kernels(op: str) -> Any:
    raise BackendError(f"the eager backend runs {op} in PyTorch and has no kernels")


# In order of preference. "eager" is the reference itself, differentiated by PyTorch.
BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", _cuda_available, _compiled_supports("cuda"), lambda op: _compiled_kernels("cuda")),
    Backend("triton", _triton_available, _triton_supports, _triton_kernels),
    Backend(
        "cpu",
        lambda device_type: _library.load("cpu"),
        _compiled_supports("cpu"),
        lambda op: _compiled_kernels("cpu"),
    ),
    Backend("eager", lambda device_type: None, _anything, _no_kernels),
)
BACKEND_NAMES = ("auto", *(backend.name for backend in BACKENDS))
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _checked_name(name: str, origin: str) -> str:
    if name not in BACKEND_NAMES:
        raise InputError(f"{origin} must be one of {', '.join(BACKEND_NAMES)}, got {name!r}")
    return name


# A wrong name in the environment is an error of the first call, not of the import.
_default = os.environ.get("AEFAST_BACKEND") or "auto"
_requested: ContextVar[str] = ContextVar("aefast_backend")

# Bound here because looking it up takes longer than calling it. -1 says that no backward is under way.
_graph_task = torch._C._current_graph_task_id


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it, the calls of this thread use backend `name`: auto, cuda, triton, cpu or eager.

    A backend that cannot serve a call raises `BackendError`; "auto" takes the first that can. A graph that
    torch.compile makes keeps the backends it was compiled with. Activation checkpointing recomputes under the
    request of the moment: let the function that is checkpointed enter the context, or keep the backward within it
    too. On CUDA, where backwards run in threads of autograd's, the latter does if torch hands these the context of the
    thread that has started the backward, as 2.13 does and 2.11 does not.
    """
    token = _requested.set(_checked_name(name, "backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested() -> str:
    """The backend that a call asks for where it is made, "auto" unless someone said otherwise."""
    name = _requested.get(None)
    if name is None and _graph_task() != -1 and torch._C._is_key_in_tls("context"):
        # In a thread of autograd's the context is empty, and that of the thread that started the backward is here.
        name = torch._C._get_obj_in_tls("context").get(_requested)
    return name or _default


def refusal(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot serve `op` on such tensors, or None if it can."""
    row = _BY_NAME[name]
    if op in OPS:
        op = OPS[op].launchers or op
    return row.available(device_type) or row.supports(op, device_type, dtype)


@functools.cache
def _resolve(
    request: str, op: str, device_type: str, dtype: torch.dtype, unfit: tuple[str, str] | None
) -> str:
    def refused(name: str) -> str | None:
        reason = refusal(name, op, device_type, dtype)
        return unfit[1] if reason is None and unfit is not None and unfit[0] == name else reason

    if _checked_name(request, "AEFAST_BACKEND") != "auto":
        reason = refused(request)
        if reason:
            raise BackendError(f"backend {request!r} cannot serve {op}: {reason}")
        return request
    reasons = []
    for row in BACKENDS:
        reason = refused(row.name)
        if reason is None:
            break
        if row.supports(op, device_type, dtype) is None:
            reasons.append(f"{row.name}: {reason}")
    if reasons:
        logger.info("%s on %s runs on the %s backend (%s)", op, device_type, row.name, "; ".join(reasons))
    return row.name


def _reference_only(request: str, op: str, reason: str) -> str:
    if request == "auto":
        return "eager"
    raise BackendError(f"backend {request!r} cannot serve {op}: {reason} need backend 'eager' or 'auto'")


_TRANSFORMS = "torch.func transforms (vmap, jvp, grad, ...) and forward-mode differentiation"


def _choose(
    op: str, device_type: str, dtype: torch.dtype, unfit: tuple[str, str] | None, has_transforms: bool
) -> str:
    request = requested()
    name = _resolve(request, op, device_type, dtype, unfit)
    return _reference_only(request, op, _TRANSFORMS) if has_transforms and name != "eager" else name


# What torch.compiler.assume_constant_result does; calling that would import the compiler, over a second.
_choose._dynamo_marked_constant = True


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0 or _has_transforms()


def choose(
    op: str,
    tensor: torch.Tensor,
    *others: torch.Tensor | None,
    unfit: tuple[str, str] | None = None,
) -> str:
    """The backend that serves a call of `op` on tensors like `tensor`, with `others` of its dtype and device.

    That is the one requested by name. Else it is the first in `BACKENDS` that can serve the call, but
    "eager" under torch.func's transforms and forward-mode differentiation and for sparse and nested
    tensors, which the reference alone supports. `unfit` is a backend that is not for this call, and why.

    Raises:
        BackendError: a backend was requested by name and cannot serve the call.
    """
    name = _choose(op, tensor.device.type, tensor.dtype, unfit, is_transformed())
    if name == "eager" or torch.compiler.is_compiling():
        return name
    for one in (tensor, *others):
        if one is not None and (one.layout is not torch.strided or one.is_nested):
            return _reference_only(requested(), op, f"tensors of layout {one.layout}")
    return name


PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
# The backends that are called through the dispatcher: it hands them nothing but strided tensors of their
# device, and they examine the shapes.
_EXAMINING = frozenset(("cuda", "cpu"))


# Bound here because looking them up takes longer than calling them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
# The compiler knows the answer of this one, and takes another, `peek_interpreter_stack`, for always there.
_has_transforms = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def is_watched() -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a transform sees what is called now."""
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or _has_transforms()
        or _tracing_state() is not None
    )


def is_direct(name: str, *tensors: torch.Tensor | None) -> bool:
    """Whether launchers of backend `name` may be called without the op in ``torch.ops.aefast`` around them.

    They may on plain tensors with nobody watching. Compilers, tracers, torch.func's transforms and tensor
    subclasses see the op instead, at several times the cost of a call, and PyTorch resolves what is a view of
    the negative of another tensor.
    """
    if is_watched() or any(type(tensor) not in PLAIN for tensor in tensors):
        return False
    return name in _EXAMINING or not any(tensor is not None and tensor.is_neg() for tensor in tensors)


@functools.cache
def _launchers(request: str, op: str, device_type: str, dtype: torch.dtype) -> tuple[str, Any] | None:
    name = _resolve(request, op, device_type, dtype, None)
    return (name, _kernels(name, op)) if name in _EXAMINING else None


def unexamined(op: str, tensor: torch.Tensor) -> tuple[str, Any] | None:
    """The backend, and its launchers, that may be called at once with nothing known but that `tensor` is `PLAIN`.

    Checks cost a short call more than its work. Where this names a backend, its launchers are tried first, and
    the checks come when they refuse.
    """
    if is_watched():
        return None
    if tensor.is_cpu:
        device_type = "cpu"
    elif tensor.is_cuda:
        device_type = "cuda"
    else:
        return None
    if torch.is_autocast_enabled(device_type):
        return None
    chosen = _launchers(requested(), op, device_type, tensor.dtype)
    if chosen is not None and device_type == "cpu":
        _follow_matmul_precision()
    return chosen


# Behind `torch.backends.mkldnn.matmul.fp32_precision`, whose lookup takes five times as long.
_fp32_precision = torch._C._get_fp32_precision_getter
_rounds_products = False


def _follow_matmul_precision() -> None:
    """Tells the CPU library, which is loaded, what torch's setting for products of float32 is."""
    global _rounds_products
    rounds = _fp32_precision("mkldnn", "matmul") == "bf16"
    if rounds is not _rounds_products:
        torch.ops.aefast_cpu.round_products(rounds)
        _rounds_products = rounds


# What launchers and PyTorch's dispatcher raise on operands they do not take.
REFUSALS = (RuntimeError, TypeError, ValueError, OverflowError, IndexError)


def kernels(name: str, op: str) -> Any:
    """The launchers of `op` on backend `name`."""
    launchers = _kernels(name, op)
    if name == "cpu":
        _follow_matmul_precision()
    return launchers


@functools.cache
def _kernels(name: str, op: str) -> Any:
    return _BY_NAME[name].kernels(op)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd follows what is computed of these."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 -- a generator takes longer than all the rest
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def wants_reference(grad: torch.Tensor) -> bool:
    """Whether a backward called with `grad` has to differentiate the reference instead of launching a kernel.

    So it is where the gradient itself is differentiated or transformed; ``is_grads_batched`` passes batches
    of gradients that are no transform's.
    """
    return (
        torch.is_grad_enabled()
        or is_transformed()
        or (not torch.compiler.is_compiling() and _is_legacy_batched(grad))
    )


def may_launch(grad: torch.Tensor) -> bool:
    """Whether a backward called with `grad` may call launchers that examine their operands at once.

    Otherwise, and when they refuse, `wants_reference` and `is_direct` tell what to do instead.
    """
    if type(grad) is not torch.Tensor or torch.is_grad_enabled() or is_watched():
        return False
    if grad.is_cpu:
        _follow_matmul_precision()
    return True


def gradients(
    op: str,
    backend: str,
    tensors: tuple[torch.Tensor | None, ...],
    settings: tuple[Any, ...],
    needs: tuple[bool, ...],
) -> Sequence[torch.Tensor | None]:
    """What the kernels of `op` compute of ``(*tensors, *settings)`` in its backward: a gradient for each of `needs`, or
    None where it is not needed, which the op in ``torch.ops.aefast`` leaves out."""
    if is_direct(backend, *tensors):
        return getattr(kernels(backend, op), f"{op}_backward")(*tensors, *settings)
    computed = iter(getattr(torch.ops.aefast, f"{op}_backward").default(*tensors, *settings, backend))
    return [next(computed) if need else None for need in needs]


def differentiate(
    function: Callable[..., Any],
    inputs: tuple[torch.Tensor | None, ...],
    needs: tuple[bool, ...],
    grad: torch.Tensor | tuple[torch.Tensor | None, ...],
) -> list[torch.Tensor | None]:
    """The gradients of `function` with respect to the inputs that need one, differentiable once more.

    A function that returns several tensors takes a gradient for each, None for one that nothing depends on. The
    inputs are differentiated through aliases, so that an input computed from another does not count twice.
    """
    with torch.enable_grad():
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        out = function(*aliases)
        if isinstance(out, torch.Tensor):
            out, grad = (out,), (grad,)
        given = [(one, its) for one, its in zip(out, grad, strict=True) if its is not None]
        outputs, upstream = zip(*given, strict=True)
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
