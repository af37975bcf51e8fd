"""Hostile programs that can be executed in an interpreter of their own: named by their entry."""

import os
import random  # noqa: TID251 (what a service has of it is what is tested)
from functools import partial
from typing import Final

from nexus.abi import BootImage
from nexus.kernel.linux.native import PR_SET_PDEATHSIG
from nexus.testing.conformance.steps import take, tell
from nexus.testing.rig import Main
from tests.attack.hostile import LIBC, errno_of, hoard, reporting_back

READABLE: Final = "/etc/passwd"  # by everybody, so that only a wall refuses it
IMPORTABLE: Final = "/dev/urandom"  # by everybody, and by an interpreter while it imports


def paths(_boot: BootImage, _told: object) -> dict[str, int]:
    """The errnos of attempts to open paths; the last is one that an import may read."""
    return {
        "read": errno_of(partial(os.open, READABLE, os.O_RDONLY)),
        "list": errno_of(partial(os.listdir, "/")),
        "importable": errno_of(partial(os.open, IMPORTABLE, os.O_RDONLY)),
    }


opens_paths: Final = reporting_back(paths)
hoards: Final = reporting_back(hoard)


async def spins(boot: BootImage) -> None:
    """Says that it runs, and then asks Linux for nothing any more."""
    await tell(boot, b"spinning")
    while True:
        pass


def unhitched(_word: str) -> Main:
    """A maker that, while it is imported, asks not to die with init."""
    assert LIBC.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0) == 0
    return spins


async def draws(boot: BootImage) -> None:
    """Tells a number of the generator that Python seeds when it starts, and waits for a word."""
    await tell(boot, b"%d" % random.getrandbits(64))
    await take(boot.endpoint)
