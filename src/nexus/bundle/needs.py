"""What a set needs of the system below the slots: the interpreter and third-party distributions.

They are the base system's: compiled for its processor, installed and updated with it (ADR 21). A
set says which ones it was built with, and a device compares (nexus.sets.unmet) before it uses it.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from nexus.sets import Base

DEVICE_DISTRIBUTIONS: Final = (
    "backports.zstd",
    "cffi",
    "cryptography",
    "google-crc32c",
    "h11",
    "msgspec",
    "securesystemslib",
    "tuf",
)
"""What the modules that a device imports import in turn: `just dep-gate` compares it with them.
Nexus's other dependencies belong to commands of a development machine."""


class NotInstalled(Exception):
    """A distribution that a set needs is not installed where it is built."""


def normalised(name: str) -> str:
    """The name of a distribution as registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def base_of(more: Iterable[str] = ()) -> Base:
    """This interpreter, and the versions installed here of what a device needs. `more` are
    distributions that programs of the system's own import."""
    found = {}
    for name in (*DEVICE_DISTRIBUTIONS, *more):
        try:
            found[normalised(name)] = version(name)
        except PackageNotFoundError as error:
            raise NotInstalled(f"{name} is not installed here, and the set needs it") from error
    return Base(
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        distributions=dict(sorted(found.items())),
    )
