"""The ops: one file each, and the registry of backends that serve them."""

from aefast.ops import (
    chamfer,
    corrupt,
    gaussian_head,
    jumprelu,
    kl_discrete,
    kl_normal,
    linear_act,
    linear_reconstruction_loss,
    mlp,
    mmd,
    mmd_to_normal,
    nearest,
    penalized_linear_act,
    pyramid_loss,
    reconstruction_loss,
    reparameterize,
)
from aefast.ops._registry import BACKENDS, OPS, backend

__all__ = [
    "BACKENDS",
    "OPS",
    "backend",
    "chamfer",
    "corrupt",
    "gaussian_head",
    "jumprelu",
    "kl_discrete",
    "kl_normal",
    "linear_act",
    "linear_reconstruction_loss",
    "mlp",
    "mmd",
    "mmd_to_normal",
    "nearest",
    "penalized_linear_act",
    "pyramid_loss",
    "reconstruction_loss",
    "reparameterize",
]
