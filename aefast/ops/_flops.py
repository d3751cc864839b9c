"""What `torch.utils.flop_counter` counts of the ops: two operations for a product of two numbers, as for PyTorch's own.

Importing the counter imports Triton. So the formulas are told to it when somebody else imports it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from aefast.kernels.activation import NEED_WEIGHT, NEED_X

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[str, Callable[..., int]] = {}


def counted(*ops: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: the operations of a call of each of `ops`, from its arguments, with shapes in the place of tensors."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _FORMULAS.update(dict.fromkeys(ops, formula))
        if _COUNTER in sys.modules:
            _tell(sys.modules[_COUNTER])
        return formula

    return register


def of_layer(x: Sequence[int], weight: Sequence[int]) -> int:
    """Of the product of x (M, K) and weight (N, K)."""
    return 2 * x[0] * math.prod(weight)


def wanted(needs: int) -> int:
    """How many of the gradients that take a product `needs` asks for: those of x and weight."""
    return bool(needs & NEED_X) + bool(needs & NEED_WEIGHT)


def _tell(counter: ModuleType) -> None:
    def formula_of(op: str) -> Callable[..., int]:
        return lambda *arguments, out_shape, **named: _FORMULAS[op](*arguments, **named)

    for op in _FORMULAS:
        target = getattr(torch.ops.aefast, op)
        if target not in counter.flop_registry:
            counter.register_flop_formula(target)(formula_of(op))


class _Finder:
    """Finds the counter as the other finders do, and has the formulas told to it once it is executed."""

    def __init__(self) -> None:
        self._is_searching = False

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _COUNTER or self._is_searching:
            return None
        self._is_searching = True
        try:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((one for one in found if one is not None), None)
        finally:
            self._is_searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                _tell(module)

            spec.loader.exec_module = execute_and_tell
        return spec


sys.meta_path.insert(0, _Finder())
