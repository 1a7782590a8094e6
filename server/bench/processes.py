"""The processes of a server: what they use, and which port is whose, from /proc."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROLES = ("server", "scheduler", "engine")
_LISTENS = "0A"
"""A state in /proc/net/tcp."""


@dataclass(frozen=True)
class Usage:
    """Of a process tree."""

    cpu: dict[str, float]
    """CPU seconds so far of each role; "supervisor" is what is left."""
    peak_bytes: dict[str, int]
    """Largest resident size of each role so far. Pages that processes share are counted in each."""


def usage(root: int) -> Usage:
    """Of the process `root` and its descendants. A process that ends meanwhile is left out."""
    cpu: dict[str, float] = {}
    peak: dict[str, int] = {}
    for pid, role in _tree(root, "supervisor"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks = int(fields[11]) + int(fields[12])
        cpu[role] = cpu.get(role, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
        high = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
        peak[role] = peak.get(role, 0) + high * 1024
    return Usage(cpu, peak)


def signal_tree(root: int, number: signal.Signals) -> None:
    """To the process `root` and its descendants; those that end meanwhile or are not ours are left out."""
    for pid, _ in list(_tree(root, "")):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def listener(port: int) -> int | None:
    """The process that listens on a TCP port of this machine; None if there is none that we may look into.

    Of several (a parent that handed its socket down) the oldest.
    """
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            if any(str(fd.readlink()) in inodes for fd in Path(f"/proc/{process}/fd").iterdir()):
                return process
    return None


def _tree(root: int, role: str) -> Iterator[tuple[int, str]]:
    """Process numbers with their roles; a child has its parent's unless its command names one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    left = [(root, role)]
    while left:
        pid, role = left.pop()
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        role = next((r for r in ROLES if f"ktransformers.{r}".encode() in command), role)
        yield pid, role
        left += [(child, role) for child in children.get(pid, [])]
