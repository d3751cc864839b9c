"""Statistics of samples: whether two come from one distribution, and whether generated ones are new.

::

    result = mmd_test(model.encode(held_out), torch.randn(5000, 16))
    result.p_value  # small: the encoder's distribution is not the prior
"""

from aefast.stats.mmd_test import MMDTest, mmd_test
from aefast.stats.novelty import Novelty, novelty

__all__ = ["MMDTest", "Novelty", "mmd_test", "novelty"]
