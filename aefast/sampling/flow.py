"""A normalising flow over the codes of a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aefast.errors import InputError
from aefast.models._networks import check_sizes
from aefast.nn import MLP
from aefast.nn.linear_act import check_positive_int
from aefast.sampling._base import Sampler, check_positive, check_seed, register, standard_scale

# A coupling multiplies a latent by a factor from exp(-2) to exp(2): several still reach any shape, and none overflows.
_LARGEST_LOG_SCALE = 2.0

# Deviation of the noise that codes get in training, as a part of their own. Without it the density of codes that
# repeat, or that lie in a plane, grows for ever.
_NOISE = 0.01

_HELD_OUT = 0.1
_MOST_HELD_OUT = 4096
_STEPS_BETWEEN_CHECKS = 50
_LARGEST_GRADIENT = 5.0


class Coupling(nn.Module):
    """An affine coupling: some latents stay, and say by how much the others are scaled and shifted.

    Args:
        kept: which of them stay, one bool a latent, neither all nor none.
        hidden: widths of the network's hidden layers.
    """

    def __init__(self, kept: Sequence[bool], hidden: Sequence[int]) -> None:
        super().__init__()
        is_kept = torch.tensor(kept)
        first, second = is_kept.nonzero().flatten(), (~is_kept).nonzero().flatten()
        for name, index in (
            ("first", first),
            ("second", second),
            ("back", torch.cat((first, second)).argsort()),
        ):
            self.register_buffer(name, index, persistent=False)
        self.network = MLP((len(first), *hidden, 2 * len(second)))
        # So that the coupling begins as the identity.
        last = self.network.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, latent) to z (B, latent), and log |det dz/dx| (B,)."""
        kept, log_scale, shift = self._affine(x)
        z = torch.cat((kept, x[:, self.second] * log_scale.exp() + shift), 1)[:, self.back]
        return z, log_scale.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """The x of which `forward` makes z."""
        kept, log_scale, shift = self._affine(z)
        return torch.cat((kept, (z[:, self.second] - shift) * (-log_scale).exp()), 1)[:, self.back]

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = x[:, self.first]
        log_scale, shift = self.network(kept).chunk(2, 1)
        return kept, _LARGEST_LOG_SCALE * torch.tanh(log_scale / _LARGEST_LOG_SCALE), shift


class Flow(nn.Module):
    """An invertible network from codes to N(0, I) (Dinh, Sohl-Dickstein, Bengio, Density Estimation Using Real NVP,
    ICLR 2017): codes scaled to mean 0 and deviation 1, then affine couplings.

    Couplings 2i and 2i + 1 split the latents by bit i of their numbers, and each keeps the half that the other changes,
    so that any two latents are on different sides of some split.

    Args:
        latent: size of the codes, at least 2.
        couplings: how many.
        hidden: widths of the hidden layers of their networks.

    Attributes:
        mean, scale: (latent,), those of the codes.
    """

    def __init__(self, latent: int, couplings: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("scale", torch.ones(latent))
        bits = (latent - 1).bit_length()
        self.couplings = nn.ModuleList(
            Coupling([(row >> (index // 2 % bits)) % 2 == index % 2 for row in range(latent)], hidden)
            for index in range(couplings)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes x (B, latent) to z (B, latent), and log |det dz/dx| (B,)."""
        z = (x - self.mean) / self.scale
        log_det = -self.scale.log().sum().expand(len(x))
        for coupling in self.couplings:
            z, more = coupling(z)
            log_det = log_det + more
        return z, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """The codes of which `forward` makes z (B, latent)."""
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)
        return z * self.scale + self.mean

    def log_prob(self, x: Tensor) -> Tensor:
        """The log of the density of codes x (B, latent), exact but for rounding: (B,), in nats."""
        z, log_det = self(x)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


@register("flow")
class FlowSampler(Sampler):
    """`Flow` of the codes, trained by maximum likelihood with Adam.

    A tenth of the codes is held out, and of all steps the weights that give these the highest likelihood are kept.
    Training takes place on the device of the codes, in a time that does not depend on their number; draws and
    densities on the CPU.

    Args:
        couplings: how many; two for each doubling of the latent size let every latent depend on every other.
        hidden: widths of the hidden layers of their networks.
        steps: of training.
        batch_size: codes of a step, drawn at random.
        lr: learning rate, which falls to 0 along a cosine.
        seed: of the initial weights, the batches and the noise, from 0 to 2**32 - 1.

    Raises:
        InputError: of `fit`: codes of one latent, or fewer than two of them.
    """

    option_names = ("couplings", "hidden", "steps", "batch_size", "lr", "seed")

    def __init__(
        self,
        couplings: int = 8,
        hidden: Sequence[int] = (64,),
        steps: int = 1000,
        batch_size: int = 256,
        lr: float = 2e-3,
        seed: int = 0,
    ) -> None:
        self.couplings = check_positive_int(couplings, "couplings")
        self.hidden = check_sizes(hidden, "hidden")
        self.steps = check_positive_int(steps, "steps")
        self.batch_size = check_positive_int(batch_size, "batch_size")
        self.lr = check_positive(lr, "lr")
        self.seed = check_seed(seed)

    def _fit(self, codes: Tensor) -> None:
        if len(codes) < 2:
            raise InputError("codes: expected at least 2, some of which a flow holds out, got 1")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(codes), generator=generator).to(codes.device)
        held_out = min(max(1, round(_HELD_OUT * len(codes))), _MOST_HELD_OUT)
        codes = codes.float()
        checked, codes = codes[order[:held_out]], codes[order[held_out:]]

        flow = self._make(codes.shape[1]).to(codes.device)
        mean, scale = standard_scale(codes)
        flow.mean.copy_(mean)
        flow.scale.copy_(scale)

        def noisy(batch: Tensor) -> Tensor:
            return batch + _NOISE * scale * torch.randn(batch.shape, generator=generator).to(batch.device)

        checked = noisy(checked)
        parameters = list(flow.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        best, kept = -math.inf, copy.deepcopy(flow.state_dict())
        for step in range(1, self.steps + 1):
            rows = torch.randint(len(codes), (self.batch_size,), generator=generator).to(codes.device)
            optimizer.zero_grad(set_to_none=True)
            (-flow.log_prob(noisy(codes[rows])).mean()).backward()
            nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            if step % _STEPS_BETWEEN_CHECKS == 0 or step == self.steps:
                with torch.no_grad():
                    found = flow.log_prob(checked).mean().item()
                if found > best:
                    best, kept = found, copy.deepcopy(flow.state_dict())
        flow.load_state_dict(kept)
        self.flow = flow.cpu().eval()

    def _make(self, latent: int) -> Flow:
        if latent < 2:
            raise InputError(
                "codes: expected at least 2 latents, since the couplings of a flow need some that stay and some that "
                "change, got 1; take a GaussianMixtureSampler"
            )
        # The global generator is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return Flow(latent, self.couplings, self.hidden)

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        return self.flow.inverse(torch.randn(count, len(self.flow.mean), generator=generator))

    def _log_prob(self, codes: Tensor) -> Tensor:
        return self.flow.log_prob(codes.float())

    def _state(self) -> dict[str, Tensor]:
        return dict(self.flow.state_dict())

    def _shapes(self, latent: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._make(latent).state_dict().items()}

    def _restore(self, state: dict[str, Tensor], latent: int) -> None:
        self.flow = self._make(latent).eval()
        self.flow.load_state_dict(state)
