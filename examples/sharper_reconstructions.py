"""Sharper reconstructions of photographs at equal pixel error: a pyramid loss beside the mean squared error.

Two autoencoders of one architecture and one start are trained on patches of photographs: one with the squared errors of
the pixels, the other with those of a laplacian pyramid whose fine bands have the larger weights, until its held-out
pixels are as exact as the first one's. Then the sizes of the image gradients of their reconstructions are compared with
those of the originals: blur makes them smaller.

    python examples/sharper_reconstructions.py --out runs/sharper

prints the comparison and draws it into OUT/sharper.png. Takes a minute on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from aefast.data.bundled import patches
from aefast.models import Autoencoder
from aefast.train.step import CapturedStep, make_optimizer

SIZE = 16
BATCH = 256
SHOWN = 12
WEIGHTS = (16.0, 4.0, 1.0)  # of the bands, the finest first, and of the low-pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sharper"), help="folder of the figure")
    parser.add_argument("--epochs", type=int, default=4, help="of the mean squared error, at least 1")
    parser.add_argument("--patches", type=int, default=60_000, help="how many, held-out ones included")
    parser.add_argument("--latent", type=int, default=64, help="size of the latent")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    arguments = parser.parse_args()

    dataset = patches(SIZE, arguments.patches)
    held_out = dataset.samples[-dataset.held_out :]
    training = dataset.samples[: -dataset.held_out]

    squares = make(arguments, loss="mse")
    step = CapturedStep(squares, make_optimizer(squares.parameters(), 1e-3))
    for batch in batches(training, arguments.epochs, arguments.seed):
        step(batch)
    error = pixel_error(squares, held_out)

    pyramid = make(
        arguments,
        loss="pyramid",
        loss_p=2.0,
        pyramid="laplacian",
        pyramid_levels=len(WEIGHTS),
        pyramid_weights=WEIGHTS,
        image_shape=(1, SIZE, SIZE),
    )
    step = CapturedStep(pyramid, make_optimizer(pyramid.parameters(), 1e-3))
    for index, batch in enumerate(batches(training, 4 * arguments.epochs, arguments.seed)):
        step(batch)
        if index % 50 == 49 and pixel_error(pyramid, held_out) <= error:
            break

    shown = {"original": held_out, "mean squared error": reconstructed(squares, held_out)}
    shown["pyramid loss"] = reconstructed(pyramid, held_out)
    sharpness = {name: gradient_size(images) for name, images in shown.items()}
    for name, images in shown.items():
        share = sharpness[name] / sharpness["original"]
        mse = (images - held_out).square().mean()
        print(f"{name:20} pixel error {mse:.5f} · image gradients {share:6.1%} of the originals'")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "sharper.png"
    draw(shown, sharpness, path)
    print(f"figure: {path}")


def make(arguments: argparse.Namespace, **options: object) -> Autoencoder:
    torch.manual_seed(arguments.seed)
    return Autoencoder(input_size=SIZE * SIZE, hidden=(512,), latent=arguments.latent, **options)


def batches(samples: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=generator)
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield samples[order[first : first + BATCH]]


@torch.no_grad()
def reconstructed(model: Autoencoder, samples: Tensor) -> Tensor:
    return model.decode(model.encode(samples))


def pixel_error(model: Autoencoder, samples: Tensor) -> float:
    return (reconstructed(model, samples) - samples).square().mean().item()


def gradient_size(images: Tensor) -> float:
    """The mean of |∇| over flat images (N, SIZE²), by differences of neighbours."""
    images = images.reshape(-1, SIZE, SIZE)
    right = images[:, :-1, 1:] - images[:, :-1, :-1]
    down = images[:, 1:, :-1] - images[:, :-1, :-1]
    return torch.hypot(right, down).mean().item()


def draw(shown: dict[str, Tensor], sharpness: dict[str, float], path: Path) -> None:
    """A row of images for each name, those whose originals have the most contrast among some at random."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    originals = shown["original"]
    chosen = originals[::50].std(1).topk(min(SHOWN, len(originals[::50]))).indices * 50
    figure = pyplot.figure(figsize=(len(chosen), 1.3 * len(shown)), layout="constrained")
    for part, (name, images) in zip(figure.subfigures(len(shown)), shown.items(), strict=True):
        share = sharpness[name] / sharpness["original"]
        part.suptitle(f"{name}: image gradients {share:.0%} of the originals'", x=0.01, ha="left", fontsize=9)
        for axis, index in zip(part.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
            axis.imshow(images[index].reshape(SIZE, SIZE), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
