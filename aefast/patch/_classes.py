"""How a module gets another method and loses it again: by a class derived from its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

Methods = dict[str, Callable[..., Any]]
"""Methods by their names in the class."""


class Patched:
    """What classes of patched modules have in common.

    Such a module is the same object with the same attributes. Copies of it are patched too; a pickle is that of an
    instance of the original class, and can be read where aefast is not installed.
    """

    aefast_original: ClassVar[type[nn.Module]]
    # Names of children that are called as they are.
    aefast_skipped: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing: classes of users may keep a register of their subclasses, of which these are none."""

    def __reduce_ex__(self, protocol: int) -> Any:
        # Of protocol 2 and above, pickle insists on the class that the object has.
        function, arguments, *rest = super().__reduce_ex__(1)
        call = [self.aefast_original if one is type(self) else one for one in (function, *arguments)]
        return call[0], tuple(call[1:]), *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            made = inherited(memo)
        else:
            # A class may say that its arguments make it, without a state.
            function, arguments, *rest = self.__reduce_ex__(1)
            made = function(*copy.deepcopy(arguments, memo))
            memo[id(self)] = made
            if rest and rest[0] is not None:
                made.__setstate__(copy.deepcopy(rest[0], memo))
        if type(made) is self.aefast_original:
            made.__class__ = type(self)
        return made


def derived(original: type[nn.Module], attributes: dict[str, Any]) -> type[nn.Module]:
    """A class of the name of `original`, with `attributes` in the place of its own."""
    of_original = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {**of_original, "aefast_original": original, **attributes}
    return type(original)(original.__name__, (Patched, original), own)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of `module` is one of its class's forward and of nothing else.

    Spectral norm, pruning and observers hang hooks on a module, others give it a forward of its own.
    """
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )
