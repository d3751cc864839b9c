"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from aefast.errors import InputError


def make_directory(directory: Path) -> None:
    """Make a folder, and those it lies in, where it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"directory={str(directory)!r}: expected a directory, found a file") from None


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Within it an `OSError` that names no file, as that of a full disk, is about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:
            # Without a number the name would take the place of what it says.
            raise OSError(errno.EIO, str(error), str(path)) from error
        error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash at any time leaves the old file or the new one, never a part.

    The bytes go to a temporary neighbour, reach the disk, and take the name in one rename.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with named_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # The rename itself is durable only once its directory is.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
