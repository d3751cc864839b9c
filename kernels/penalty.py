"""The sparsity penalties of a dense layer, and what their kernels have in common."""

PENALTIES = ("l1", "kl")

# Mean activations count as at least this much away from 0 and from 1, where the divergence of "kl" is infinite.
# ``cpu/penalized_linear_act.cpp`` has the same.
EPS = 1e-6
