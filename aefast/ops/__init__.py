"""The ops: one file each, and the registry of backends that serve them."""

from aefast.ops import linear_act, mlp
from aefast.ops._registry import BACKENDS, OPS, backend

__all__ = ["BACKENDS", "OPS", "backend", "linear_act", "mlp"]
