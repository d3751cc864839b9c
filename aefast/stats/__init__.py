"""Statistics of samples: whether two come from one distribution.

::

    result = mmd_test(model.encode(held_out), torch.randn(5000, 16))
    result.p_value  # small: the encoder's distribution is not the prior
"""

from aefast.stats.mmd_test import MMDTest, mmd_test

__all__ = ["MMDTest", "mmd_test"]
