"""The changes that wait for one device write, and who waits for them.

empty --staged--> gathering --nobody else asks, or full--> written: everybody is answered
                                              --fault----> nobody's write is known
"""

from typing import Final, NamedTuple

from nexus.runtime import Deferred
from nexus.services.statefsd.clients import Client

GROUP_MAX: Final = 64  # requests answered together; more would make the first wait for the last
GROUP_SIZE_MAX: Final = 256 * 1024  # bytes of keys and values; a device write of a few ms


class Waiting(NamedTuple):
    """A request whose change is staged, and the number of the change."""

    deferred: Deferred
    client: Client
    sequence: int
    repeated: bool


class Group:
    """What is gathered now."""

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self.durable = False  # somebody waits for it to survive a power cut
        self._keys: set[bytes] = set()
        self._size = 0

    def __bool__(self) -> bool:
        return bool(self.waiting) or bool(self._keys)

    @property
    def is_full(self) -> bool:
        """Whether it is time to write, whoever else asks."""
        return len(self.waiting) >= GROUP_MAX or self._size >= GROUP_SIZE_MAX

    def on_staged(self, keys: list[bytes], size: int, *, durable: bool) -> None:
        """Changes were staged."""
        self._keys.update(keys)
        self._size += size
        self.durable = self.durable or durable

    def touches(self, key: bytes) -> bool:
        """Whether a change of this key is not written yet."""
        return key in self._keys

    def take(self) -> list[Waiting]:
        """Everybody who waits; the next group begins."""
        waiting, self.waiting = self.waiting, []
        self._keys = set()
        self._size = 0
        self.durable = False
        return waiting
