"""Photographs without their noise: denoising autoencoders of patches beside classical filters.

A denoising autoencoder is shown noisy samples and is to give back the clean ones (Vincent, Larochelle, Bengio and
Manzagol, ICML 2008). One is trained for each of the four noises of `aefast.functional.corrupt`, on patches of
photographs. Parts of others are then cleaned: every patch is reconstructed, and where patches overlap their mean
counts. The baseline is a Gaussian filter; the better of a median and a total-variation filter stands beside it. Filters
get the width or weight with the least error on the very images that are cleaned.

    python examples/denoising.py --out runs/denoising

prints peak signal-to-noise ratios, and draws a part of a photograph into OUT/denoising.png. Takes a minute and a half.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.color import rgb2gray
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

import aefast.functional as AF
from aefast.models import DenoisingAutoencoder
from aefast.train import CapturedStep, Schedule, make_optimizer

NOISES = {
    "gaussian": {"std": 0.2},
    "salt_and_pepper": {"p": 0.2},
    "masking": {"p": 0.3},
    "dropout": {"p": 0.3},
}
TRAINING = ("astronaut", "brick", "cat", "coins", "grass", "gravel", "moon", "rocket")
HELD_OUT = {
    "camera": (40, 120),
    "coffee": (60, 200),
}  # and the row and column where the part begins that is cleaned
PART = 256  # pixels
SIZE = 10  # of a patch, in pixels
STRIDE = 2  # from one patch to the next, when a photograph is cleaned
BATCH = 256
SHOWN = (slice(20, 150), slice(40, 170))  # rows and columns of the first part

Filter = Callable[[np.ndarray], np.ndarray]
GAUSSIAN: dict[str, Filter] = {
    f"Gaussian, σ = {sigma}": partial(ndimage.gaussian_filter, sigma=sigma) for sigma in (0.8, 1.2, 1.6, 2.0)
}
NONLINEAR: dict[str, Filter] = {
    **{f"median, {size}×{size}": partial(ndimage.median_filter, size=size) for size in (3, 5)},
    **{f"variation, {weight}": partial(denoise_tv_chambolle, weight=weight) for weight in (0.1, 0.2, 0.3)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/denoising"), help="folder of the figure")
    parser.add_argument("--steps", type=int, default=3000, help="of training of each model, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="of patches, weights and noise")
    arguments = parser.parse_args()

    patches = torch.cat([patches_of(photograph(name), 3).T for name in TRAINING])
    held_out = [
        photograph(name)[row : row + PART, column : column + PART] for name, (row, column) in HELD_OUT.items()
    ]
    shown = []
    for noise, options in NOISES.items():
        noisy = [
            AF.corrupt(image, noise, seed=arguments.seed + index, **options)
            for index, image in enumerate(held_out)
        ]
        model = train(arguments, patches, noise, options)
        found = {"noisy": noisy}
        for filters in (GAUSSIAN, NONLINEAR):
            filtered = {
                name: [torch.from_numpy(one(image.numpy())) for image in noisy]
                for name, one in filters.items()
            }
            best = max(filtered, key=lambda name: psnr(filtered[name], held_out))
            found[best] = filtered[best]
        found["autoencoder"] = [clean(model, image) for image in noisy]
        ratios = [f"{name} {psnr(images, held_out):.1f} dB" for name, images in found.items()]
        print(f"{noise:<16}{' · '.join(ratios)}", flush=True)
        shown.append((noise, {"original": held_out, **found}))

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "denoising.png"
    draw(path, shown)
    print(f"figure: {path}")


def photograph(name: str) -> Tensor:
    """One that comes with scikit-image, grey, (H, W) in [0, 1]."""
    image = getattr(skimage.data, name)()
    grey = rgb2gray(image) if image.ndim == 3 else image / 255
    return torch.from_numpy(np.ascontiguousarray(grey, np.float32))


def patches_of(image: Tensor, stride: int) -> Tensor:
    """Its patches as columns, (SIZE², patches)."""
    return F.unfold(image[None, None], SIZE, stride=stride)[0]


def train(
    arguments: argparse.Namespace, patches: Tensor, noise: str, options: dict[str, float]
) -> DenoisingAutoencoder:
    torch.manual_seed(arguments.seed)
    model = DenoisingAutoencoder(
        input_size=SIZE * SIZE,
        hidden=(512,),
        latent=64,
        activation="gelu",
        noise=noise,
        **{f"noise_{name}": value for name, value in options.items()},
    )
    step = CapturedStep(
        model,
        make_optimizer(model.parameters(), 3e-3),
        schedule=Schedule("cosine", total_steps=arguments.steps),
    )
    for _ in range(arguments.steps):
        step(patches[torch.randint(len(patches), (BATCH,))])
    return model.eval()


def clean(model: DenoisingAutoencoder, noisy: Tensor) -> Tensor:
    """The mean of all reconstructions that a pixel is in."""
    # Patches reach over the borders, so that a pixel there is in as many as others.
    padded = F.pad(noisy[None, None], (SIZE, SIZE, SIZE, SIZE), mode="reflect")[0, 0]
    columns = patches_of(padded, STRIDE)
    with torch.no_grad():
        columns = model(columns.T).reconstruction.T
    total = F.fold(columns[None], padded.shape, SIZE, stride=STRIDE)
    count = F.fold(torch.ones_like(columns)[None], padded.shape, SIZE, stride=STRIDE)
    return (total / count)[0, 0, SIZE:-SIZE, SIZE:-SIZE].clamp(0, 1)


def psnr(images: list[Tensor], originals: list[Tensor]) -> float:
    """Of values in [0, 1], in dB, over all pixels of the photographs."""
    errors = torch.cat(
        [(image - original).flatten() for image, original in zip(images, originals, strict=True)]
    )
    return float(-10 * errors.square().mean().log10())


def draw(path: Path, shown: list[tuple[str, dict[str, list[Tensor]]]]) -> None:
    figure, axes = plt.subplots(len(shown), 5, figsize=(11, 2.35 * len(shown)), layout="constrained")
    for row, (noise, columns) in zip(axes, shown, strict=True):
        for place, (name, images) in zip(row, columns.items(), strict=True):
            place.imshow(images[0][SHOWN], cmap="gray", vmin=0, vmax=1)
            ratio = "" if name == "original" else f", {psnr([images[0]], [columns['original'][0]]):.1f} dB"
            place.set_title(f"{name}{ratio}", fontsize=9)
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(noise.replace("_", " "), fontsize=10)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
