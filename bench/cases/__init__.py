"""The cases of each op: shapes, and the code a PyTorch expert would write instead."""

from aefast.bench.cases import linear_act, mlp

CASES = {"linear_act": linear_act.cases, "mlp": mlp.cases}
