"""An interpreter that an ordinary user may execute, wherever the one of the tests lies."""

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

LIBC: Final = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS: Final = 0x2_0000
MS_BIND: Final = 0x1000
MS_PRIVATE_REC: Final = 0x4_4000
OTHERS_SEARCH: Final = 0o001


def closed_above() -> Path | None:
    """The highest directory above the interpreter that others may not enter."""
    base = Path(sys.base_prefix).resolve()
    closed = [
        parent for parent in (base, *base.parents) if not parent.stat().st_mode & OTHERS_SEARCH
    ]
    return closed[-1] if closed else None


def open_to_everybody() -> None:
    """In a mount namespace of the calling process, put an open directory in the way's place.
    Raises OSError where the machine lets nobody do that."""
    top = closed_above()
    if top is None:
        return
    base = Path(sys.base_prefix).resolve()
    if LIBC.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", None, MS_PRIVATE_REC, None)
    kept = tempfile.mkdtemp()
    _mount(str(base), kept, None, MS_BIND, None)
    _mount("none", str(top), "tmpfs", 0, "mode=755")
    base.mkdir(parents=True)
    _mount(kept, str(base), None, MS_BIND, None)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, data)]
    if LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}")
