"""`nexus state check IMAGE`: a look at the image of a disk or at a device node, which is only read.

What the engine of statefsd says of it, with the limits of the settings' defaults: they refuse
growth, and nothing grows here.
"""

import os
from pathlib import Path
from typing import Any, Final, NamedTuple

from nexus.cli.errors import EXIT_FAILED, EXIT_OK, CommandFailed
from nexus.cli.files import open_input
from nexus.cli.output import say, say_json, say_table
from nexus.drivers import DeviceFault, finished
from nexus.drivers.crc import IS_FAST, SLOW
from nexus.drivers.image import Image
from nexus.protocols.statefsd import ROOT
from nexus.services.statefsd.config import Settings
from nexus.services.statefsd.engine import Damaged, Store, Unopenable

PAGE: Final = 1024  # keys of one look


class Found(NamedTuple):
    """A key: bytes of its value, its sequence, and whether its record is whole."""

    key: bytes
    size: int
    sequence: int
    is_whole: bool


def check(image: Path, *, as_json: bool) -> int:
    """Say what is in an image; EXIT_FAILED if it is no store, or something of it is lost."""
    descriptor = open_input(image, node=True)

    def read_at(offset: int, size: int) -> bytes:
        return os.pread(descriptor, size, offset)

    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if not IS_FAST:
            raise CommandFailed(f"{image} was not looked at: {SLOW}")
        store = finished(Store.open(Image(read_at, size), Settings().limits))
        found = _all(store)
    except (Unopenable, DeviceFault) as error:
        if as_json:
            say_json({"image": str(image), "opens": False, "reason": str(error)})
        else:
            say(f"{image} does not open: {error}")
        return EXIT_FAILED
    finally:
        os.close(descriptor)
    if as_json:
        say_json(_document(image, store, found))
    else:
        _print(image, store, found)
    return EXIT_FAILED if store.lost_count else EXIT_OK


def _all(store: Store) -> list[Found]:
    """Every key of a store, in order."""
    found: list[Found] = []
    after, more = b"", True
    while more:
        keys, more = store.keys(ROOT.encode(), after, PAGE, lambda _: True)
        found += [_find(store, key) for key in keys]
        after = keys[-1] if keys else after
    return found


def _find(store: Store, key: bytes) -> Found:
    try:
        entry = finished(store.get(key))
    except Damaged as damaged:
        return Found(key, 0, damaged.lost.sequence, is_whole=False)
    assert entry is not None, "a key that is listed has a value"
    return Found(key, len(entry.value), entry.sequence, is_whole=True)


def _document(image: Path, store: Store, found: list[Found]) -> dict[str, Any]:
    return {
        "image": str(image),
        "opens": True,
        "epoch": store.epoch,
        "sequence": store.sequence,
        "keys": [
            {
                "key": each.key.decode(errors="backslashreplace"),
                "size": each.size,
                "sequence": each.sequence,
                "whole": each.is_whole,
            }
            for each in found
        ],
        "used": store.used,
        "capacity": store.capacity,
        "compactions": store.compactions,
        "unfinished": store.unfinished,
        "quarantined": store.lost_count,
        "lost": [
            {
                "key": each.key.decode(errors="backslashreplace"),
                "offset": each.offset,
                "sequence": each.sequence,
            }
            for each in store.lost
        ],
    }


def _print(image: Path, store: Store, found: list[Found]) -> None:
    say(
        f"{image} opens: epoch {store.epoch}, sequence {store.sequence}, "
        f"{store.used} of {store.capacity} bytes used, compactions {store.compactions}"
    )
    if store.unfinished:
        say(f"changes cut short by a power cut, never answered, and dropped: {store.unfinished}")
    say(f"keys: {len(found)}, quarantined: {store.lost_count}")
    if found:
        say_table(
            ("KEY", "SIZE", "SEQUENCE"),
            [
                (
                    each.key.decode(errors="backslashreplace"),
                    str(each.size) if each.is_whole else "damaged",
                    str(each.sequence) if each.sequence else "-",
                )
                for each in found
            ],
        )
    for each in store.lost:
        name = each.key.decode(errors="backslashreplace") or "a record whose key cannot be told"
        say(f"lost: {name}, at byte {each.offset}, sequence {each.sequence or 'not known'}")
