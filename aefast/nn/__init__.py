"""`torch.nn.Module` twins of the functions in `aefast.functional`.

Every module holds its parameters under the names its plain PyTorch twin uses, so state dicts move in both
directions, and `eager()` returns that twin.
"""

from aefast.nn.linear_act import LinearAct
from aefast.nn.mlp import MLP

__all__ = ["MLP", "LinearAct"]
