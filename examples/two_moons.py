"""Two moons, the curve that a decoder draws through them, and the fibers that its encoder maps to one point.

An autoencoder with one latent learns a curve through points of the plane, the decoder's manifold, and which points go
to the same place on it, the encoder's fibers. The nearest point of a curve lies at a right angle, so that the best
encoder's fibers meet the manifold at 90°. The angle is measured where held-out points come to lie, and the distance to
their reconstructions is put beside that of principal component analysis with one component.

    python examples/two_moons.py --out runs/moons

prints both and draws manifold and fibers into OUT/two_moons.png. Takes half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons
from sklearn.decomposition import PCA
from torch import Tensor

from aefast.models import Autoencoder
from aefast.train import CapturedStep, Schedule, make_optimizer

NOISE = 0.06
BATCH = 128
FIBERS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/moons"), help="folder of the figure")
    parser.add_argument("--steps", type=int, default=12_000, help="of training, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="of points, weights and order")
    arguments = parser.parse_args()
    # Model and batches are so small that waking a second thread costs more than it brings.
    torch.set_num_threads(1)

    points = torch.tensor(make_moons(4000, noise=NOISE, random_state=arguments.seed)[0], dtype=torch.float32)
    training, held_out = points[:2000], points[2000:]
    model = train(arguments, training)

    pca = PCA(1).fit(training)
    of_pca = torch.tensor(pca.inverse_transform(pca.transform(held_out)), dtype=torch.float32)
    with torch.no_grad():
        of_model = model(held_out).reconstruction
    for name, reconstruction in (("autoencoder", of_model), ("PCA", of_pca)):
        distance = (reconstruction - held_out).square().sum(1).mean().sqrt()
        print(f"{name:<12} distance to held-out points, root mean square {distance:.3f}")
    angles = angles_of(model, held_out)
    low, median, high = np.percentile(angles, (10, 50, 90))
    print(f"angle of fiber and manifold   median {median:.1f}° · 10 % to 90 % {low:.1f}° to {high:.1f}°")

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "two_moons.png"
    draw(path, model, held_out, pca, angles)
    print(f"figure: {path}")


def train(arguments: argparse.Namespace, points: Tensor) -> Autoencoder:
    torch.manual_seed(arguments.seed)
    model = Autoencoder(input_size=2, hidden=(64, 64, 32), latent=1, activation="tanh")
    step = CapturedStep(
        model,
        make_optimizer(model.parameters(), 3e-3),
        schedule=Schedule("cosine", total_steps=arguments.steps),
    )
    for _ in range(arguments.steps):
        step(points[torch.randint(len(points), (BATCH,))])
    return model.eval()


def angles_of(model: Autoencoder, points: Tensor) -> np.ndarray:
    """Degrees between the fiber and the manifold where each point's reconstruction lies: 90 is a right angle."""
    codes = model.encode(points).detach().requires_grad_()
    places = model.decode(codes)
    # Samples do not depend on each other: the gradient of a sum has each one's derivative.
    coordinates = places.sum(0)
    derivatives = [torch.autograd.grad(one, codes, retain_graph=True)[0] for one in coordinates]
    tangents = torch.cat(derivatives, 1)
    places = places.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(model.encode(places).sum(), places)
    # A fiber is at a right angle to its code's gradient.
    sines = F.cosine_similarity(tangents, gradients).abs()
    return torch.rad2deg(torch.arcsin(sines.clamp(max=1))).numpy()


def draw(path: Path, model: Autoencoder, points: Tensor, pca: PCA, angles: np.ndarray) -> None:
    figure, (plane, histogram) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=(2.4, 1), layout="constrained"
    )
    codes = model.encode(points).detach()
    along = torch.linspace(codes.min(), codes.max(), 4000)[:, None]
    curve = model.decode(along).detach()
    # Fibers at equal distances along the curve.
    lengths = (curve[1:] - curve[:-1]).norm(dim=1).cumsum(0)
    wanted = torch.linspace(0, float(lengths[-1]), FIBERS + 2)[1:-1]
    levels = along[torch.searchsorted(lengths, wanted), 0]

    across, up = np.meshgrid(np.linspace(-1.5, 2.5, 500), np.linspace(-1.0, 1.5, 320))
    grid = torch.tensor(np.stack([across.ravel(), up.ravel()], 1), dtype=torch.float32)
    code = model.encode(grid).detach().numpy().reshape(across.shape)
    plane.contour(across, up, code, levels=np.unique(levels), cmap="viridis", linewidths=0.8, alpha=0.8)
    plane.scatter(*points.T, s=4, color="0.55", alpha=0.5, linewidths=0)
    plane.plot(*curve.T, color="crimson", linewidth=2.2, label="manifold: decoder of all codes")
    ends = pca.inverse_transform(np.array([[-1.6], [1.6]]))
    plane.plot(*ends.T, color="black", linestyle="--", linewidth=1.2, label="first principal component")
    plane.plot([], [], color="teal", linewidth=0.8, label="fibers, coloured by their code")
    plane.set(xlim=(-1.5, 2.5), ylim=(-1.0, 1.5), aspect="equal", title="Two moons in one latent dimension")
    plane.legend(loc="upper right", fontsize=8, framealpha=0.95)
    histogram.hist(angles, bins=np.linspace(0, 90, 31), color="teal")
    histogram.set(
        xlim=(0, 90),
        xticks=range(0, 91, 15),
        xlabel="degrees",
        ylabel="held-out points",
        title="Angle of fiber and manifold",
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
