"""Which candidate and which tile serves a GEMM with an epilogue.

Every such call has two candidates:

  fused    one Triton GEMM with the epilogue in it;
  unfused  cuBLAS's GEMM, then one Triton kernel over its result.

A table, one file a device, says which is faster for an operation, a shape (each side rounded to a power of
two) and a dtype, and with which tile. Without a row the unfused candidate runs: cuBLAS is slow nowhere.
`tune` measures and writes rows. A user's table, `$AEFAST_TUNED` or ~/.cache/aefast/tuned/<device>.json, goes
before the one shipped beside this file. Tables are read once a process.

All tiles of one dtype have the same BLOCK_K and sum in the same order, so a tile never changes a result.
"""

import contextlib
import contextvars
import functools
import json
import os
import re
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

SCHEMA = 1

# (M, N, K) of out (M, N) = a (M, K) @ b (K, N):
#   linear_act             forward, the activation in the epilogue
#   linear_act_derivative  the same, which also stores act'
#   dgrad_act              data gradient with the layer below's act' and bias gradient in the epilogue
#   dgrad, wgrad           plain data and weight gradients, the latter with K the batch
#   gaussian_head          forward to N = 2 D moments, the sample and its divergence in the epilogue
OPERATIONS = ("linear_act", "linear_act_derivative", "dgrad_act", "dgrad", "wgrad", "gaussian_head")

# Elements of K a tile consumes per step, by itemsize: 128 bytes, one swizzle atom of shared memory.
BLOCK_K = {2: 64, 4: 32}


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self):
        return f"{self.block_m}x{self.block_n}-w{self.warps}-s{self.stages}"

    @staticmethod
    def parse(text):
        match = re.fullmatch(r"(\d+)x(\d+)-w(\d+)-s(\d+)", text)
        if match is None:
            raise ValueError(f"tile: expected like '128x128-w8-s3', got {text!r}")
        return Tile(*map(int, match.groups()))


# BLOCK_M is a multiple of 64, so that Hopper always uses wgmma (another instruction rounds differently) and
# the bias gradient's 64-row partial sums never cross tiles.
TILES_TENSOR = (
    Tile(64, 32, 4, 4),
    Tile(64, 64, 4, 4),
    Tile(128, 32, 4, 4),
    Tile(128, 64, 4, 4),
    Tile(64, 128, 4, 4),
    Tile(128, 128, 8, 3),
    Tile(64, 256, 8, 3),
    Tile(128, 256, 8, 3),
)
# IEEE float32 runs on the FMA units: accumulators and operands all live in registers.
TILES_FMA = (Tile(64, 32, 4, 2), Tile(64, 64, 8, 2))


# Rows that no 16-byte load fits are loaded element by element, an address register pair each.
TILES_ODD = (Tile(64, 32, 4, 4),)


# Beside its sums a thread of gaussian_head holds as much noise as it makes elements of z.
TILES_HEAD = tuple(tile for tile in TILES_TENSOR if tile.block_m * tile.block_n <= 128 * 128)


def tiles(dtype, input_precision, aligned=True, operation=None):
    if not aligned:
        return TILES_ODD
    if dtype == torch.float32 and input_precision == "ieee":
        return TILES_FMA
    return TILES_HEAD if operation == "gaussian_head" else TILES_TENSOR


def default_tile(M, N, K, dtype, input_precision, aligned=True):
    """A tile for a fused call that no table names."""
    if not aligned:
        return TILES_ODD[0]
    if dtype == torch.float32 and input_precision == "ieee":
        return TILES_FMA[0] if N <= 32 else TILES_FMA[1]
    if N <= 32:
        return Tile(64, 32, 4, 4)
    if N <= 64 or M * N <= 64 * 64 * 128:
        return Tile(64, 64, 4, 4)
    return Tile(64, 128, 4, 4) if M * N <= 128 * 128 * 128 else Tile(128, 128, 8, 3)


@dataclass(frozen=True)
class Plan:
    fused: bool
    tile: Tile
    descriptors: bool  # load through tensor descriptors (TMA) where the operands' layout allows


# --- overrides, for tests and measurements ----------------------------------------------------------------

_forced = contextvars.ContextVar("aefast_triton_forced", default=None)


@contextlib.contextmanager
def force(candidate=None, tile=None, descriptors=None):
    """Within the block, for the calls of this thread: this candidate ("fused", "unfused"), this tile, these
    loads; None leaves it open. The environment's AEFAST_TRITON_CANDIDATE does the first for the process, with
    the threads that autograd runs backwards on CUDA in."""
    token = _forced.set((candidate, tile, descriptors))
    try:
        yield
    finally:
        _forced.reset(token)


# --- tables -----------------------------------------------------------------------------------------------


def bucket(size):
    """`size` rounded to the nearest power of two, on the logarithmic scale."""
    return 1 << max(0, round(_log2(size)))


def _log2(size):
    # Exact for powers of two, and monotonic between them: 2^e·(1+f) -> e + f.
    exponent = max(1, size).bit_length() - 1
    return exponent + (size - (1 << exponent)) / (1 << exponent) if size > 0 else 0


def row_key(operation, M, N, K, dtype, input_precision, aligned):
    """`aligned`: all operands allow 16-byte loads."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype == "float32":
        dtype += f"-{input_precision}"
    layout = "aligned" if aligned else "any"
    return f"{operation}/m{bucket(M)}-n{bucket(N)}-k{bucket(K)}/{dtype}/{layout}"


def slug(device_name):
    return re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()


def shipped_path(device_name):
    return Path(__file__).parent / "tuned" / f"{slug(device_name)}.json"


def user_path(device_name):
    named = os.environ.get("AEFAST_TUNED")
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "aefast" / "tuned" / f"{slug(device_name)}.json"


def read_table(path, device_name):
    """The rows of a table, {} where there is no file or it is another device's or schema's."""
    try:
        table = json.loads(Path(path).read_text())
        if not isinstance(table, dict):
            raise ValueError(f"expected an object, got {type(table).__name__}")
        if table.get("schema") != SCHEMA or table.get("device") != device_name:
            return {}
        rows = table.get("rows")
        if not isinstance(rows, dict):
            raise ValueError(f"rows: expected an object, got {type(rows).__name__}")
        for key, row in rows.items():
            _check_row(key, row)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RuntimeError(f"tuned table {path} cannot be read: {error}; delete it or fix it") from error
    return rows


def _check_row(key, row):
    candidate = row.get("candidate") if isinstance(row, dict) else None
    if candidate not in ("fused", "unfused"):
        raise ValueError(f"{key}: expected a candidate, fused or unfused, got {row!r}")
    if candidate == "fused":
        tile, descriptors = row.get("tile"), row.get("descriptors", False)
        if not isinstance(tile, str) or Tile.parse(tile) not in (*TILES_TENSOR, *TILES_FMA, *TILES_ODD):
            raise ValueError(f"{key}: expected a tile that kernels have, got {tile!r}")
        if not isinstance(descriptors, bool):
            raise ValueError(f"{key}: expected descriptors to be true or false, got {descriptors!r}")


def write_table(path, device_name, rows):
    """Atomic: a reader sees the old table or the new one."""
    import triton

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "schema": SCHEMA,
        "device": device_name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": dict(sorted(rows.items())),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(table, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


_tables = {}
_tables_lock = threading.Lock()


def _rows(device_name):
    rows = _tables.get(device_name)
    if rows is None:
        with _tables_lock:
            rows = _tables.get(device_name)
            if rows is None:
                rows = read_table(shipped_path(device_name), device_name)
                rows = {**rows, **read_table(user_path(device_name), device_name)}
                _tables[device_name] = rows
    return rows


def forget():
    """Read the tables again at their next use."""
    _tables.clear()
    _tabled.cache_clear()


@functools.lru_cache(maxsize=4096)
def _tabled(device_index, operation, M, N, K, dtype, input_precision, aligned):
    """The plan of the tables, or the default one. device_index None: the interpreter's CPU."""
    tile = default_tile(M, N, K, dtype, input_precision, aligned)
    has_tma = device_index is not None and _has_tma(device_index)
    if device_index is not None:
        rows = _rows(torch.cuda.get_device_name(device_index))
        row = rows.get(row_key(operation, M, N, K, dtype, input_precision, aligned))
        if row is not None:
            fused = row["candidate"] == "fused"
            tile = Tile.parse(row["tile"]) if fused else tile
            return Plan(fused, tile, has_tma and row.get("descriptors", has_tma))
    return Plan(False, tile, has_tma)


def _has_tma(device_index):
    return torch.version.hip is None and torch.cuda.get_device_capability(device_index)[0] >= 9


def plan(operation, M, N, K, dtype, input_precision, device, aligned):
    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    chosen = _tabled(index, operation, M, N, K, dtype, input_precision, aligned)
    candidate, tile, descriptors = _forced.get() or (None, None, None)
    candidate = candidate or os.environ.get("AEFAST_TRITON_CANDIDATE")
    if candidate not in (None, "", "fused", "unfused"):
        raise ValueError(f"AEFAST_TRITON_CANDIDATE: expected 'fused' or 'unfused', got {candidate!r}")
    if candidate:
        chosen = replace(chosen, fused=candidate == "fused")
    if tile is not None:
        chosen = replace(chosen, tile=tile)
    if descriptors is not None:
        chosen = replace(chosen, descriptors=descriptors)
    if dtype == torch.float64:  # no float64 tile exists
        chosen = replace(chosen, fused=False)
    return chosen


# --- measuring --------------------------------------------------------------------------------------------


def tune(
    shapes,
    dtypes=(torch.bfloat16,),
    *,
    device=None,
    operations=OPERATIONS,
    path=None,
    margin=0.02,
    report=print,
):
    """Times both candidates, every tile and the loads that there are, and merges the rows into the user's table.

    shapes: (batch, in_features, out_features) of dense layers. A fused candidate is chosen only where it is
    faster than the unfused one by `margin`. Returns the path written.
    """
    from . import gaussian_head
    from . import linear_act as kernels

    device = torch.device("cuda" if device is None else device)
    name = torch.cuda.get_device_name(device)
    path = user_path(name) if path is None else Path(path)
    rows = read_table(path, name)
    with torch.cuda.device(device):
        for dtype in dtypes:
            if dtype == torch.float64:
                continue
            for shape in shapes:
                for operation in operations:
                    if operation == "gaussian_head":
                        case = gaussian_head.tuning_case(*shape, dtype, device)
                    else:
                        case = kernels.tuning_case(operation, *shape, dtype, device)
                    if case is None:  # the fused candidate does not take such a shape
                        continue
                    key, call = case
                    precision = kernels.input_precision(dtype)
                    is_aligned = not key.endswith("/any")
                    candidates = tiles(dtype, precision, is_aligned, operation)
                    # Descriptors of operands that are not aligned would be pointers again.
                    has_descriptors = is_aligned and _has_tma(torch.cuda.current_device())
                    rows[key] = _fastest(
                        call, candidates, (False, True) if has_descriptors else (False,), margin
                    )
                    report(f"{key}: {rows[key]}")
                write_table(path, name, rows)
    forget()
    return path


def _fastest(call, candidates, loads, margin):
    """The row of one call on the current device; loads: the values of Plan.descriptors to try."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    with force("unfused"):
        unfused = do_bench(call, return_mode="median")
    timed = []
    for tile in candidates:
        for descriptors in loads:
            with force("fused", tile, descriptors), contextlib.suppress(OutOfResources):
                timed.append((do_bench(call, return_mode="median"), tile, descriptors))
    row = {"candidate": "unfused", "unfused_ms": round(unfused, 5)}
    if timed:
        fused, tile, descriptors = min(timed, key=lambda entry: entry[0])
        row["fused_ms"] = round(fused, 5)
        if fused < unfused * (1 - margin):
            row |= {"candidate": "fused", "tile": str(tile), "descriptors": descriptors}
    return row
