"""Which system set this very process imported its code from.

Whoever unpacks a set puts a module `nexus_set` beside the package: VERSION, NAME and DIGEST of the
set. It counts only if it lies beside the very package that runs here, so that code of one slot
never answers with the stamp of another. Outside of a slot there is none.
"""

import importlib
from typing import Final, NamedTuple

import nexus

MODULE: Final = "nexus_set"


class Stamp(NamedTuple):
    """A system set: its version, its name for people, the SHA-256 of its file in hexadecimal."""

    version: int
    name: str
    digest: str


UNSTAMPED: Final = Stamp(0, "", "")


def read_stamp() -> Stamp:
    """The stamp beside this package, UNSTAMPED if there is none."""
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError:
        return UNSTAMPED
    beside, _, _ = str(nexus.__file__).removesuffix("/__init__.py").rpartition("/")
    if str(module.__file__).rpartition("/")[0] != beside:
        return UNSTAMPED
    return Stamp(module.VERSION, module.NAME, module.DIGEST)


STAMP: Final = read_stamp()
"""Read when the process imports the runtime; a service that is forked has it from init."""
