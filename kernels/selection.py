"""The largest elements of rows and of equals the first, where PyTorch's own topk takes any of equals."""

import torch

# The largest k that the GPU's kernels take, and the longest rows.
MOST = 1024
MOST_COLUMNS = 1 << 30


def largest(elements, k):
    """(*, F) -> the indices (*, k) of the k largest of each row, the largest first and of equals the one of the lower
    index; NaN counts as the largest of all, and -0 is 0."""
    # The tracer has no name for a view of another dtype.
    if elements.dtype == torch.float64 or torch.jit.is_tracing():
        return elements.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return elements.shape[-1] - 1 - (keys(elements).topk(k, dim=-1).values & 0xFFFFFFFF)


def is_largest(elements, count):
    """(F,) -> a mask of its `count` largest, of equals those of the lower indices."""
    if elements.dtype == torch.float64:
        return torch.zeros_like(elements, dtype=torch.bool).index_fill_(0, largest(elements, count), True)
    order = keys(elements)
    place = elements.shape[0] - count
    # On a GPU one thread block looks for a value by its place, and all of them sort.
    least = order.sort().values[place] if order.is_cuda else order.kthvalue(place + 1).values
    return order >= least


def keys(elements):
    """Integers without equals in the order of the numbers, in their lower half greater for the lower index."""
    wide = elements.float() + 0.0
    bits = wide.view(torch.int32).long()
    order = torch.where(wide.isnan(), 0x7FFFFFFF, torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    below = torch.arange(elements.shape[-1] - 1, -1, -1, device=elements.device)
    return (order << 32) | below
