"""Memory of processes, as /proc/PID/smaps_rollup counts it. For confined ones that takes root."""

import os
from pathlib import Path
from typing import Final, NamedTuple

KIB: Final = 1024
NEEDS_ROOT: Final = "the memory of confined processes can be read by root only"


class Memory(NamedTuple):
    """Bytes. PSS is a process's own pages and its share of those it has in common with others."""

    pss: int
    private_dirty: int


def memory_of(pid: int) -> Memory | None:
    """The memory of a process; None if it may not be read."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except PermissionError:
        return None
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * KIB
        for line in text.splitlines()
        if line.endswith(" kB")
    }
    return Memory(sizes["Pss"], sizes["Private_Dirty"])


def descendants(pid: int) -> list[int]:
    """A process and everything that descends from it, itself first. Source: proc(5)."""
    found = [pid]
    for each in found:  # grows as it goes
        for task in Path(f"/proc/{each}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def may_read() -> bool:
    """Whether memory_of will answer for services."""
    return os.geteuid() == 0
