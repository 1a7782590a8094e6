"""What this process may use of the machine: CPUs and memory, within the limits of its control group."""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_THREADS_BYTES = 256 << 20
"""Address space that the stacks and heaps of a few threads take."""


def cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may run on, at most what a control group's quota pays for. At least 1."""
    allowed = len(os.sched_getaffinity(0))
    for folder in _cgroups(root, "cpu"):
        quota, period = _quota(folder)
        if quota > 0 and period > 0:
            allowed = min(allowed, math.ceil(quota / period))
    return max(allowed, 1)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping or being killed, within the limits of control groups and
    RLIMIT_AS."""
    available = _meminfo(root)["MemAvailable"]
    for folder in _cgroups(root, "memory"):
        for limit, usage, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                # The page cache of files counts as used, but gives way.
                cache = _fields(folder / "memory.stat").get(inactive, 0)
                available = min(available, most - used + cache)
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        available = min(available, most - _address_space())
    return max(available, 0)


def _address_space() -> int:
    """Bytes that this process has mapped, and will map whatever it loads."""
    pages = int(_text(Path("/proc/self/statm")).split()[0])
    return pages * resource.getpagesize() + _THREADS_BYTES


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and its ancestors, in version 1 and 2 hierarchies.

    In a container the path may be that of the host, which is not there: then only the mounted root is.
    """
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            bases = [mount / controllers, mount / controller]
        else:
            continue
        for base in dict.fromkeys(bases):
            own = base / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_dir():
                    yield folder
                if folder == base:
                    break


def _quota(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU time for each period of microseconds; (0, 0) when there is no limit."""
    parts = _text(folder / "cpu.max").split()
    if len(parts) == 2 and parts[0].isdigit():
        return int(parts[0]), int(parts[1])
    return _number(folder / "cpu.cfs_quota_us") or 0, _number(folder / "cpu.cfs_period_us") or 0


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes of each line of /proc/meminfo."""
    lines = (line.split() for line in _text(root / "proc/meminfo").splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines}


def _fields(path: Path) -> dict[str, int]:
    lines = (line.split() for line in _text(path).splitlines())
    return {parts[0]: int(parts[1]) for parts in lines if len(parts) == 2}


def _number(path: Path) -> int | None:
    """The number in a file; None when the file is not there or says "max"."""
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    """A control file that is not there says nothing: which exist depends on the kernel and the container."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
