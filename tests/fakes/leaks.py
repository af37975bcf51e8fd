"""Places in which a test looks for secrets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

LOOK_MAX: Final = 64 << 20  # bytes of one file or pseudo file that are looked at


def files_below(folder: Path, *, but: Path | None = None) -> Iterator[tuple[str, bytes]]:
    """Every file of a folder, by its name in it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != but:
            with path.open("rb") as opened:
                yield str(path.relative_to(folder)), opened.read(LOOK_MAX)


def listing() -> Iterator[tuple[str, bytes]]:
    """What a listing of the processes shows, to root: the words and the environment of each, and
    what else says something of it. Not the memory itself."""
    for number in sorted(path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        for name in ("cmdline", "environ", "status", "limits", "comm", "maps", "stat"):
            try:
                yield f"/proc/{number}/{name}", Path("/proc", number, name).read_bytes()
            except OSError:  # it has ended, or is none of ours
                continue
