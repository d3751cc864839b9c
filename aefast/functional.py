"""The public functions: ``import aefast.functional as AF``."""

from aefast.ops.linear_act import linear_act
from aefast.ops.mlp import mlp

__all__ = ["linear_act", "mlp"]
