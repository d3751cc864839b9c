"""The public functions: ``import aefast.functional as AF``."""

from aefast.ops.batch_topk_encode import batch_topk_encode
from aefast.ops.chamfer import chamfer
from aefast.ops.corrupt import corrupt
from aefast.ops.gaussian_head import gaussian_head
from aefast.ops.jumprelu import jumprelu
from aefast.ops.kl_discrete import kl_discrete
from aefast.ops.kl_normal import kl_normal
from aefast.ops.linear_act import linear_act
from aefast.ops.linear_reconstruction_loss import linear_reconstruction_loss
from aefast.ops.mlp import mlp
from aefast.ops.mmd import mmd
from aefast.ops.mmd_to_normal import mmd_to_normal
from aefast.ops.nearest import nearest
from aefast.ops.penalized_linear_act import penalized_linear_act
from aefast.ops.pyramid_loss import pyramid_loss
from aefast.ops.reconstruction_loss import reconstruction_loss
from aefast.ops.reparameterize import reparameterize
from aefast.ops.sparse_decode import sparse_decode
from aefast.ops.topk_encode import topk_encode

__all__ = [
    "batch_topk_encode",
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
    "sparse_decode",
    "topk_encode",
]
