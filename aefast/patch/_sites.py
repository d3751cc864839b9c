"""Calls in a hand-written module's methods that are made to fused ops instead.

A method is compiled anew from its source, in which ``activation(linear(x))`` has become ``site(linear, x)`` and a loss
of `torch.nn.functional` the function in `_losses.FUSED`. All else stays what its author wrote: control flow, side
effects and what is looked up when.
"""

from __future__ import annotations

import ast
import copy
import dis
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from aefast.patch import _dense, _losses

# Their own classes are left to them; those that people derive from them are not.
HOSTS = ("torch", "lightning", "pytorch_lightning", "pythae", "aefast")
_PREFIX = "aefast_site_"
_NAMED = {*dis.hasname, *dis.hasconst, *dis.haslocal, *dis.hasfree}


@dataclass
class Rewriting:
    """What came out of the methods of a module.

    Attributes:
        methods: the new ones.
        sites: (method, what is fused now) in the order of the sources.
        left: (method, call, why it is left as it is).
        linears: the layers found in fused calls.
        is_open: whether a fused call finds its layer only when it is made, as in a loop over layers.
        unread: method → why nothing could be found in it.
    """

    methods: dict[str, Callable[..., Any]] = field(default_factory=dict)
    sites: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    linears: list[nn.Module] = field(default_factory=list)
    is_open: bool = False
    unread: dict[str, str] = field(default_factory=dict)


def methods_of(module_class: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods that people wrote, each as the class has it."""
    seen = set()
    for base in module_class.__mro__:
        if base is nn.Module or base.__module__.partition(".")[0] in HOSTS:
            seen.update(vars(base))
            continue
        for name, value in vars(base).items():
            if name not in seen and not name.startswith("__") and inspect.isfunction(value):
                yield name, value
            seen.add(name)


def rewrite(module: nn.Module, kinds: frozenset[str], skipped: Set[nn.Module]) -> Rewriting:
    """The methods of `module` with fused calls, of "dense" layers and "losses" as `kinds` has them, but of none of the
    layers and activations in `skipped`."""
    found = Rewriting()
    if not any(isinstance(child, nn.Linear) for child in module.modules()):
        kinds -= {"dense"}
    for name, function in methods_of(type(module)):
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        has_loss = "losses" in kinds and not names.isdisjoint(one.__name__ for one in _losses.FUSED)
        if not has_loss and "dense" not in kinds:
            continue
        try:
            tree = _source_of(function)
        except _Unreadable as error:
            found.unread[name] = str(error)
            continue
        visitor = _Visitor(module, name, function, tree.body[0], kinds, skipped, found)
        visitor.visit(tree.body[0])
        if visitor.cells:
            found.methods[name] = _compiled(tree, function, visitor.cells)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Of a function and of those defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


class _Unreadable(Exception):
    """Why a method's source cannot be worked on."""


def _source_of(function: types.FunctionType) -> ast.Module:
    """A module of nothing but the function's definition."""
    if hasattr(function, "__wrapped__"):
        raise _Unreadable("it is decorated")
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        raise _Unreadable("its source cannot be read") from None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise _Unreadable("it is no plain function")
    if tree.body[0].decorator_list:
        raise _Unreadable("it is decorated")
    ast.increment_lineno(tree, first - 1)
    if _read_by(_compiled(tree, function, {}).__code__) != _read_by(function.__code__):
        raise _Unreadable("its source is not, or no longer, what it was made from")
    return tree


def _read_by(code: types.CodeType) -> list[Any]:
    """What tells code from other code: its names, constants and operators, in order.

    Which instructions call a method depends on the file around it, too.
    """
    operators = ("BINARY_", "UNARY_", "COMPARE_", "CONTAINS_", "IS_")
    return [
        one.argrepr if one.opname.startswith(operators) else one.argval
        for part in _codes(code)
        for one in dis.get_instructions(part)
        if (one.opcode in _NAMED and not isinstance(one.argval, types.CodeType))
        or one.opname.startswith(operators)
    ]


def _compiled(tree: ast.Module, function: types.FunctionType, cells: dict[str, Any]) -> types.FunctionType:
    """The function that `tree` defines, with the globals, closure and defaults of `function`, to whose variables
    those in `cells` are added."""
    definition = tree.body[0]
    code = function.__code__
    # What gives the definition its free variables; it is never called.
    around = ast.parse(f"def aefast_around({', '.join([*code.co_freevars, *cells])}): pass")
    around.body[0].body = [definition]
    ast.fix_missing_locations(around)
    module = compile(around, code.co_filename, "exec", dont_inherit=True)
    own = next(one for one in _codes(module) if one.co_name == definition.name)
    if hasattr(code, "co_qualname"):
        own = own.replace(co_qualname=code.co_qualname)
    of_function = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(
        types.CellType(cells[name]) if name in cells else of_function[name] for name in own.co_freevars
    )
    made = types.FunctionType(own, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
    made.__annotations__, made.__dict__ = function.__annotations__, dict(function.__dict__)
    return made


_UNKNOWN = object()
_LOCAL = object()


class _Visitor(ast.NodeTransformer):
    """Replaces the calls in the definition of a method of `module`; `cells` are the variables they need."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        function: types.FunctionType,
        definition: ast.FunctionDef,
        kinds: frozenset[str],
        skipped: Set[nn.Module],
        found: Rewriting,
    ) -> None:
        self.module = module
        self.name = name
        self.function = function
        self.kinds = kinds
        self.skipped = skipped
        self.found = found
        self.cells: dict[str, Any] = {}
        code = function.__code__
        self.locals = {local for one in _codes(code) for local in (*one.co_varnames, *one.co_cellvars)}
        nodes = list(ast.walk(definition))
        self.uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        self.self_name = code.co_varnames[0] if code.co_argcount else None
        bound = [
            node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        ]
        bound += [node.arg for node in nodes if isinstance(node, ast.arg)]
        if bound.count(self.self_name) > 1:
            self.self_name = None

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for _, body in ast.iter_fields(node):
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                body[:] = self._joined(body)
        return super().generic_visit(node)

    def _joined(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """A statement ``h = linear(x)`` goes into the next where that is ``... = activation(h)`` and nothing else
        reads h."""
        joined: list[ast.stmt] = []
        for statement in body:
            before = joined[-1] if joined else None
            if (
                "dense" in self.kinds
                and isinstance(before, ast.Assign)
                and len(before.targets) == 1
                and isinstance(before.targets[0], ast.Name)
                and isinstance(statement, ast.Assign | ast.Return)
                and isinstance(statement.value, ast.Call)
                and self._reads_alone(statement, before.targets[0].id)
            ):
                call = _with_operand(statement.value, before.value)
                if call is not None and self._dense(call, is_trial=True) is not None:
                    joined.pop()
                    statement.value = call
            joined.append(statement)
        return joined

    def _reads_alone(self, statement: ast.Assign | ast.Return, name: str) -> bool:
        """Whether the operand of the statement's call is the variable `name`, whose value nothing else can see."""
        operand = _operand(statement.value)
        if not isinstance(operand, ast.Name) or operand.id != name:
            return False
        if isinstance(statement, ast.Assign):
            is_replaced = [getattr(one, "id", None) for one in statement.targets] == [name]
            if is_replaced and name not in self.function.__code__.co_cellvars:
                return True
        return self.uses[name] == 2

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if "dense" in self.kinds:
            made = self._dense(node)
            if made is not None:
                return self.generic_visit(made)
        if "losses" in self.kinds:
            self._loss(node)
        return self.generic_visit(node)

    def _dense(self, node: ast.Call, is_trial: bool = False) -> ast.Call | None:
        """The fused call that stands for ``activation(linear(x))``, or None if `node` is none."""
        inner = _operand(node)
        if not isinstance(inner, ast.Call) or len(inner.args) != 1 or inner.keywords:
            return None
        if isinstance(inner.args[0], ast.Starred):
            return None
        linear = self._resolved(inner.func)
        if linear is not _LOCAL and not _dense.is_linear(linear):
            return None
        operands = [node.func, inner.func, inner.args[0]]
        function = self._resolved(node.func)
        if isinstance(node.func, ast.Attribute) and node.func.value is inner:
            operands = operands[1:]
            site = _dense.method_applied(node.func.attr)
        elif isinstance(function, nn.Module) or function is _LOCAL:
            if len(node.args) > 1 or node.keywords:
                return None
            if function is not _LOCAL and _dense.of_module(function) is None:
                return None
            site = _dense.apply
        else:
            try:
                values = [ast.literal_eval(one) for one in node.args[1:]]
                by_name = {one.arg: ast.literal_eval(one.value) for one in node.keywords}
            except (ValueError, TypeError):
                return None
            if _dense.of_function(function, values, by_name) is None:
                return None
            site = _dense.applied(function, values, by_name)
        if self._may_be_skipped(linear) or self._may_be_skipped(function):
            if not is_trial:
                reason = "it calls a module that is skipped, or may do so"
                self.found.left.append((self.name, ast.unparse(node), reason))
            return None
        if is_trial:
            return node
        self._note(node, linear)
        return ast.copy_location(ast.Call(self._cell(site), operands, []), node)

    def _may_be_skipped(self, called: Any) -> bool:
        """Of a local variable, whether any module below is."""
        if called is _LOCAL:
            return not self.skipped.isdisjoint(self.module.modules())
        return isinstance(called, nn.Module) and called in self.skipped

    def _note(self, node: ast.Call, linear: Any) -> None:
        if linear is _LOCAL:
            self.found.is_open = True
        else:
            self.found.linears.append(linear)
        self.found.sites.append((self.name, f"{ast.unparse(node)} → linear_act"))

    def _loss(self, node: ast.Call) -> None:
        """Makes `node` a call of the fused loss, if it is one of torch's."""
        function = self._resolved(node.func)
        if not isinstance(function, types.FunctionType) or function not in _losses.FUSED:
            return
        options = {one.arg: one.value for one in node.keywords}
        reduction = options.pop("reduction", ast.Constant("mean"))
        if isinstance(reduction, ast.Constant):
            given = {name: value.value for name, value in options.items() if isinstance(value, ast.Constant)}
            given = {name: value for name, value in given.items() if name not in ("input", "target")}
            reason = _losses.why_not(function, reduction.value, given)
            if reason is not None:
                self.found.left.append((self.name, ast.unparse(node), reason))
                return
        node.func = ast.copy_location(self._cell(_losses.FUSED[function]), node.func)
        self.found.sites.append((self.name, f"{function.__name__} → reconstruction_loss"))

    def _cell(self, value: Any) -> ast.Name:
        name = f"{_PREFIX}{len(self.cells)}"
        self.cells[name] = value
        return ast.Name(name, ast.Load())

    def _resolved(self, node: ast.expr) -> Any:
        """What an expression of names, attributes and constant indices is now; `_LOCAL` for a local variable, and
        `_UNKNOWN` for anything else."""
        if isinstance(node, ast.Name):
            return self._variable(node.id)
        if isinstance(node, ast.Attribute):
            value = self._resolved(node.value)
            if isinstance(value, nn.Module):
                return {**vars(value), **value._modules}.get(node.attr, _UNKNOWN)
            return getattr(value, node.attr, _UNKNOWN) if isinstance(value, types.ModuleType) else _UNKNOWN
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            value = self._resolved(node.value)
            if isinstance(value, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                try:
                    return value[node.slice.value]
                except (IndexError, KeyError, TypeError):
                    return _UNKNOWN
        return _UNKNOWN

    def _variable(self, name: str) -> Any:
        if name == self.self_name:
            return self.module
        if name in self.locals:
            return _LOCAL
        code = self.function.__code__
        if name in code.co_freevars:
            try:
                return self.function.__closure__[code.co_freevars.index(name)].cell_contents
            except ValueError:
                return _UNKNOWN
        return self.function.__globals__.get(name, _UNKNOWN)


def _operand(call: ast.Call) -> ast.expr | None:
    """x of ``function(x, ...)`` or of ``x.method()``."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in _dense.METHODS and not call.args:
        return call.func.value
    return call.args[0] if call.args else None


def _with_operand(call: ast.Call, operand: ast.expr) -> ast.Call:
    """`call` with another x."""
    made = copy.copy(call)
    if made.args:
        made.args = [operand, *call.args[1:]]
    else:
        made.func = copy.copy(call.func)
        made.func.value = operand
    return made
