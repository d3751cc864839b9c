"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash at any time leaves the old file or the new one, never a part.

    The bytes go to a temporary neighbour, reach the disk, and take the name in one rename.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        # A full disk names no file by itself.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is durable only once its directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
