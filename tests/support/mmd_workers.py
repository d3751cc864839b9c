"""What the ranks of a process group do in the tests of `mmd` with a group: a module that new processes import too."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops._pairwise import KERNELS

# Rows of x and of y on each rank; of some there are none.
SHARDS = {2: ((130, 60), (71, 200)), 3: ((40, 0), (0, 131), (90, 20))}
SETTINGS = [
    *({"kernel": kernel, "bandwidth": (1.0, 2.0, 3.5)} for kernel in KERNELS),
    {"kernel": "rbf", "estimator": "biased"},
    {"kernel": "imq"},
]
BACKENDS = ("auto", "eager")


def samples(ranks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    counts = [sum(column) for column in zip(*SHARDS[ranks], strict=True)]
    x, y = (torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype) for count in counts)
    return x, y + 0.5


def shards(rank, ranks):
    """This rank's rows of both samples."""
    parts = [
        one.split([counts[side] for counts in SHARDS[ranks]])[rank] for side, one in enumerate(samples(ranks))
    ]
    return [part.clone().requires_grad_() for part in parts]


def values_and_gradients(rank, ranks):
    found = []
    for backend in BACKENDS:
        for settings in SETTINGS:
            x, y = shards(rank, ranks)
            with aefast.backend(backend):
                value = AF.mmd(x, y, group=dist.group.WORLD, **settings)
            found.append([one.tolist() for one in (value, *torch.autograd.grad(value, (x, y)))])
    return found


def encoder():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def training_step(rank, ranks):
    """The gradients of an encoder's parameters under DistributedDataParallel."""
    model = DistributedDataParallel(encoder())
    x, y = shards(rank, ranks)
    AF.mmd(model(x), y.detach()[:, :4], group=dist.group.WORLD).backward()
    return [parameter.grad.tolist() for parameter in model.parameters()]


def messages(rank, ranks):
    """Of the errors that calls with bad input end in."""
    found = []
    x, y = shards(rank, ranks)
    for arguments in (
        (x[:, : 6 - rank], y[:, : 6 - rank]),
        (x.double() if rank else x, y.double() if rank else y),
        (x, y[:0]),
        (x * (float("nan") if rank else 1.0), y),
    ):
        try:
            AF.mmd(*arguments, group=dist.group.WORLD)
            found.append("no error")
        except InputError as error:
            found.append(str(error))
    value = AF.mmd(x, y, group=dist.group.WORLD)
    try:
        torch.autograd.grad(value, x, create_graph=True)
        found.append("no error")
    except RuntimeError as error:
        found.append(str(error))
    return found
