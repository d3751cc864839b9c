"""`torch.nn.Module` twins of the functions in `aefast.functional`.

Every module holds its parameters under the names its plain PyTorch twin uses, so state dicts move in both
directions, and `eager()` returns that twin.
"""

from aefast.nn.corrupt import Corrupt
from aefast.nn.gaussian_head import GaussianHead
from aefast.nn.jumprelu import JumpReLU
from aefast.nn.linear_act import LinearAct
from aefast.nn.mlp import MLP
from aefast.nn.mmd_loss import MMDLoss
from aefast.nn.penalized_linear_act import PenalizedLinearAct
from aefast.nn.pyramid_loss import PyramidLoss
from aefast.nn.reconstruction_loss import ReconstructionLoss
from aefast.nn.reparameterize import Reparameterize
from aefast.nn.sparse_decode import SparseDecoder
from aefast.nn.topk_encode import TopKEncoder

__all__ = [
    "MLP",
    "Corrupt",
    "GaussianHead",
    "JumpReLU",
    "LinearAct",
    "MMDLoss",
    "PenalizedLinearAct",
    "PyramidLoss",
    "ReconstructionLoss",
    "Reparameterize",
    "SparseDecoder",
    "TopKEncoder",
]
