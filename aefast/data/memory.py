"""How much memory there is for data."""

from __future__ import annotations

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
# The limit of the control group that a container runs in.
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_bytes() -> int:
    """Bytes that can be used without swapping, files that are cached in memory counted as free.

    On systems other than Linux it is the whole memory.
    """
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        # "max" where there is none.
        return min(available, int(_GROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return available
