"""updated's settings in the system file, and what the base system below the slots has."""

import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from typing import Final

import msgspec

DISTRIBUTIONS_MAX: Final = 1024  # of one base system; more are not looked at


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.updated.settings].

    `development_keys` has the device take updates that are signed with keys for development.
    """

    development_keys: bool = False


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _installed() -> dict[str, str]:
    """Version by normalised name (PEP 503), as this interpreter finds them."""
    found: dict[str, str] = {}
    for each in distributions():
        name = each.name.lower().replace("_", "-").replace(".", "-")
        _ = found.setdefault(name, each.version)
        if len(found) >= DISTRIBUTIONS_MAX:
            break
    return found


PYTHON: Final = _python()
DISTRIBUTIONS: Final[Mapping[str, str]] = _installed()
"""Read when the program is imported: afterwards the sandbox lets nothing be looked for."""
