"""Nonces: they correlate a reply with its request. They authenticate nobody."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

NONCE_MASK: Final = (1 << 64) - 1


class NonceGen:
    """Counts up from a given start, wraps at 64 bits, and leaves out what is in flight."""

    __slots__ = ("_in_flight", "_upcoming")

    def __init__(self, start: int, in_flight: Container[int]) -> None:
        assert 0 <= start <= NONCE_MASK
        self._upcoming = start
        self._in_flight = in_flight

    def take(self) -> int:
        """A nonce that no call in flight has."""
        nonce = self._upcoming
        self._upcoming = nonce + 1
        if nonce in self._in_flight or nonce > NONCE_MASK:
            return self._take_another()
        return nonce

    def _take_another(self) -> int:
        """The rare case: the next number is taken, or beyond 64 bits."""
        nonce = (self._upcoming - 1) & NONCE_MASK
        while nonce in self._in_flight:
            nonce = (nonce + 1) & NONCE_MASK
        self._upcoming = nonce + 1
        return nonce

    def age(self, nonce: int) -> int:
        """How many nonces ago `nonce` was the next one; 1 is the latest."""
        return (self._upcoming - nonce) & NONCE_MASK


@dataclass(frozen=True, slots=True)
class NonceMismatchBudget:
    """How many replies that answer something else one wait may meet."""

    count_max: int

    def exceeded_by(self, mismatches: int) -> bool:
        """Whether that many are too many: the 65th of a budget of 64 is."""
        return mismatches > self.count_max
