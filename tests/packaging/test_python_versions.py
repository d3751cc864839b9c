"""Every file compiles under every supported Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import environment, run

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("aefast", "bench", "kernels", "examples", "tests", "setup.py")


def interpreter(version):
    """One of this version: this process's own, one on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [
        sys.executable,
        shutil.which(f"python{version}"),
        *pyenv.glob(f"versions/{version}.*/bin/python"),
    ]
    for path in filter(None, found):
        # What lies on PATH may stand for a version that is not there.
        command = [path, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip() == version:
            return path
    return None


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_compiles(version, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on PATH or among pyenv's")
    done = run(
        [python, "-W", "error", "-m", "compileall", "-q", *FOLDERS],
        cwd=REPOSITORY,
        env=environment(PYTHONPYCACHEPREFIX=str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout
    assert any(tmp_path.rglob("*.pyc"))
