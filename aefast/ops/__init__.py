"""The ops: one file each, and the registry of backends that serve them."""

from aefast.ops import corrupt, gaussian_head, kl_discrete, kl_normal, linear_act, mlp, mmd, reparameterize
from aefast.ops._registry import BACKENDS, OPS, backend

__all__ = [
    "BACKENDS",
    "OPS",
    "backend",
    "corrupt",
    "gaussian_head",
    "kl_discrete",
    "kl_normal",
    "linear_act",
    "mlp",
    "mmd",
    "reparameterize",
]
