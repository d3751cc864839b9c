"""The k largest elements of each row of a matrix and which they are, the largest first and of equals the one of the
lower column.

A program has a row, whose elements belong to twice as many groups as k, or more. A bound that k of the groups' maxima
reach, k elements reach; the few more than k that do are gathered in memory and sorted. Where more do than there is room
for, since many are equal or one group has most of the largest, the bound is raised by bisection, until those above it
fit, or are k at most with some of its equals, of which the first are taken.
"""

import torch
import triton
import triton.language as tl

from ..selection import MOST, MOST_COLUMNS, largest
from .linear_act import COMPILE, power_of_two

__all__ = ["select"]

TILE = tl.constexpr(2 * MOST)  # as many elements as there are groups at most
CHUNK = tl.constexpr(8)  # elements side by side
AT_ONCE = tl.constexpr(64)  # chunks
WARPS = 4
# Without a limit the compiler spills for fewer registers than there are.
REGISTERS = {} if torch.version.hip else {"maxnreg": 128}
# Elements that PyTorch selects from at a time: its keys, or its sort, take some 30 bytes for each.
AT_ONCE_BY_TORCH = 1 << 24
# Orders, as integers: that of NaN, and what none reaches.
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
def gather(row, chunks, keys, columns, low, high, found, room, ROOM: tl.constexpr):
    """Writes the keys of those whose order is from `low` to below `high`, in the order of their columns, from
    keys[found] on and in front of keys[room] -> `found` and how many they are, and in how many chunks `low` is reached.

    These chunks are found first. ROOM of them are gone through.
    """
    least = number_of(low)
    found = tl.cast(found, tl.int32)
    starts = tl.arange(0, TILE // CHUNK) * CHUNK
    within = tl.arange(0, CHUNK)[None, :]
    count = tl.zeros((), tl.int32)
    for first in range(0, columns, TILE):
        cols = first + starts[:, None] + within
        inside = cols < columns
        numbers = tl.load(row + cols, mask=inside, other=0.0).to(tl.float32)
        has_one = tl.max((inside & ((numbers >= least) | (numbers != numbers))).to(tl.int32), 1)
        places = count + tl.cumsum(has_one, 0) - 1
        tl.store(chunks + places, first + starts, mask=(has_one > 0) & (places < ROOM))
        count += tl.sum(has_one, 0)
    # What other threads have written is read.
    tl.debug_barrier()
    for first in range(0, tl.minimum(count, ROOM), AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        is_chunk = place < tl.minimum(count, ROOM)
        cols = tl.load(chunks + place, mask=is_chunk, other=0)[:, None] + within
        inside = is_chunk[:, None] & (cols < columns)
        order = order_of(tl.load(row + cols, mask=inside, other=0.0).to(tl.float32))
        is_one = tl.reshape((inside & (order >= low) & (order < high)).to(tl.int32), (AT_ONCE * CHUNK,))
        key = tl.reshape((order.to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64), (AT_ONCE * CHUNK,))
        places = found + tl.cumsum(is_one, 0) - 1
        tl.store(keys + places, key, mask=(is_one > 0) & (places < room))
        found += tl.sum(is_one, 0)
    return found, count


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
    chunks,  # (N, ROOM) int32
    keys,  # (N, ROOM) int64
    values,  # (N, k) contiguous
    indices,  # (N, k) int64 contiguous
    columns,
    k,
    GROUPS: tl.constexpr,  # twice k at least
    ROOM: tl.constexpr,  # for so many elements of a row, at least k
):
    # 64-bit: any offset may exceed 2^31 elements.
    index = tl.program_id(0).to(tl.int64)
    row = elements + index * columns
    chunks += index * ROOM
    keys += index * ROOM

    # Of groups without a number the maximum is -inf: what they hold is NaN, and in no other's way.
    most = tl.full((TILE,), float("-inf"), tl.float32)
    for first in range(0, columns, TILE):
        cols = first + tl.arange(0, TILE)
        numbers = tl.load(row + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, numbers)
    orders = order_of(tl.max(tl.reshape(most, (GROUPS, TILE // GROUPS)), 1))
    # k maxima or more reach `low`, and fewer `high`. A few more than k make few more elements to sort.
    low = tl.min(orders, 0)
    high = tl.max(orders, 0) + 1
    reached = tl.full((), GROUPS, tl.int32)
    while (reached > k + k // 8) & (high != low + 1):
        middle = between(low, high)
        count = tl.sum((orders >= middle).to(tl.int32), 0)
        is_enough = count >= k
        low = tl.where(is_enough, middle, low)
        reached = tl.where(is_enough, count, reached)
        high = tl.where(is_enough, high, middle)

    found, in_chunks = gather(row, chunks, keys, columns, low, NONE, 0, ROOM, ROOM)
    found = tl.maximum(found, in_chunks)
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
            found, _ = gather(row, chunks, keys, columns, low, NONE, 0, ROOM, ROOM)
        else:
            found, _ = gather(row, chunks, keys, columns, high, NONE, 0, k, ROOM)
            tl.debug_barrier()
            gather(row, chunks, keys, columns, low, high, found, k, ROOM)
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


def sizes(k):
    """How many groups there are, and elements that there is room for. Of random numbers 1.1 k to 1.7 k reach the
    bound."""
    return {"GROUPS": power_of_two(4 * k, 512, TILE.value), "ROOM": power_of_two(2 * k, 32, TILE.value)}


def is_served_by_library(elements):
    return elements.is_cuda and hasattr(torch.ops.aefast_cuda, "largest")


def select(elements, values, indices):
    """Writes the k largest of each row of a contiguous (N, F) to contiguous values and indices (N, k)."""
    (N, F), k = elements.shape, values.shape[1]
    if values.numel() == 0:
        return
    if elements.dtype == torch.float64 or k > MOST or F > MOST_COLUMNS:
        rows = max(1, AT_ONCE_BY_TORCH // F)
        for first in range(0, N, rows):
            part, chosen = elements[first : first + rows], indices[first : first + rows]
            chosen.copy_(largest(part, k))
            torch.gather(part, 1, chosen, out=values[first : first + rows])
    elif is_served_by_library(elements):
        torch.ops.aefast_cuda.largest(elements, values, indices)
    else:
        made = sizes(k)
        chunks = torch.empty((N, made["ROOM"]), dtype=torch.int32, device=elements.device)
        keys = torch.empty((N, made["ROOM"]), dtype=torch.int64, device=elements.device)
        launch = largest_kernel[(N,)]
        launch(elements, chunks, keys, values, indices, F, k, **made, num_warps=WARPS, **REGISTERS, **COMPILE)
