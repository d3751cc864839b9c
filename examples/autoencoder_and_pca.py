"""Autoencoders beside principal component analysis, on handwritten digits.

A linear autoencoder's best decoder spans the space of the first principal components (Bourlard and Kamp, Biological
Cybernetics 59, 1988; Baldi and Hornik, Neural Networks 2, 1989): the principal angles between the two are printed, and
both errors. With activations an autoencoder is no longer bound to a plane: at the same number of latents its error on
held-out digits is below that of PCA.

    python examples/autoencoder_and_pca.py --out runs/pca

prints both comparisons and draws errors and reconstructions into OUT/autoencoder_and_pca.png. Takes a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from torch import Tensor

from aefast.data import load
from aefast.models import Autoencoder
from aefast.train import CapturedStep, Schedule, make_optimizer

LATENTS = (2, 4, 8, 16)
# Behind the fourth component the variance falls by a third: the space of the first four is well defined.
LINEAR_LATENT = SHOWN_LATENT = 4
SHOWN = 10
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pca"), help="folder of the figure")
    parser.add_argument(
        "--steps",
        type=int,
        default=2000,
        help="of each model, at least 1; the linear one takes three times as many",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    arguments = parser.parse_args()
    # Models and batches are so small that waking a second thread costs more than it brings.
    torch.set_num_threads(1)

    dataset = load("digits")
    rows, held_out = dataset.split(0.2)
    training, held_out = dataset.samples[rows], dataset.samples[held_out]

    linear = train(
        training,
        arguments.seed,
        3 * arguments.steps,
        2e-2,
        latent=LINEAR_LATENT,
        hidden=(),
        activation="identity",
    )
    pca = PCA(LINEAR_LATENT).fit(training)
    decoder = linear.decode(torch.eye(LINEAR_LATENT)) - linear.decode(torch.zeros(1, LINEAR_LATENT))
    angles = np.rad2deg(subspace_angles(decoder.detach().numpy().T, pca.components_.T))
    print(f"linear autoencoder, {LINEAR_LATENT} latents, and PCA")
    print(f"  largest principal angle {angles.max():.2f}°")
    print(
        f"  error {error(of_model(linear, held_out), held_out):.5f} · PCA {error(of_pca(pca, held_out), held_out):.5f}"
    )

    errors: dict[str, list[float]] = {"autoencoder": [], "PCA": []}
    shown = {"original": held_out}
    for latent in LATENTS:
        model = train(
            training,
            arguments.seed,
            arguments.steps,
            2e-3,
            latent=latent,
            hidden=(256, 128),
            activation="gelu",
        )
        found = {
            "autoencoder": of_model(model, held_out),
            "PCA": of_pca(PCA(latent).fit(training), held_out),
        }
        for name, reconstruction in found.items():
            errors[name].append(error(reconstruction, held_out))
        print(
            f"{latent:2} latents   error {errors['autoencoder'][-1]:.5f} · PCA {errors['PCA'][-1]:.5f}",
            flush=True,
        )
        if latent == SHOWN_LATENT:
            shown |= found

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "autoencoder_and_pca.png"
    draw(path, errors, shown, dataset.sample_shape)
    print(f"figure: {path}")


def train(training: Tensor, seed: int, steps: int, lr: float, **options: object) -> Autoencoder:
    torch.manual_seed(seed)
    model = Autoencoder(input_size=training.shape[1], **options)
    step = CapturedStep(
        model,
        make_optimizer(model.parameters(), lr),
        schedule=Schedule("cosine", total_steps=steps),
    )
    for _ in range(steps):
        step(training[torch.randint(len(training), (BATCH,))])
    return model.eval()


def of_model(model: Autoencoder, samples: Tensor) -> Tensor:
    with torch.no_grad():
        return model(samples).reconstruction


def of_pca(pca: PCA, samples: Tensor) -> Tensor:
    return torch.tensor(pca.inverse_transform(pca.transform(samples)))


def error(reconstruction: Tensor, samples: Tensor) -> float:
    return float((reconstruction - samples).square().mean())


def draw(
    path: Path, errors: dict[str, list[float]], shown: dict[str, Tensor], shape: tuple[int, ...]
) -> None:
    figure, (curves, digits) = plt.subplots(
        1, 2, figsize=(11, 3.8), width_ratios=(1, 1.9), layout="constrained"
    )
    for name, marker in (("PCA", "s"), ("autoencoder", "o")):
        curves.plot(LATENTS, errors[name], marker=marker, label=name)
    curves.set_xscale("log", base=2)
    curves.set(
        xticks=LATENTS,
        xticklabels=LATENTS,
        ylim=(0, None),
        xlabel="latents",
        ylabel="mean squared error, held-out digits",
        title="Error at equal dimension",
    )
    curves.legend()
    # A digit of each column, a white line between them.
    rows = []
    for samples in shown.values():
        images = samples[:SHOWN].clamp(0, 1).reshape(-1, *shape[-2:])
        rows.append(np.concatenate([np.pad(image, 1, constant_values=1) for image in 1 - images.numpy()], 1))
    digits.imshow(np.concatenate(rows, 0), cmap="gray", vmin=0, vmax=1)
    height = rows[0].shape[0]
    digits.set(
        xticks=[],
        yticks=[height * (row + 0.5) for row in range(len(rows))],
        yticklabels=list(shown),
        title=f"Held-out digits from {SHOWN_LATENT} latents",
    )
    digits.tick_params(length=0)
    for side in digits.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
