"""Running commands in a known environment."""

import multiprocessing
import os
import subprocess

# What would change how a build or a run goes.
SETTINGS = (
    *("AEFAST_BACKEND", "AEFAST_BUILD_CPU", "AEFAST_BUILD_CUDA", "AEFAST_DEBUG", "PYTHONPATH"),
    *("CUDACXX", "CUDA_PATH", "CXX", "TRITON_INTERPRET"),
    # With it pytest-benchmark measures nothing.
    "PYTEST_XDIST_WORKER",
)


def environment(**changes):
    """This process's environment without `SETTINGS`, and with `changes`; None leaves a variable out."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {name: str(value) for name, value in {**kept, **changes}.items() if value is not None}


def run(command, **options):
    """The finished process, with all it wrote as text in stdout."""
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        **options,
    )


def prepared():
    """Processes come from one that has imported what takes seconds, and never had a thread or anything else of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aefast.train", "aefast.models", "torch._dynamo"])
    return context
