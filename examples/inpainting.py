"""Square holes in photographs, filled by an autoencoder of patches.

A denoising autoencoder whose noise sets squares of an image to 0 learns to fill them from what is around (Pathak,
Krähenbühl, Donahue, Darrell and Efros, Context Encoders, CVPR 2016). It is trained on patches of three by three
squares, without their means, and fills the holes of photographs that it has not seen, each by the patch around it. The
baseline is the mean of a hole's border; scikit-image's biharmonic inpainting, which solves a differential equation in
each hole, stands beside it.

    python examples/inpainting.py --out runs/inpainting

prints peak signal-to-noise ratios in the holes, and draws parts of the photographs into OUT/inpainting.png. Takes a
minute.
"""

from __future__ import annotations

import argparse
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
from skimage.restoration import inpaint_biharmonic
from torch import Tensor

import aefast.functional as AF
from aefast.models import DenoisingAutoencoder
from aefast.train import CapturedStep, Schedule, make_optimizer

TRAINING = ("astronaut", "brick", "cat", "coins", "grass", "gravel", "moon", "rocket")
HELD_OUT = {
    "camera": (60, 150),
    "coffee": (120, 240),
}  # and the row and column where what is shown of it begins
HOLE = 4  # side of a square, in pixels
SIZE = 3 * HOLE  # of a patch
PART = 0.12  # of the squares are holes
BATCH = 256
SHOWN = 120  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/inpainting"), help="folder of the figure")
    parser.add_argument("--steps", type=int, default=4000, help="of training, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="of patches, weights and holes")
    arguments = parser.parse_args()

    patches = torch.cat([F.unfold(photograph(name)[None, None], SIZE, stride=5)[0].T for name in TRAINING])
    # What a hole is set to, 0, is then the mean.
    patches -= patches.mean(1, keepdim=True)
    model = train(arguments, patches)
    shown = []
    errors: dict[str, list[Tensor]] = {}
    for index, (name, (row, column)) in enumerate(HELD_OUT.items()):
        original = photograph(name)
        options = {"p": PART, "block": HOLE, "seed": arguments.seed + index}
        is_hole = AF.corrupt(torch.ones_like(original)[None], "masking", **options)[0] == 0
        holed = original.masked_fill(is_hole, 0)
        filled = {
            "border's mean": of_border(holed, is_hole),
            "biharmonic": torch.from_numpy(inpaint_biharmonic(holed.numpy(), is_hole.numpy())).float(),
            "autoencoder": of_model(model, holed, is_hole),
        }
        for method, image in filled.items():
            errors.setdefault(method, []).append((image - original)[is_hole])
        window = (slice(row, row + SHOWN), slice(column, column + SHOWN))
        shown.append(
            {
                "with holes": holed[window],
                **{m: i[window] for m, i in filled.items()},
                "original": original[window],
            }
        )
    for method, found in errors.items():
        ratio = -10 * torch.cat(found).square().mean().log10()
        print(f"{method:<14} {ratio:.1f} dB in the holes of {len(found)} photographs")

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "inpainting.png"
    draw(path, shown)
    print(f"figure: {path}")


def photograph(name: str) -> Tensor:
    """One that comes with scikit-image, grey, in [0, 1], (H, W) that are whole squares."""
    image = getattr(skimage.data, name)()
    grey = rgb2gray(image) if image.ndim == 3 else image / 255
    height, width = (side // HOLE * HOLE for side in grey.shape)
    return torch.from_numpy(np.ascontiguousarray(grey[:height, :width], np.float32))


def train(arguments: argparse.Namespace, patches: Tensor) -> DenoisingAutoencoder:
    torch.manual_seed(arguments.seed)
    model = DenoisingAutoencoder(
        input_size=SIZE * SIZE,
        hidden=(768,),
        latent=384,
        activation="gelu",
        noise="masking",
        noise_p=2 * PART,  # holes are what there is to learn from
        noise_block=HOLE,
        image_shape=(1, SIZE, SIZE),
    )
    step = CapturedStep(
        model,
        make_optimizer(model.parameters(), 2e-3),
        schedule=Schedule("cosine", total_steps=arguments.steps),
    )
    for _ in range(arguments.steps):
        step(patches[torch.randint(len(patches), (BATCH,))])
    return model.eval()


def of_model(model: DenoisingAutoencoder, holed: Tensor, is_hole: Tensor) -> Tensor:
    """Each hole filled by the patch that it is in the middle of."""

    def patches(image: Tensor) -> Tensor:
        padded = F.pad(image[None, None], (HOLE,) * 4, mode="reflect")
        return F.unfold(padded, SIZE, stride=HOLE)[0].T

    values, known = patches(holed), 1 - patches(is_hole.float())
    means = values.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    with torch.no_grad():
        made = model((values - means) * known).reconstruction + means
    middles = made.reshape(-1, SIZE, SIZE)[:, HOLE:-HOLE, HOLE:-HOLE].flatten(1)
    image = F.fold(middles.T[None], holed.shape, HOLE, stride=HOLE)[0, 0]
    return torch.where(is_hole, image.clamp(0, 1), holed)


def of_border(holed: Tensor, is_hole: Tensor) -> Tensor:
    """Holes filled with the mean of the pixels that touch them; holes that touch count as one."""
    holes, _ = ndimage.label(is_hole)
    filled = holed.clone()
    for label, (rows, columns) in enumerate(ndimage.find_objects(holes), 1):
        window = (
            slice(max(rows.start - 1, 0), rows.stop + 1),
            slice(max(columns.start - 1, 0), columns.stop + 1),
        )
        inside = holes[window] == label
        border = ndimage.binary_dilation(inside, np.ones((3, 3))) & ~is_hole[window].numpy()
        filled[window][torch.from_numpy(inside)] = holed[window][torch.from_numpy(border)].mean()
    return filled


def draw(path: Path, shown: list[dict[str, Tensor]]) -> None:
    figure, axes = plt.subplots(
        len(shown), len(shown[0]), figsize=(11, 2.35 * len(shown)), layout="constrained"
    )
    for row, images in zip(axes, shown, strict=True):
        for place, image in zip(row, images.values(), strict=True):
            place.imshow(image, cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
    for place, name in zip(axes[0], shown[0], strict=True):
        place.set_title(name)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
