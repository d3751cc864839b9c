"""Fused ops for the modules that someone has already: ``aefast.patch(model)``."""

from __future__ import annotations

import difflib
import sys
import textwrap
import types
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aefast.errors import AefastError, InputError
from aefast.patch import _dense, _losses, _pythae, _sites
from aefast.patch._classes import Patched, derived, is_plain

__all__ = ["KINDS", "Entry", "Report", "patch"]

KINDS = ("dense", "losses", "pythae")
"""What `patch` looks for: dense layers with activations, losses of reconstructions, and pythae's models."""


@dataclass(frozen=True)
class Entry:
    """What became of a part of a model.

    Attributes:
        where: the qualified name of the module, and behind a colon its method or the places of its children; empty for
            the model itself.
        what: the part, and behind an arrow the op that has taken its place.
        reason: why it was left as it is; None if it was not.
    """

    where: str
    what: str
    reason: str | None = None


@dataclass(frozen=True)
class _Change:
    name: str
    module: nn.Module
    original: type[nn.Module]
    patched: type[nn.Module]


@dataclass(frozen=True)
class Report:
    """What `patch` did to a model, and the way back. As a context manager it goes back at the end.

    Attributes:
        entries: the parts of the model that were swapped, or that might have been.
    """

    entries: tuple[Entry, ...]
    _changes: tuple[_Change, ...] = field(repr=False, default=())

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is not None)

    def undo(self) -> None:
        """Makes the model what it was; a second time it does nothing. Copies of the model stay patched.

        Raises:
            AefastError: something else has changed the class of a module since. Nothing is undone then.
        """
        for change in self._changes:
            if type(change.module) not in (change.patched, change.original):
                raise AefastError(
                    f"undo: the class of {change.name or 'the model'} has changed since, to "
                    f"{type(change.module).__name__}; undo that first"
                )
        for change in self._changes:
            change.module.__class__ = change.original

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left as they were"]
        width = max((len(entry.where) for entry in self.entries), default=0)
        lines += [f"  {entry.where or '·':<{width}}  {entry.what}" for entry in self.swapped]
        lines += [f"  {entry.where or '·':<{width}}  {entry.what}: {entry.reason}" for entry in self.left]
        return "\n".join(line.rstrip() for line in lines)


def patch(
    model: nn.Module, *, kinds: Sequence[str] = KINDS, skip: Sequence[str] = (), noise: str = "fused"
) -> Report:
    """Swap, in place, what aefast has fused ops for in `model`.

    - "dense": runs of Linear and activation in every Sequential become `mlp` or `linear_act`, and calls such as
      ``F.relu(self.fc(x))`` or ``x = self.fc(x); x = self.act(x)`` in the methods of hand-written modules `linear_act`.
    - "losses": the modules MSELoss, L1Loss, HuberLoss, SmoothL1Loss, BCELoss and BCEWithLogitsLoss, and the functions
      of `torch.nn.functional` that they call, where a module's methods call them, become `reconstruction_loss`.
    - "pythae": the losses of pythae's AE, VAE, INFOVAE_MMD and WAE_MMD, and the sampling of its VAEs.

    Modules and parameters stay the same objects, with their hooks, and the state dict keeps its keys: a patched module
    has another class, derived from its own, with other methods. What is swapped is looked up in each call, and whatever
    does not fit then (a layer that has got hooks, a complex operand, a loss that broadcasts) runs as it was written.
    Copies by `copy.deepcopy` are patched; a pickle, and so what ``torch.save(model)`` writes, holds the model as it
    was.

    Args:
        model: any module; also one in DistributedDataParallel or torch.compile.
        kinds: what to look for, of `KINDS`.
        skip: qualified names of modules that are left alone, with all they contain.
        noise: where pythae's VAEs have theirs from: "fused", from the op that samples; or "torch", drawn as pythae
            draws it, so that a seed gives the same losses with and without the patch.

    Returns:
        what was swapped and what was not, with ``undo()``.

    Raises:
        InputError: `model` is no module, a kind or a noise is none of the above, or there is no module of that name.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = frozenset(_checked("kinds", kinds, KINDS))
    skipped = _checked("skip", skip, dict(model.named_modules()))
    if noise not in _pythae.NOISES:
        raise InputError(f"patch: noise must be one of {', '.join(_pythae.NOISES)}, got {noise!r}")
    alone = {part for name in skipped for part in model.get_submodule(name).modules()}
    search = _Search(wanted, noise, alone)
    for name, module in model.named_modules():
        if name in skipped:
            search.leave(name, type(module).__name__, "it is skipped")
        elif module not in alone:
            search.look_at(name, module)
    entries = [*search.entries, *search.remaining()]
    if not entries:
        entries = [Entry("", type(model).__name__, "it has no part that aefast has an op for")]
    for change in search.changes:
        change.module.__class__ = change.patched
    return Report(tuple(entries), tuple(search.changes))


def _checked(name: str, values: Any, known: Iterable[str]) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"patch: {name} must be a sequence of names, got {values!r}")
    values, known = list(values), list(known)
    for value in values:
        if value not in known:
            close = difflib.get_close_matches(str(value), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            expected = f"among {', '.join(known)}" if name == "kinds" else "names of the model's modules"
            raise InputError(f"patch: {name} must be {expected}, got {value!r}{hint}")
    return values


class _Search:
    """Goes through the modules of a model, from the outside in, and changes nothing."""

    def __init__(self, kinds: frozenset[str], noise: str, skipped: set[nn.Module]) -> None:
        self.kinds = kinds
        self.noise = noise
        self.skipped = skipped
        self.entries: list[Entry] = []
        self.changes: list[_Change] = []
        # Blocks of one kind have one class, as they had before.
        self._classes: dict[Any, type[nn.Module]] = {}
        self._fused: set[nn.Module] = set()
        # Layers and convolutions by name, and the reasons that the modules around them give.
        self._candidates: list[tuple[str, nn.Module]] = []
        self._reasons: dict[nn.Module, str] = {}

    def leave(self, where: str, what: str, reason: str) -> None:
        self.entries.append(Entry(where, what, reason))

    def look_at(self, name: str, module: nn.Module) -> None:
        if isinstance(module, Patched):
            self.leave(name, type(module).__name__, "it is patched already")
            self._fused.update(module.modules())
            return
        if "dense" in self.kinds and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            self._candidates.append((name, module))
        if isinstance(module, torch.jit.ScriptModule):
            return
        if "pythae" in self.kinds:
            adapter = _pythae.adapter_of(module, self.noise)
            if isinstance(adapter, _pythae.Adapter):
                self._adapt(name, module, adapter)
                return
            if adapter is not None:
                self.leave(name, type(module).__name__, adapter)
        if "losses" in self.kinds and isinstance(module, nn.modules.loss._Loss):
            self._loss(name, module)
        elif "dense" in self.kinds and _dense.runs_through(type(module)) and "forward" not in vars(module):
            self._sequential(name, module)
        else:
            self._methods(name, module)

    def _change(self, name: str, module: nn.Module, key: Any, attributes: dict[str, Any]) -> bool:
        original = type(module)
        key = (original, key)
        if key not in self._classes:
            try:
                self._classes[key] = derived(original, attributes)
            except Exception as error:
                # Whatever a metaclass does when a class is derived from one of its own.
                self.leave(name, original.__name__, f"no class can be derived from it: {error}")
                return False
        self.changes.append(_Change(name, module, original, self._classes[key]))
        return True

    def _adapt(self, name: str, module: nn.Module, adapter: _pythae.Adapter) -> None:
        if adapter.takes_layers and not self.skipped.isdisjoint(module.modules()):
            self.leave(
                name, type(module).__name__, "a part of it is skipped, and its layers are taken together"
            )
            return
        if self._change(name, module, adapter.what, {**adapter.methods}):
            self.entries.append(Entry(name, f"{type(module).__name__} → {adapter.what}"))
            self._fused.update(getattr(module, head) for head in adapter.heads)

    def _loss(self, name: str, module: nn.Module) -> None:
        what = type(module).__name__
        if type(module) not in _losses.MODULES:
            self.leave(name, what, "aefast has no such loss")
            return
        reason = _losses.why_not_module(module)
        if reason is not None:
            self.leave(name, what, reason)
        elif self._change(name, module, "loss", dict(_losses.MODULES[type(module)])):
            self.entries.append(Entry(name, f"{what} → reconstruction_loss"))

    def _sequential(self, name: str, module: nn.Sequential) -> None:
        children = list(module._modules.items())
        modules = [child for _, child in children]
        skipped = frozenset(one for one, child in children if child in self.skipped)
        found = list(_runs(modules, _dense.indices_of(skipped, module)))
        for index, child in enumerate(modules):
            follower = type(modules[index + 1]).__name__ if index + 1 < len(modules) else None
            if isinstance(child, nn.Linear):
                reason = "no activation follows it in its Sequential"
                if follower and modules[index + 1] in self.skipped:
                    reason = f"the {follower} that follows it is skipped"
                elif follower and not is_plain(modules[index + 1]):
                    reason = f"the {follower} that follows it has hooks, or a forward of its own"
                elif follower:
                    reason = f"it is followed by {follower}, which is no activation that can be fused with it"
                self._reasons.setdefault(child, reason)
        attributes = {"forward": _dense.sequential_forward, "aefast_skipped": skipped}
        if not found or not self._change(name, module, ("sequential", skipped), attributes):
            return
        for layers, start, end in found:
            self._fused.update(linear for linear, _ in layers)
            shown = " + ".join(type(one).__name__ for one in modules[start:end])
            part = f"{children[start][0]}-{children[end - 1][0]}"
            op = "linear_act" if len(layers) == 1 else "mlp"
            self.entries.append(Entry(_within(name, part), f"{shown} → {op}"))

    def _methods(self, name: str, module: nn.Module) -> None:
        if type(module).__module__.startswith("torch.") or "forward" in vars(module):
            reason = f"what calls it, a {type(module).__name__}, is torch's own"
            if "forward" in vars(module):
                reason = f"the {type(module).__name__} that calls it has a forward of its own"
            for linear in _layers_below(module):
                self._reasons.setdefault(linear, reason)
            return
        found = _sites.rewrite(module, self.kinds, self.skipped)
        for method, call, reason in found.left:
            self.leave(_within(name, method), textwrap.shorten(call, 60, placeholder=" ..."), reason)
        unread = "; ".join(f"{method}: {reason}" for method, reason in found.unread.items())
        reason = f"no activation that could be fused is applied to its output where {type(module).__name__} calls it"
        for linear in _layers_below(module):
            self._reasons.setdefault(linear, f"{reason} ({unread})" if unread else reason)
        if found.methods and self._change(name, module, tuple(found.sites), dict(found.methods)):
            self.entries += [Entry(_within(name, method), what) for method, what in found.sites]
            self._fused.update(found.linears)
            if found.is_open:
                self._fused.update(_layers_below(module))

    def remaining(self) -> Iterator[Entry]:
        """The layers that no op has taken."""
        for name, module in self._candidates:
            what = type(module).__name__
            if not isinstance(module, nn.Linear):
                yield Entry(name, what, "aefast has no op for convolutions")
            elif module not in self._fused:
                reason = _dense.why_not_linear(module) or self._reasons.get(module)
                yield Entry(name, what, reason or "no activation follows it")


def _within(name: str, part: str) -> str:
    return f"{name}:{part}" if name else part


def _runs(
    modules: Sequence[nn.Module], skipped: Collection[int]
) -> Iterator[tuple[list[_dense.Layer], int, int]]:
    """The runs of layers in a Sequential, with the indices where they start and end."""
    index = 0
    while index < len(modules):
        layers, end = _dense.run_at(modules, index, skipped)
        if layers:
            yield layers, index, end
        index = end if layers else index + 1


def _layers_below(module: nn.Module) -> list[nn.Module]:
    """Its linear layers, and those in the lists that it has."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.Linear):
            found.append(child)
        elif isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _layers_below(child)
    return found


class _CallablePackage(types.ModuleType):
    """``aefast.patch`` is the package, once that is imported, and stays what one calls."""

    def __call__(self, *arguments: Any, **options: Any) -> Report:
        return patch(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
