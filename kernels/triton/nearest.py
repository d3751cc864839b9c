"""The nearest row of y (B, M, D) to each row of x (B, N, D), by a scan of all pairs that stores none of them.

There are two kernels. `nearest_kernel` sums squared differences, two operations a pair and dimension. With more
dimensions than DIFFERENCES `nearest_product_kernel` takes over, whose products tensor cores make: ‖x - y‖² is least
where ‖y‖²/2 - x·y is. Rows are centred for it, and the distance of the row found is computed from its differences.

A program has ROWS rows of x and a share of the rows of y. How many shares there are and how large tiles are changes
nothing: the value of a pair does not depend on it, and of equal values that of the lowest index is taken everywhere.
"""

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, accumulator, on_device, power_of_two

__all__ = ["nearest"]

DIFFERENCES = 32  # dimensions up to which differences are summed; in float64 they always are
ENOUGH = 512  # programs, four for each of a large GPU's multiprocessors
LEAST = 1024  # rows of y in a share, where there are several
MOST = 1 << 30  # and at most: kernels count them in 32 bits

# Of nearest_kernel: a thread has 4 rows of x, and 4 rows of y, or 2 in float64. Two programs fit a multiprocessor.
ROWS, LANES, WARPS = 32, 32, 8
REGISTERS = {} if torch.version.hip else {"maxnreg": 128}
DEPTH = 16  # dimensions of a step of nearest_product_kernel


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def with_square(total, x, y):
    """total (GROUPS, ROWS, LANES) and the squared differences of what x (1, ROWS, 1) and y (GROUPS, 1, LANES) point
    at."""
    apart = widen(tl.load(x)) - widen(tl.load(y))
    return total + apart * apart


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def nearest_kernel(
    x,  # (B, N, D), any strides
    y,  # (B, D, M) contiguous
    squared,  # (splits, B, N) fp32, fp64 for fp64
    index,  # (splits, B, N) int64
    B,
    N,
    M,
    D,
    per_split,  # rows of y in a share, a multiple of GROUPS * LANES; program axis 1 is the share
    stride_x_batch,
    stride_x_row,
    stride_x_col,
    STEP: tl.constexpr,  # dimensions at a time
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,  # a warp's
):
    # A tile is (GROUPS, ROWS, LANES): a warp has the same rows of x in all of its lanes, whose loads are one, and
    # GROUPS rows of y in each. As a matrix (ROWS, GROUPS * LANES) the compiler would lay warps along the rows of y,
    # and each thread would load a value of x for every pair.
    COLUMNS: tl.constexpr = GROUPS * LANES
    # 64-bit: any offset may exceed 2^31 elements.
    stride_x_col = tl.cast(stride_x_col, tl.int64)
    stride_y_col = tl.cast(M, tl.int64)
    tiles = tl.cdiv(N, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    first = split * per_split
    last = tl.minimum(first + per_split, M)
    lanes = tl.arange(0, GROUPS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    # Beyond the last row the last one stands again, which changes no minimum.
    x_rows = x + batch * stride_x_batch + tl.minimum(rows, N - 1)[None, :, None] * stride_x_row
    y += batch * stride_y_col * D

    best = tl.full((GROUPS, ROWS, LANES), float("inf"), squared.dtype.element_ty)
    tile_of_best = tl.zeros((GROUPS, ROWS, LANES), tl.int32)
    for tile in range(tl.cdiv(last - first, COLUMNS).to(tl.int32)):
        y_rows = y + tl.minimum(first + tile * COLUMNS + lanes, M - 1)
        total = tl.zeros((GROUPS, ROWS, LANES), squared.dtype.element_ty)
        whole = D // STEP * STEP
        for dimension in range(0, whole, STEP):
            for offset in tl.static_range(STEP):
                at = dimension + offset
                total = with_square(total, x_rows + at * stride_x_col, y_rows + at * stride_y_col)
        for at in range(whole, D):
            total = with_square(total, x_rows + at * stride_x_col, y_rows + at * stride_y_col)
        tile_of_best = tl.where(total < best, tile, tile_of_best)
        best = tl.minimum(best, total, propagate_nan=tl.PropagateNan.ALL)

    is_nan = best != best
    has_nan = tl.max(tl.max(is_nan.to(tl.int32), axis=2), axis=0) > 0
    best = tl.where(is_nan, 0.0, best)
    least = tl.min(tl.min(best, axis=2), axis=0)
    places = tl.where(best > least[None, :, None], 0x7FFFFFFF, tile_of_best * COLUMNS + lanes)
    place = tl.min(tl.min(places, axis=2), axis=0)
    out = (split * B + batch) * N + rows
    tl.store(squared + out, tl.where(has_nan, float("nan"), least), mask=rows < N)
    tl.store(index + out, tl.minimum(first + place, M - 1), mask=rows < N)


@triton.jit
def nearest_product_kernel(
    x,  # (B, N, D) fp32 contiguous
    y,  # (B, M, D) fp32 contiguous
    half_norms,  # (B, M) fp32: ‖y‖²/2
    scores,  # (splits, B, N) fp32: the least ‖y‖²/2 - x·y
    index,  # (splits, B, N) int64
    B,
    N,
    M,
    D,  # a multiple of DEPTH
    per_split,  # rows of y in a share, a multiple of COLUMNS; program axis 1 is the share
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(N, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    first = split * per_split
    last = tl.minimum(first + per_split, M)
    lanes = tl.arange(0, COLUMNS)
    depths = tl.arange(0, DEPTH)
    x_rows = x + (batch * N + tl.minimum(rows, N - 1))[:, None] * D + depths[None, :]
    y += batch * M * D
    half_norms += batch * M

    best = tl.full((ROWS,), float("inf"), tl.float32)
    index_of_best = tl.zeros((ROWS,), tl.int64)
    for tile in range(tl.cdiv(last - first, COLUMNS).to(tl.int32)):
        columns = tl.minimum(first + tile * COLUMNS + lanes, M - 1)
        y_rows = y + columns[None, :] * D + depths[:, None]
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, D, DEPTH):
            left, right = tl.load(x_rows + depth), tl.load(y_rows + depth)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        score = tl.load(half_norms + columns)[None, :] - product
        # Of rows that are not finite; they are never nearest.
        score = tl.where(score == score, score, float("inf"))
        least = tl.min(score, axis=1)
        place = tl.min(tl.where(score > least[:, None], 0x7FFFFFFF, lanes[None, :]), axis=1)
        index_of_best = tl.where(
            least < best, tl.minimum(first + tile * COLUMNS + place, M - 1), index_of_best
        )
        best = tl.where(least < best, least, best)

    out = (split * B + batch) * N + rows
    tl.store(scores + out, best, mask=rows < N)
    tl.store(index + out, index_of_best, mask=rows < N)


# --- launches ---------------------------------------------------------------------------------------------


def shares(programs, M, columns):
    """(shares of the rows of y, rows of a share): enough programs, and enough to do for each."""
    splits = max(1, triton.cdiv(M, MOST), min(triton.cdiv(ENOUGH, programs), M // LEAST))
    per_split = triton.cdiv(triton.cdiv(M, splits), columns) * columns
    return triton.cdiv(M, per_split), per_split


def step_of(D):
    """Dimensions that nearest_kernel takes at a time: with more their loads would not fit the registers."""
    return 3 if D % 3 == 0 else min(D, 2)


def merged(values, index):
    """(splits, B, N) -> (B, N): of equal values that of the first share, where indices are the lowest."""
    if values.shape[0] == 1:
        return values[0], index[0]
    least, share = values.min(0)
    return least, index.gather(0, share[None])[0]


def partial_results(splits, B, N, dtype, device):
    values = torch.empty((splits, B, N), dtype=dtype, device=device)
    return values, torch.empty((splits, B, N), dtype=torch.int64, device=device)


def by_differences(x, y):
    """(squared distances, indices)."""
    (B, N, D), M = x.shape, y.shape[1]
    wide = accumulator(x.dtype)
    groups = 16 // wide.itemsize
    programs = B * triton.cdiv(N, ROWS)
    splits, per_split = shares(programs, M, groups * LANES)
    squared, index = partial_results(splits, B, N, wide, x.device)
    nearest_kernel[(programs, splits)](
        x,
        y.transpose(1, 2).contiguous(),  # a warp's loads are to lie side by side
        squared,
        index,
        B,
        N,
        M,
        D,
        per_split,
        *x.stride(),
        STEP=step_of(D),
        GROUPS=groups,
        ROWS=ROWS,
        LANES=LANES,
        num_warps=WARPS,
        **REGISTERS,
        **COMPILE,
    )
    return merged(squared, index)


def by_products(x, y):
    """Indices, of fp32 or half precision."""
    (B, N, D), M = x.shape, y.shape[1]
    # The centre of the finite rows, so that others leave them alone.
    wide = y.float()
    is_finite = wide.isfinite().all(-1, keepdim=True)
    centre = torch.where(is_finite, wide, 0.0).sum(1, keepdim=True) / is_finite.sum(1, keepdim=True).clamp(
        min=1
    )
    # Zeros at the end of each row give all of them the same alignment, and with it one order of the sums below: rows
    # that are equal are to have equal norms.
    padding = (0, -D % DEPTH)
    left = torch.nn.functional.pad(x.float() - centre, padding)
    right = torch.nn.functional.pad(wide - centre, padding)
    half_norms = 0.5 * right.square().sum(-1)
    rows, columns = power_of_two(N, 16, 64), 128
    programs = B * triton.cdiv(N, rows)
    splits, per_split = shares(programs, M, columns)
    scores, index = partial_results(splits, B, N, torch.float32, x.device)
    nearest_product_kernel[(programs, splits)](
        left,
        right,
        half_norms,
        scores,
        index,
        B,
        N,
        M,
        left.shape[-1],
        per_split,
        PRECISION="ieee" if torch.version.hip else "tf32x3",
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=DEPTH,
        num_warps=4,
        num_stages=3,
        **COMPILE,
    )
    return merged(scores, index)[1]


def distance_to(x, y, index):
    """The squared distances of the rows of x to those rows of y; NaN wherever y has NaN at all."""
    wide = accumulator(x.dtype)
    taken = y.gather(1, index[..., None].expand(*index.shape, y.shape[-1]))
    squared = (x.to(wide) - taken.to(wide)).square().sum(-1)
    return squared.masked_fill(y.isnan().flatten(1).any(1)[:, None], float("nan"))


# --- launchers --------------------------------------------------------------------------------------------


def nearest(x, y):
    """x (B, N, D) and y (B, M, D) of any strides, M and D at least 1 -> the squared distance of each row of x to the
    nearest row of y (B, N), fp32 or fp64, and its index (B, N), int64."""
    if x.numel() == 0:
        results = partial_results(1, *x.shape[:2], accumulator(x.dtype), x.device)
        return results[0][0], results[1][0]
    with on_device(x):
        if x.shape[-1] <= DIFFERENCES or x.dtype == torch.float64:
            return by_differences(x, y)
        # Contiguous, lest strides decide the order of torch's sums.
        x, y = x.contiguous(), y.contiguous()
        index = by_products(x, y)
        return distance_to(x, y, index), index
