"""Is what stands in a slot the set that was signed? Looked at in small steps.

    HASHING --digest is the signed one--> READING --every byte fits the manifest--> done
       |                                     '--a rule is broken--> HASHING: whose fault is it?
       '--another digest--> WRONG_DIGEST

Nothing of a file is parsed before its digest is known to be the signed one: either the pieces were
hashed as they came, or the slot is hashed first. What is compared in the end was read back from
the slot: that it gives the very bytes that were hashed is seen by their CRC-32C, and every chunk by
its own SHA-256 besides. A second SHA-256 of the whole would add a third to a stage; the loader
takes one before each boot.
"""

from enum import Enum
from hashlib import sha256
from typing import Final

from nexus.drivers import DeviceFault
from nexus.drivers.crc import extend
from nexus.protocols.updated import UpdatedStatus
from nexus.services.updated.faults import Declined, device_failed
from nexus.services.updated.kept import KeptTransfer
from nexus.services.updated.source import WINDOW_SIZE, SlotSource
from nexus.sets import Known, Manifest, Pass, SetRefused, Verified

READ_STEPS: Final = 4  # chunks of 256 KiB in one step: a few milliseconds, and a probe is answered


class Phase(Enum):
    """What the next step does."""

    HASHING = "hashing"
    READING = "reading"


class Verification:
    """Of one transfer. After `step` has raised there is no next one."""

    def __init__(self, source: SlotSource, transfer: KeptTransfer, *, known: Known | None) -> None:
        """`known` is of the pieces as they came, and its SHA-256 is the signed one."""
        self._source = source
        self._transfer = transfer
        self._phase = Phase.HASHING if known is None else Phase.READING
        self._hash = sha256()
        self._crc = 0
        self._offset = 0
        self._read_back = known is None  # the slot itself gave the signed digest
        self._pass = Pass(source, known=known)
        self._refused: SetRefused | None = None

    @property
    def done(self) -> int:
        """Bytes of the file that the present phase has looked at."""
        return self._offset if self._phase is Phase.HASHING else self._pass.done

    async def step(self) -> Manifest | None:
        """Go on; the manifest when everything is as it should be. Raises Declined."""
        try:
            if self._phase is Phase.HASHING:
                await self._hash_on()
                return None
            return await self._read_on()
        except DeviceFault as fault:
            raise device_failed("the slot cannot be read", fault) from fault

    async def _hash_on(self) -> None:
        data = await self._source.read_at(self._offset, WINDOW_SIZE)
        self._hash.update(data)
        self._crc = extend(self._crc, data)
        self._offset += len(data)
        if self._offset < self._source.size:
            return
        self._check_digest(self._hash.digest())
        if self._refused is not None:
            raise self._bad(self._refused)
        self._pass = Pass(self._source, known=Known(sha256=self._hash.digest(), crc=self._crc))
        self._phase = Phase.READING

    async def _read_on(self) -> Manifest | None:
        try:
            verified = await self._read_some()
        except SetRefused as refused:
            if self._read_back:
                raise self._bad(refused) from refused
            self._refused = refused
            self._phase = Phase.HASHING
            return None
        if verified is None:
            return None
        self._check_digest(verified.sha256)
        return verified.manifest

    async def _read_some(self) -> Verified | None:
        verified: Verified | None = None
        for _ in range(READ_STEPS):
            verified = verified or await self._pass.step()
        return verified

    def _check_digest(self, found: bytes) -> None:
        if found != self._transfer.digest:
            raise wrong_digest(found, self._transfer.digest)

    def _bad(self, refused: SetRefused) -> Declined:
        return Declined(UpdatedStatus.BAD_SET, str(refused))


def wrong_digest(found: bytes, signed: bytes) -> Declined:
    """The file is not the one that was signed."""
    return Declined(
        UpdatedStatus.WRONG_DIGEST,
        f"the file has SHA-256 {found.hex()[:16]}..., signed was {signed.hex()[:16]}...",
    )
