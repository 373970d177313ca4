"""What runs on this machine, from /proc."""

import glob
from pathlib import Path


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name, from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def started(pid: int) -> str | None:
    """When a living process was started, which tells it from a later one of the same number; None if it is gone."""
    fields = stat(pid)
    return fields[19] if fields and fields[0] != "Z" else None


def descendants(root: int) -> set[int]:
    """Children of a process, their children, and so on."""
    parents = {pid: int(fields[1]) for pid in map(int, _pids()) if (fields := stat(pid))}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def _pids() -> list[str]:
    return [entry.split("/")[2] for entry in glob.glob("/proc/[0-9]*")]
