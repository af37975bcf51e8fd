"""Kernel modules in the order in which they are loaded: each behind those it needs.

A module says itself what it needs, in its section .modinfo: the list that depmod makes is in no
package. Names have underscores, as the kernel shows them.
"""

import lzma
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

MODULE: Final = re.compile(r"(.+)\.ko(\.xz)?")
DEPENDS: Final = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")
SIZE_MAX: Final = 64 * 1024 * 1024  # bytes of a module, unpacked


class Module(NamedTuple):
    """A module as the kernel takes it."""

    name: str
    data: bytes


class MissingModule(Exception):
    """The kernel has no such module; it may be built in."""


def found_in(folder: Path) -> dict[str, Path]:
    """The files of all modules below a folder, by name."""
    return {
        match[1].replace("-", "_"): path
        for path in sorted(folder.rglob("*.ko*"))
        if (match := MODULE.fullmatch(path.name)) is not None
    }


def in_order(wanted: Iterable[str], files: dict[str, Path]) -> list[Module]:
    """These modules and all they need. Raises MissingModule."""
    ordered: dict[str, Module] = {}

    def add(name: str, needed_by: tuple[str, ...]) -> None:
        if name in ordered:
            return
        if name in needed_by:
            raise MissingModule(f"{name} needs itself, by way of {needed_by}")
        if name not in files:
            raise MissingModule(f"no module {name}")
        data = _content(files[name])
        for needed in _needed(data):
            add(needed, (*needed_by, name))
        ordered[name] = Module(name, data)

    for name in wanted:
        add(name.replace("-", "_"), ())
    return list(ordered.values())


def _needed(data: bytes) -> list[str]:
    match = DEPENDS.search(data)
    names = b"" if match is None else match[1]
    return [name.replace("-", "_") for name in names.decode().split(",") if name]


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    if file.suffix == ".xz":
        data = lzma.LZMADecompressor().decompress(data, SIZE_MAX)
    return data
