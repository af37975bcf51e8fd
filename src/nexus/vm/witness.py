"""What process 1 sees from outside when a service says that it has its registers.

A line is a statement. When it comes, process 1 reads in the memory maps of all processes who has
the machine's registers mapped, and tells the host: the judge compares.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from nexus.abi import Event, EventKind
from nexus.kernel.linux.mmio import MEMORY, MmioPage
from nexus.proof.notes import NOTE, NOTE_PAGES, NOTE_WINDOWS

CLAIMS: Final = frozenset({"rngd: mmio window mapped ok", "blk: virtio-blk up"})
"""Lines of services about registers of theirs."""
OWN_CLAIM: Final = "SELFTEST: mmio map ok"

PROC: Final = Path("/proc")


def pages_note(pages: Iterable[MmioPage]) -> Mapping[str, object]:
    """The pages of registers that services may be given: kind, address, name of the device."""
    given = [[int(page.kind), page.address, page.name] for page in pages]
    return {NOTE: NOTE_PAGES, "pages": given}


def seen_at(event: Event, proc: Path = PROC) -> Mapping[str, object] | None:
    """What is to be told when this event has come, None if nothing is."""
    line = event.fields.get("line")
    if event.kind is not EventKind.CONSOLE or line not in CLAIMS | {OWN_CLAIM}:
        return None
    return {NOTE: NOTE_WINDOWS, "line": line, "pid": event.pid, "holders": windows(proc)}


def windows(proc: Path = PROC) -> list[list[int]]:
    """Who has which page of the machine's memory mapped: process, address, length."""
    found = []
    for folder in sorted(proc.iterdir()):
        if not folder.name.isdecimal():
            continue
        try:
            text = (folder / "maps").read_text("ascii", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        found += [[int(folder.name), *each] for each in _of_memory(text)]
    return found


def _of_memory(maps: str) -> list[tuple[int, int]]:
    """Address and length of each mapping of MEMORY, proc_pid_maps(5)."""
    found = []
    for line in maps.splitlines():
        span, _rights, offset, _device, _inode, *path = line.split(maxsplit=5)
        if path and path[0].strip() == MEMORY:
            first, _, last = span.partition("-")
            found.append((int(offset, 16), int(last, 16) - int(first, 16)))
    return found
