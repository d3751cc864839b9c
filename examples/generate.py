"""New handwritten digits from a plain autoencoder, a VAE and an InfoVAE, and how they compare with real ones.

A plain autoencoder has no prior: its codes are drawn from the box that those of real digits lie in, then from a mixture
of Gaussians and from a normalising flow that were fitted to them. The other two have one, and get the mixture as well.
For each, the table tells the MMD² to held-out digits, and how many samples are closer to the training digits than
held-out ones are. Its first and last rows are real digits that no model has seen, and copies of training digits.

    python examples/generate.py --out runs/generate

prints the table and draws the samples into OUT/generated.png. Takes half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from aefast.data import Batches, Dataset, load
from aefast.models import VAE, Autoencoder, InfoVAE, Model
from aefast.sampling import (
    FlowSampler,
    GaussianMixtureSampler,
    PriorSampler,
    Quality,
    codes_of,
    generate,
    quality,
)
from aefast.train import CapturedStep, make_optimizer
from aefast.train.plots import plot_samples

HELD_OUT = 0.35
COMPONENTS = 20
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/generate"), help="folder of the figure")
    parser.add_argument("--epochs", type=int, default=100, help="of each model, at least 1")
    parser.add_argument("--steps", type=int, default=1000, help="of the flow, at least 1")
    parser.add_argument("--count", type=int, default=1000, help="samples of each kind, at least 10")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and draws")
    arguments = parser.parse_args()
    seed = arguments.seed
    # Models and batches are so small that waking a second thread costs more than it brings.
    torch.set_num_threads(1)

    dataset = load("digits")
    rows, held_out = dataset.split(HELD_OUT)
    training = dataset.samples[rows]
    # One half is what everything is compared with, the other stands for a perfect generator.
    held_out = dataset.samples[held_out]
    held_out, fresh = held_out[::2], held_out[1::2]

    autoencoder = train(arguments, dataset, rows, Autoencoder, latent=16)
    vae = train(arguments, dataset, rows, VAE, latent=8, beta=0.05)
    infovae = train(arguments, dataset, rows, InfoVAE, latent=8, likelihood="bernoulli", stochastic=False)
    mixture, flow = GaussianMixtureSampler(COMPONENTS, seed), FlowSampler(steps=arguments.steps, seed=seed)

    shown = {"held out": fresh}
    report("real, held out", quality(fresh, held_out, training, seed=seed))
    for model, name, sampler in (
        (autoencoder, "box of codes", PriorSampler("box")),
        (autoencoder, "mixture", mixture),
        (autoencoder, "flow", flow),
        (vae, "prior", PriorSampler("normal")),
        (vae, "mixture", mixture),
        (infovae, "prior", PriorSampler("normal")),
        (infovae, "mixture", mixture),
    ):
        sampler.fit(codes_of(model, training))
        samples = generate(model, sampler, arguments.count, seed=seed)
        title = f"{model.name}, {name}"
        report(title, quality(samples, held_out, training, seed=seed))
        shown[title] = samples
    report("copies of training", quality(training[::2], held_out, training, seed=seed))

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "generated.png"
    rows = {name: samples[:SHOWN] for name, samples in shown.items()}
    plot_samples(rows, dataset.sample_shape, "Digits that are real, and that were drawn", path)
    print(f"figure: {path}")


def train(
    arguments: argparse.Namespace, dataset: Dataset, rows: Tensor, model_class: type[Model], **options: object
) -> Model:
    torch.manual_seed(arguments.seed)
    model = model_class(input_size=dataset.features, hidden=(256, 128), **options)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-3))
    batches = Batches(dataset.samples, rows, batch_size=128, seed=arguments.seed)
    for epoch in range(arguments.epochs):
        for batch in batches.epoch(epoch):
            step(batch)
    return model.eval()


def report(name: str, found: Quality) -> None:
    print(
        f"{name:28} MMD² {found.mmd.statistic:9.5f} · p {found.mmd.p_value:.3f} · "
        f"closer than held-out {found.novelty.closer:6.1%} · near copies {found.novelty.copies:6.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
