"""How jumprelu's launchers are told which gradients are wanted: one bit each."""

NEED_X, NEED_THRESHOLD = 1, 2
