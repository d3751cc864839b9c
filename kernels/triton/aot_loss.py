"""What the kernels of losses are compiled to ahead of time; aot.py says what that means."""

from ..workload import BATCH, FEATURES
from . import loss_gradient, reconstruction_loss
from .aot import TARGETS, TORCH_DTYPES, signature, streaming
from .aot_random import pointers

COUNT = BATCH * FEATURES
SHAPE = f"{BATCH}×{FEATURES}"
# Exponentials and logarithms of an element.
EXPS = {"lp": 1, "bce": 0, "bce_with_logits": 1}


def wide(dtype):
    return "fp64" if dtype == "fp64" else "fp32"


def sums():
    for kind, dtype, has_gradient, targets, resident in (
        ("mse", "bf16", True, TARGETS, 8),
        ("mse", "bf16", False, (90,), 8),
        ("mse", "fp32", True, (90,), 8),
        ("mse", "fp64", True, (90,), 6),
        ("l1", "bf16", True, (90,), 8),
        ("huber", "bf16", True, (90,), 8),
        ("lp", "bf16", True, TARGETS, 6),
        ("lp", "fp32", True, (90,), 6),
        ("charbonnier", "bf16", True, (90,), 6),
        ("bce", "fp32", True, (90,), 6),
        ("bce", "bf16", False, TARGETS, 6),
        ("bce_with_logits", "bf16", True, TARGETS, 6),
        ("bce_with_logits", "fp32", True, (90,), 6),
    ):
        size = TORCH_DTYPES[dtype].itemsize
        block, steps, programs = reconstruction_loss.shares(COUNT, size)
        least = (2 + has_gradient) * COUNT * size
        yield signature(
            f"reconstruction_loss {kind} {dtype}{'' if has_gradient else ' alone'}",
            reconstruction_loss.reconstruction_loss_kernel,
            {
                **pointers(dtype, "x target"),
                "gradient": f"*{dtype}" if has_gradient else None,
                "partials": f"*{wide(dtype)}",
                **{"n": "i32", "steps": "i32", "parameter": "fp64", "scale": "fp64"},
            },
            {"KIND": kind, "BLOCK": block},
            ("n", "steps", "parameter", "scale"),
            targets=targets,
            programs_per_sm=resident,
            load_bits=128,
            workload=streaming(
                SHAPE,
                dtype,
                programs,
                COUNT,
                least,
                exps=EXPS.get(kind, 0) * COUNT,
                passes=steps,
                pass_bytes=(2 + has_gradient) * block * size,
                distinct_bytes=least + programs * max(4, size),
            ),
        )


def totals():
    for dtype, size in (("fp32", 4), ("fp64", 8)):
        programs = reconstruction_loss.PROGRAMS
        block = reconstruction_loss.PARTIALS.value
        yield signature(
            f"total {dtype}",
            reconstruction_loss.total_kernel,
            {**pointers(dtype, "partials value"), "count": "i32", "normalizer": "fp64"},
            {"ROOT": False, "BLOCK": block},
            ("count", "normalizer"),
            targets=TARGETS if dtype == "fp32" else (90,),
            programs_per_sm=8,
            load_bits=8 * size,
            workload=streaming(
                f"{programs}",
                dtype,
                1,
                programs,
                (programs + 1) * size,
                passes=programs // block,
                pass_bytes=block * size,
            ),
        )


def elements():
    for kind, dtype, grad, targets in (
        ("mse", "bf16", None, (90,)),
        ("mse", "bf16", "elements", TARGETS),
        ("bce", "bf16", "scalar", (90,)),
        ("bce_with_logits", "fp32", "elements", (90,)),
    ):
        size = TORCH_DTYPES[dtype].itemsize
        block = reconstruction_loss.block_of(size)
        accumulated = f"*{wide(dtype)}"
        # The losses are as wide as their gradient.
        least = COUNT * (2 * size + (4 if grad is None else size) + 4 * (grad == "elements"))
        yield signature(
            f"reconstruction_loss_elements {kind} {dtype} {grad or 'forward'}",
            reconstruction_loss.reconstruction_loss_elements_kernel,
            {
                "grad": accumulated if grad else None,
                **pointers(dtype, "x target"),
                "out": f"*{dtype}" if grad else accumulated,
                **{"n": "i32", "parameter": "fp64", "normalizer": "fp64"},
            },
            {"SCALAR": grad == "scalar", "KIND": kind, "BLOCK": block},
            ("n", "parameter", "normalizer"),
            targets=targets,
            programs_per_sm=6,
            load_bits=128,
            workload=streaming(
                SHAPE,
                dtype,
                COUNT // block,
                COUNT,
                least,
                exps=EXPS.get(kind, 0) * COUNT,
                distinct_bytes=least,
            ),
        )


def gradients():
    for dtype, samples, targets in (
        ("bf16", 1, TARGETS),
        ("bf16", BATCH, (90,)),
        ("fp32", 1, (90,)),
        ("fp64", 1, (90,)),
    ):
        size, single = TORCH_DTYPES[dtype].itemsize, samples == 1
        n = COUNT // samples
        block, unit = loss_gradient.shares(n, size, samples)
        yield signature(
            f"loss_gradient {dtype}{'' if single else ' of samples'}",
            loss_gradient.loss_gradient_kernel,
            {
                **pointers(dtype, "gradient out"),
                "grad": f"*{wide(dtype)}",
                **dict.fromkeys(("n", "blocks"), "i32"),
                **({} if single else {"stride_grad": "i32"}),
                "normalizer": "fp64",
            },
            {
                **({"stride_grad": 0} if single else {}),
                **{"SINGLE": single, "UNIT": unit, "BLOCK": block},
            },
            ("n", "blocks", "stride_grad", "normalizer"),
            targets=targets,
            programs_per_sm=8,
            load_bits=128,
            workload=streaming(
                SHAPE,
                dtype,
                samples * -(-n // block),
                COUNT,
                2 * COUNT * size,
                distinct_bytes=2 * COUNT * size,
            ),
        )


def signatures():
    yield from sums()
    yield from totals()
    yield from elements()
    yield from gradients()
