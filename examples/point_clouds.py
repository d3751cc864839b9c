"""An autoencoder of point clouds, trained by the Chamfer distance: surfaces of solids and of real terrain.

A cloud is a set: its points have no order. The encoder runs one small net over every point and keeps the largest of
each feature (Qi, Su, Mo, Guibas, PointNet, 2017); the decoder gives all points at once, and the Chamfer distance
compares both sets through each point's nearest one (Fan, Su, Guibas, 2017; Achlioptas et al., Learning representations
and generative models for 3D point clouds, 2018). The surfaces are tori, ellipsoids, boxes, cylinders, and pieces of
the elevations that come with matplotlib; held-out pieces lie in a part of the map that training never sees.

    python examples/point_clouds.py --out runs/point_clouds

prints the Chamfer distance of held-out clouds to their reconstructions, to those by as many principal components of
sorted clouds, to the nearest training cloud and to other points of the same surface. It draws reconstructions, and
clouds between two held-out ones, into OUT/point_clouds.png. Takes a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy
import torch
from torch import Tensor, nn

import aefast.functional as AF
from aefast.nn import MLP, LinearAct
from aefast.train import CapturedStep, Schedule, make_optimizer

SOLIDS = ("torus", "ellipsoid", "box", "cylinder")
POINTS = 256  # of a cloud, a power of 2
DENSITY = 8  # points known of a surface, over those of a cloud
LATENT = 32
BATCH = 16
HELD_OUT = 24  # surfaces of each kind
WINDOW = 64  # side of a piece of terrain, in cells of the map
BORDER = 240  # column of the map where its held-out part begins
SHOWN = 7  # columns of the figure
WAYS = (("torus", "cylinder"), ("ellipsoid", "terrain"))  # whose codes are mixed in the figure
CALLS = 9  # of each function that is timed


class PointAutoencoder(nn.Module):
    """Clouds (B, POINTS, 3) to codes (B, LATENT) that do not know the order of points, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.features = MLP((3, 32, 64, 256), output_activation="relu")
        self.norm = nn.LayerNorm(256)
        self.code = LinearAct(256, LATENT, activation="identity")
        self.decoder = MLP((LATENT, 256, 512, POINTS * 3))

    def encode(self, clouds: Tensor) -> Tensor:
        return self.code(self.norm(self.features(clouds).max(1).values))

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(codes).reshape(-1, POINTS, 3)

    def loss(self, clouds: Tensor) -> Tensor:
        return AF.chamfer(self.decode(self.encode(clouds)), clouds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/point_clouds"), help="folder of the figure")
    parser.add_argument("--epochs", type=int, default=40, help="of training, at least 1")
    parser.add_argument("--surfaces", type=int, default=160, help="of each kind to train on, at least 7")
    parser.add_argument("--seed", type=int, default=0, help="of weights, surfaces and order")
    arguments = parser.parse_args()
    # Ops of about a millisecond: a second thread brings little, and costs much where its core is busy.
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(arguments.seed)
    elevation = elevations()
    training = surfaces(elevation[:, :BORDER], arguments.surfaces, generator)
    held_out = surfaces(elevation[:, BORDER:], HELD_OUT, generator)
    clouds, others = held_out[:, :POINTS], held_out[:, POINTS : 2 * POINTS]
    stored = training[:, :POINTS]

    model = train(arguments, training, generator)
    with torch.no_grad():
        codes = model.encode(clouds)
        reconstructions = model.decode(codes)
    rows = {
        "autoencoder": reconstructions,
        "principal components": principal_reconstructions(stored, clouds),
        "nearest training cloud": nearest_clouds(stored, clouds),
        "other points of the surface": others,
    }
    kinds = (*SOLIDS, "terrain")
    for name, made in rows.items():
        distances = AF.chamfer(made, clouds, reduction="none").reshape(len(kinds), -1).mean(1)
        told = " · ".join(f"{kind} {of:.4f}" for kind, of in zip(kinds, distances.tolist(), strict=True))
        print(f"{name:28} Chamfer {distances.mean():.5f} · {told}")
    compare_speed(reconstructions[::4], clouds[::4])

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "point_clouds.png"
    draw(pictures(model, clouds, rows), path)
    print(f"figure: {path}")


def compare_speed(x: Tensor, y: Tensor) -> None:
    """Prints the time of a forward and backward pass of the distance beside that by a matrix of distances."""

    def eager(x: Tensor, y: Tensor) -> Tensor:
        squared = torch.cdist(x, y).square()
        return (squared.amin(2).mean(1) + squared.amin(1).mean(1)).mean()

    def seconds(function: Callable[[Tensor, Tensor], Tensor]) -> float:
        leaf = x.clone().requires_grad_()
        begin = time.perf_counter()
        function(leaf, y).backward()
        return time.perf_counter() - begin

    # The first pair of calls warms up; in pairs, both meet the same load.
    fused, plain = zip(*((seconds(AF.chamfer), seconds(eager)) for _ in range(CALLS + 1)), strict=True)
    fused, plain = 1e3 * median(fused[1:]), 1e3 * median(plain[1:])
    print(
        f"Chamfer distance of {len(x)} pairs of clouds of {x.shape[1]} points, with its gradient, on one thread: "
        f"aefast {fused:.1f} ms · eager PyTorch {plain:.1f} ms · {plain / fused:.1f}×"
    )


def elevations() -> Tensor:
    """(344, 403): heights of land in metres, which matplotlib brings for its own examples."""
    from matplotlib import cbook

    with cbook.get_sample_data("jacksboro_fault_dem.npz") as data:
        return torch.from_numpy(data["elevation"].astype(numpy.float32))


def surfaces(elevation: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(5 * count, DENSITY * POINTS, 3): points of as many surfaces of each kind, about 0 and within 1 of it."""
    found = [turned(solids(kind, count, generator), generator) for kind in SOLIDS]
    points = torch.cat([*found, terrain(elevation, count, generator)])
    points = points - points.mean(1, keepdim=True)
    return points / points.norm(dim=2).amax(1)[:, None, None]


def solids(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """(count, DENSITY * POINTS, 3): points spread evenly over surfaces of random proportions."""
    number = DENSITY * POINTS

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def angles() -> Tensor:
        return uniform(0, 2 * torch.pi, number)

    def chosen(weights: Tensor) -> Tensor:
        return torch.multinomial(weights, number, replacement=True, generator=generator)

    if kind == "torus":
        # Of rings around the tube, outer ones are longer, and hold as many more points.
        tube, rings = uniform(0.15, 0.5, 1), torch.linspace(0, 2 * torch.pi, 256)
        around, along = rings[chosen(1 + tube * rings.cos())], angles()
        reach = 1 + tube * around.cos()
        return torch.stack([reach * along.cos(), reach * along.sin(), tube * around.sin()], 2)
    if kind == "ellipsoid":
        directions = torch.randn(count, number, 3, generator=generator)
        return nn.functional.normalize(directions, dim=2) * uniform(0.3, 1, 1, 3)
    if kind == "box":
        half = uniform(0.25, 1, 3)
        axis = chosen(1 / half)[..., None]  # a pair of faces has the volume over its distance as area
        points = uniform(-1, 1, number, 3)
        return half[:, None] * points.scatter(2, axis, points.gather(2, axis).sign())
    radius, half = uniform(0.25, 0.8, 1), uniform(0.3, 1, 1)
    is_side = uniform(0, 1, number) < 2 * half / (2 * half + radius)
    height = uniform(-1, 1, number)
    reach = radius * torch.where(is_side, 1, uniform(0, 1, number).sqrt())
    along = angles()
    return torch.stack(
        [reach * along.cos(), reach * along.sin(), half * torch.where(is_side, height, height.sign())], 2
    )


def turned(points: Tensor, generator: torch.Generator) -> Tensor:
    """Each of points (N, M, 3) turned about the vertical by an angle of its own."""
    angle = 2 * torch.pi * torch.rand(len(points), 1, generator=generator)
    x, y, z = points.unbind(2)
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos(), z], 2)


def terrain(elevation: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, DENSITY * POINTS, 3): points of random windows of the map, mirrored or not, heights from 0 to 1."""
    windows = elevation.unfold(0, WINDOW, 1).unfold(1, WINDOW, 1)
    top, left = (torch.randint(size, (count,), generator=generator) for size in windows.shape[:2])
    heights = windows[top, left]  # (count, WINDOW, WINDOW)
    low, high = heights.amin((1, 2)), heights.amax((1, 2))
    heights = (heights - low[:, None, None]) / (high - low)[:, None, None]
    places = 2 * torch.rand(count, DENSITY * POINTS, 2, generator=generator) - 1
    mirrored = places * (2 * torch.randint(2, (count, 1, 2), generator=generator) - 1)
    read = nn.functional.grid_sample(heights[:, None], mirrored[:, None], align_corners=True)
    return torch.cat([places, read[:, 0, 0, :, None]], 2)


def train(arguments: argparse.Namespace, training: Tensor, generator: torch.Generator) -> PointAutoencoder:
    torch.manual_seed(arguments.seed)
    model = PointAutoencoder()
    steps = arguments.epochs * (len(training) // BATCH)
    step = CapturedStep(
        model,
        make_optimizer(model.parameters(), 2e-3),
        loss=PointAutoencoder.loss,
        schedule=Schedule("cosine", warmup_steps=min(20, steps - 1), total_steps=steps),
    )
    for _ in range(arguments.epochs):
        # Other points of each surface in every epoch, so that there is none to learn by heart.
        clouds = training[:, torch.randperm(DENSITY * POINTS, generator=generator)[:POINTS]]
        order = torch.randperm(len(clouds), generator=generator)
        for first in range(0, len(clouds) - BATCH + 1, BATCH):
            step(clouds[order[first : first + BATCH]])
    return model


def sorted_clouds(clouds: Tensor) -> Tensor:
    """Clouds (N, POINTS, 3) in the order of a k-d tree's leaves: equal places hold points of like positions."""
    for level in range(POINTS.bit_length() - 1):
        halves = clouds.reshape(len(clouds), 2**level, -1, 3)
        order = halves[..., level % 3].argsort(2)
        clouds = halves.gather(2, order[..., None].expand_as(halves)).reshape(-1, POINTS, 3)
    return clouds


def principal_reconstructions(stored: Tensor, clouds: Tensor) -> Tensor:
    """clouds, from LATENT principal components of the sorted stored ones."""
    from sklearn.decomposition import PCA

    model = PCA(LATENT, random_state=0).fit(sorted_clouds(stored).flatten(1).numpy())
    found = model.inverse_transform(model.transform(sorted_clouds(clouds).flatten(1).numpy()))
    return torch.from_numpy(found).reshape(-1, POINTS, 3)


def nearest_clouds(stored: Tensor, clouds: Tensor) -> Tensor:
    """For each of clouds the stored one of the least Chamfer distance."""
    nearest = [AF.chamfer(cloud.expand_as(stored), stored, reduction="none").argmin() for cloud in clouds]
    return stored[torch.stack(nearest)]


def pictures(model: PointAutoencoder, clouds: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of clouds (SHOWN, POINTS, 3): held-out ones, what is made of them, and ways from one code to another."""
    # One of each solid, and terrain in the columns that are left.
    shown = [min(kind, len(SOLIDS)) * HELD_OUT + max(0, kind - len(SOLIDS)) for kind in range(SHOWN)]
    found = {"held out": clouds[shown]}
    found |= {name: rows[name][shown] for name in ("autoencoder", "principal components")}
    for first, last in WAYS:
        kinds = (*SOLIDS, "terrain")
        begin, end = (clouds[kinds.index(kind) * HELD_OUT][None] for kind in (first, last))
        with torch.no_grad():
            codes = torch.lerp(model.encode(begin), model.encode(end), torch.linspace(0, 1, SHOWN)[:, None])
            found[f"{first} to {last}"] = model.decode(codes)
    return found


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Rows of clouds, seen from above at an angle, the colour of points being their height."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, axes = pyplot.subplots(
        len(rows),
        SHOWN,
        figsize=(1.75 * SHOWN, 1.5 * len(rows)),
        subplot_kw={"projection": "3d"},
        gridspec_kw={"wspace": 0, "hspace": 0, "left": 0.04, "right": 1, "bottom": 0, "top": 1},
    )
    for (name, clouds), line in zip(rows.items(), axes, strict=True):
        for cloud, axis in zip(clouds, line, strict=True):
            x, y, z = cloud.T.numpy()
            axis.scatter(x, y, z, c=z, s=11, linewidths=0, cmap="viridis", vmin=-0.5, vmax=0.5)
            axis.set_proj_type("ortho")
            axis.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), zlim=(-0.8, 0.8))
            axis.set_box_aspect((1, 1, 1), zoom=1.2)
            axis.view_init(elev=33, azim=-60)
            axis.set_axis_off()
        box = line[0].get_position()
        figure.text(0.012, (box.y0 + box.y1) / 2, name, rotation=90, ha="center", va="center", fontsize=10)
    figure.set_dpi(90)
    figure.canvas.draw()
    # Points overlap in so many shades that a palette makes the file a quarter as large.
    Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(128).save(
        path, optimize=True
    )


if __name__ == "__main__":
    main()
