"""The k largest elements of each row of a matrix and which they are, the largest first and of equals the one of the
lower column.

A program has a row, and each place of its tile the elements that come to lie there. A bound that k of the places'
maxima reach, k elements reach; the few more than k that do are gathered in memory and sorted. Where more do than there
is room for, since many are equal or one place has most of the largest, the bound is raised by bisection, until those
above it fit, or are k at most with some of its equals, of which the first are taken.
"""

import torch
import triton
import triton.language as tl

from ..selection import MOST, largest
from .linear_act import COMPILE, power_of_two

__all__ = ["select"]

TILE = tl.constexpr(2 * MOST)  # twice as many places as the largest k
WARPS = 8
# Orders, as integers: those of NaN, and what none reaches.
OF_NAN = tl.constexpr(0x7FFFFFFE)
NONE = tl.constexpr(0x7FFFFFFF)


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def order_of(numbers):
    """Greater for the greater number; -0 is 0, and NaN is greater than all."""
    bits = (numbers + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(numbers != numbers, OF_NAN, order)


@triton.jit
def number_of(order):
    """The number of an order, NaN for an order that no number has."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def between(low, high):
    """Halfway, of orders whose difference 32 bits may not hold."""
    return (low.to(tl.int64) + (high.to(tl.int64) - low.to(tl.int64)) // 2).to(tl.int32)


@triton.jit
def gather(row, keys, columns, low, high, found, room):
    """Writes the keys of those whose order is from `low` to below `high`, in the order of their columns, from
    keys[found] on and in front of keys[room] -> `found` and how many they are."""
    least = number_of(low)
    found = tl.cast(found, tl.int32)
    for first in range(0, columns, TILE):
        cols = first + tl.arange(0, TILE)
        inside = cols < columns
        numbers = tl.load(row + cols, mask=inside, other=0.0).to(tl.float32)
        # No comparison with NaN is true.
        if tl.max(tl.where(numbers < least, 0, inside.to(tl.int32)), 0) > 0:
            order = order_of(numbers)
            is_one = inside & (order >= low) & (order < high)
            places = found + tl.cumsum(is_one.to(tl.int32), 0) - 1
            key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)
            tl.store(keys + places, key, mask=is_one & (places < room))
            found += tl.sum(is_one.to(tl.int32), 0)
    return found


@triton.jit
def count_above(row, columns, low):
    """How many have the order `low` or a greater one."""
    places = tl.zeros((TILE,), tl.int32)
    for first in range(0, columns, TILE):
        cols = first + tl.arange(0, TILE)
        inside = cols < columns
        order = order_of(tl.load(row + cols, mask=inside, other=0.0).to(tl.float32))
        places += (inside & (order >= low)).to(tl.int32)
    return tl.sum(places, 0)


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def largest_kernel(
    elements,  # (N, columns) fp32, fp16 or bf16, contiguous
    keys,  # (N, ROOM) int64
    values,  # (N, k) contiguous
    indices,  # (N, k) int64 contiguous
    columns,
    k,
    ROOM: tl.constexpr,  # for so many elements of a row, at least k
):
    # 64-bit: any offset may exceed 2^31 elements.
    index = tl.program_id(0).to(tl.int64)
    row = elements + index * columns
    keys += index * ROOM

    # Of places without a number the maximum is -inf: what lies there is NaN, and in no other's way.
    most = tl.full((TILE,), float("-inf"), tl.float32)
    for first in range(0, columns, TILE):
        cols = first + tl.arange(0, TILE)
        numbers = tl.load(row + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, numbers)
    orders = order_of(most)
    # k maxima or more reach `low`, and fewer `high`. A few more than k make few more elements to sort.
    low = tl.full((), -0x80000000, tl.int32)
    high = tl.full((), NONE, tl.int32)
    reached = tl.full((), TILE, tl.int32)
    while (reached > k + k // 8) & (high != low + 1):
        middle = between(low, high)
        count = tl.sum((orders >= middle).to(tl.int32), 0)
        is_enough = count >= k
        low = tl.where(is_enough, middle, low)
        reached = tl.where(is_enough, count, reached)
        high = tl.where(is_enough, high, middle)

    found = gather(row, keys, columns, low, NONE, 0, ROOM)
    if found > ROOM:
        high = tl.full((), NONE, tl.int32)
        while (found > ROOM) & (high != low + 1):
            middle = between(low, high)
            count = count_above(row, columns, middle)
            is_enough = count >= k
            low = tl.where(is_enough, middle, low)
            found = tl.where(is_enough, count, found)
            high = tl.where(is_enough, high, middle)
        tl.debug_barrier()
        if found <= ROOM:
            found = gather(row, keys, columns, low, NONE, 0, ROOM)
        else:
            found = gather(row, keys, columns, high, NONE, 0, k)
            gather(row, keys, columns, low, high, found, k)
            found = k
    # What other threads have written is read.
    tl.debug_barrier()
    places = tl.arange(0, ROOM)
    chosen = tl.sort(tl.load(keys + places, mask=places < found, other=-0x8000000000000000), descending=True)
    is_one = places < k
    column = 0x7FFFFFFF - (chosen & 0xFFFFFFFF)
    tl.store(indices + index * k + places, column, mask=is_one)
    tl.store(values + index * k + places, tl.load(row + column, mask=is_one), mask=is_one)


# --- launches ---------------------------------------------------------------------------------------------


def room_of(k):
    """Of random numbers 1.1 k to 1.7 k reach the bound."""
    return power_of_two(2 * k, 32, TILE.value)


def is_served_by_library(elements):
    return elements.is_cuda and hasattr(torch.ops.aefast_cuda, "largest")


def select(elements, values, indices):
    """Writes the k largest of each row of a contiguous (N, F) to contiguous values and indices (N, k)."""
    (N, F), k = elements.shape, values.shape[1]
    if values.numel() == 0:
        return
    if elements.dtype == torch.float64 or k > MOST:
        indices.copy_(largest(elements, k))
        torch.gather(elements, 1, indices, out=values)
    elif is_served_by_library(elements):
        torch.ops.aefast_cuda.largest(elements, values, indices)
    else:
        room = room_of(k)
        keys = torch.empty((N, room), dtype=torch.int64, device=elements.device)
        largest_kernel[(N,)](elements, keys, values, indices, F, k, ROOM=room, num_warps=WARPS, **COMPILE)
