"""Generation from a trained model: a density over its codes, decoded draws from it, and how good they are.

A plain autoencoder has no prior to draw codes from, and a variational one's codes seldom follow theirs. A second model,
fitted to the codes once the first is trained, closes the gap (Ghosh et al., From Variational to Deterministic
Autoencoders, ICLR 2020)::

    sampler = GaussianMixtureSampler(components=10).fit(codes_of(model, training))
    samples = generate(model, sampler, 1000, seed=0)  # (1000, input_size)
    print(quality(samples, held_out, training))
    sampler.save("runs/mine/sampler")  # load_sampler("runs/mine/sampler")
"""

from aefast.sampling._base import SAMPLERS, Sampler, load_sampler
from aefast.sampling.flow import Flow, FlowSampler
from aefast.sampling.gaussian_mixture import GaussianMixtureSampler
from aefast.sampling.generate import (
    codes_of,
    encode_batches,
    encode_sparse_batches,
    generate,
    reconstruct_batches,
)
from aefast.sampling.prior import PriorSampler
from aefast.sampling.quality import Quality, quality

__all__ = [
    "SAMPLERS",
    "Flow",
    "FlowSampler",
    "GaussianMixtureSampler",
    "PriorSampler",
    "Quality",
    "Sampler",
    "codes_of",
    "encode_batches",
    "encode_sparse_batches",
    "generate",
    "load_sampler",
    "quality",
    "reconstruct_batches",
]
