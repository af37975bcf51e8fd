"""updated's settings in the system file, and what the base system below the slots has."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

DISTRIBUTIONS_MAX: Final = 1024  # of one base system; more are not looked at
DIST_INFO: Final = ".dist-info"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.updated.settings].

    `development_keys` has the device take updates that are signed with keys for development.
    """

    development_keys: bool = False


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _installed() -> dict[str, str]:
    """Version by normalised name (PEP 503), as this interpreter finds them.

    Both are in the name of a distribution's folder ("Recording installed projects"). To parse what
    lies in it, as importlib.metadata does, was a sixth of this import where 57 are installed.
    """
    found: dict[str, str] = {}
    for folder in map(Path, sys.path):
        try:
            names = sorted(each.name for each in folder.iterdir())
        except OSError:  # an archive, or nothing, or not ours to read
            continue
        for each in names:
            if len(found) < DISTRIBUTIONS_MAX and each.endswith(DIST_INFO):
                name, _, version = each.removesuffix(DIST_INFO).rpartition("-")
                _ = found.setdefault(name.lower().replace("_", "-").replace(".", "-"), version)
    return found


PYTHON: Final = _python()
DISTRIBUTIONS: Final[Mapping[str, str]] = _installed()
"""Read when the program is imported: afterwards the sandbox lets nothing be looked for."""
