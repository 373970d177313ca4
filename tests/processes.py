"""What runs on this machine, from /proc."""

import glob
import os
from pathlib import Path


def stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat after the command's name, from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def started(pid: int) -> str | None:
    """When a living process was started, which tells it from a later one of the same number; None if it is gone."""
    fields = stat(pid)
    return fields[19] if fields and fields[0] != "Z" else None


def command(pid: int) -> bytes:
    """How a process was started, its arguments separated by NUL; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def resident(pid: int | str = "self") -> int:
    """KiB of memory that a process holds."""
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1])


def scheduled(pid: int | str = "thread-self") -> tuple[float, float] | None:
    """Seconds for which a thread ran, and for which it could have run but had no processor; None if it is gone.

    The latter is 0 on a kernel that does not count it.
    """
    try:
        ran, waited, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
        return int(ran) / 1e9, int(waited) / 1e9
    except OSError:
        ticks = stat(pid)
        return (sum(map(int, ticks[11:13])) / os.sysconf("SC_CLK_TCK"), 0.0) if ticks else None


def descendants(root: int) -> set[int]:
    """Children of a process, their children, and so on."""
    parents = {pid: int(fields[1]) for pid in map(int, _pids()) if (fields := stat(pid))}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def _pids() -> list[str]:
    return [entry.split("/")[2] for entry in glob.glob("/proc/[0-9]*")]
