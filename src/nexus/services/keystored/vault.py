"""Records sealed under a wrapping key that the kernel keeps; and the device key among them.

    closed --secret read, its keys known------------> open
    closed --no secret, no record-------------------> blank: the first write makes the key
    closed --no secret, records---------------------> closed, CORRUPTED: never a new key
    blank --entropy drawn, secret replaced----------> open
    open --secret replaced by old and new-----------> rotating: both open, the new one seals
    rotating --every record sealed with the new one,
               secret replaced by the new one-------> open

A cut between any two steps leaves what the next `open` understands: a rotation is finished by it,
or by `settle`. A secret whose replacement failed is read again, so that what is believed here is
what the kernel keeps. What was read may be what a replacement that was cut off left, and not yet
safe from a power cut: an instance stores it once more before it seals anything with it. Everything
raises Unusable; nothing waits longer than `until`.
"""

from contextlib import suppress
from typing import Final

from nexus.abi import Nanos
from nexus.protocols.keystored import KeystoredStatus
from nexus.protocols.statefsd import BATCH_MAX, BATCH_SIZE_MAX, KEY_SIZE_MAX
from nexus.services.keystored.ed25519 import SEED_SIZE, public_of
from nexus.services.keystored.faults import Unusable, corrupted, unavailable
from nexus.services.keystored.places import Kept, Random, Records
from nexus.services.keystored.sealing import (
    NONCE_PREFIX_SIZE,
    NUMBER_MAX,
    WRAPPING_SIZE,
    Nonces,
    Unsealable,
    Wrapping,
    WrappingKey,
    number_of,
    pack,
    seal,
    unpack,
    unseal,
)
from nexus.services.keystored.secret import Secret

ROOT: Final = b"/state/keystore/"
DEVICE_PATH: Final = ROOT + b"device.signing"
RECORDS_MAX: Final = 4096  # looked at in a rotation; statefsd's quota of the area is below it
CHANGE_OVERHEAD: Final = 8  # bytes of a change's own in a batch
PACKED_MAX: Final = BATCH_SIZE_MAX - 8  # bytes of a batch's changes

assert KEY_SIZE_MAX + 1024 + CHANGE_OVERHEAD < PACKED_MAX, "the largest record fits a batch"


class Vault:
    """Sealed records, and the device key. One request at a time."""

    def __init__(self, records: Records, random: Random, kept: Kept) -> None:
        self._records = records
        self._random = random
        self._kept = kept
        self._wrapping: Wrapping | None = None
        self._firm = False  # the kernel has told this instance that it keeps `_wrapping`
        self._nonces: Nonces | None = None
        self.opened = False  # statefsd has answered, and it is known how it stands with the keys
        self.keygens = 0
        self.rotations = 0  # finished, in this instance's life
        self.sealed = 0  # records that the rotation which is not finished has gone through
        self._sealed_to = b""  # the last of them: it goes on behind it
        self.damaged = 0  # how often a rotation could not open a record

    @property
    def number(self) -> int:
        """Of the wrapping key in force; 0 when there is none, or none is known."""
        return 0 if self._wrapping is None else self._wrapping.current.number

    @property
    def has_device_key(self) -> bool:
        """Whether a device key was made, whether or not it can be opened."""
        return self._wrapping is not None and self._wrapping.device is not None

    @property
    def rotating(self) -> bool:
        """Whether a rotation is to be finished."""
        return self._wrapping is not None and self._wrapping.rotating

    # ------------------------------------------------------------------ opening

    async def open(self, until: Nanos) -> Wrapping | None:
        """The wrapping keys; None if there is neither a key nor anything sealed."""
        if self._wrapping is not None:
            return self._wrapping
        blob = await self._kept.read()
        if not blob:
            keys, _ = await self._records.page(ROOT, b"", until)
            self.opened = True
            if keys or await self._records.get(DEVICE_PATH, until) is not None:
                raise corrupted("there are sealed records, and no wrapping key")
            return None
        try:
            wrapping = unpack(blob)
        except Unsealable:
            _ = await self._records.page(ROOT, b"", until)
            self.opened = True
            raise corrupted("the wrapping key's blob is damaged") from None
        try:
            if wrapping.device is None:
                wrapping = await self._marked(wrapping, until)
            else:
                _ = await self._records.page(ROOT, b"", until)
        except Unusable:
            wrapping.wipe()
            raise
        self._wrapping = wrapping
        self.opened = True
        return wrapping

    async def _marked(self, wrapping: Wrapping, until: Nanos) -> Wrapping:
        """As it is; with the device key's mark if a cut came before it was set."""
        try:
            record = await self._records.get(DEVICE_PATH, until)
        except Unusable as fault:
            if fault.status is KeystoredStatus.CORRUPTED:
                return wrapping  # it will be said to who asks for the device key
            raise
        if record is None:
            return wrapping
        with suppress(Unsealable), unseal(wrapping, DEVICE_PATH, record) as seed:
            if len(seed) == SEED_SIZE:
                marked = Wrapping(keys=wrapping.keys, device=public_of(seed))
                await self._kept.replace(pack(marked))
                self._firm = True
                return marked
        return wrapping

    async def prepare(self, until: Nanos) -> None:
        """Make ahead what the first write needs, the wrapping key and a prefix for nonces."""
        _ = await self._ensured(until)
        _ = await self._refill(until)

    async def settle(self, until: Nanos) -> None:
        """Finish a rotation that a cut or a failure left."""
        wrapping = await self.open(until)
        if wrapping is not None and wrapping.rotating:
            _ = await self._finish(await self._ensured(until), until)

    def forget(self) -> None:
        """Overwrite the wrapping keys; the next request reads them again."""
        wrapping, self._wrapping = self._wrapping, None
        self._firm = False
        self._begin_anew()
        if wrapping is not None:
            wrapping.wipe()

    # ------------------------------------------------------------------ records

    async def get(self, path: bytes, until: Nanos) -> Secret | None:
        """The value at `path`."""
        wrapping = await self.open(until)
        record = await self._records.get(path, until)
        if record is None:
            return None
        if wrapping is None:
            raise corrupted("a sealed record, and no wrapping key")
        try:
            return unseal(wrapping, path, record)
        except Unsealable:
            raise corrupted("a record does not open under the wrapping key") from None

    async def put(self, path: bytes, value: bytes | bytearray, until: Nanos) -> None:
        """Seal and write; durable."""
        wrapping = await self._ensured(until)
        nonces = await self._refill(until)
        record = seal(wrapping.current, nonces.take(), path, value)
        await self._records.put({path: record}, until)

    async def delete(self, path: bytes, until: Nanos) -> bool:
        """Drop; whether there was one."""
        _ = await self.open(until)
        return await self._records.delete(path, until)

    async def has_room(self, prefix: bytes, path: bytes, count_max: int, until: Nanos) -> bool:
        """Whether `path` is one of at most `count_max` keys below `prefix`, or can become one."""
        found = await self._listed(prefix, count_max, until)
        return path in found or len(found) < count_max

    async def _listed(self, prefix: bytes, count_max: int, until: Nanos) -> list[bytes]:
        """The keys below `prefix`; if there are more than `count_max`, more than `count_max`."""
        found: list[bytes] = []
        more = True
        while more and len(found) <= count_max:
            keys, more = await self._records.page(prefix, found[-1] if found else b"", until)
            found += keys
            more = more and bool(keys)
        return found

    # ------------------------------------------------------------------ the device key

    async def generate(self, until: Nanos) -> bytes:
        """Make the device key: once, and durable. Its public half."""
        seed = await self.device(until)
        if seed is not None:
            seed.wipe()
            raise Unusable(KeystoredStatus.KEY_EXISTS, "there is a device key")
        wrapping = await self._ensured(until)
        nonces = await self._refill(until)
        with Secret(await self._random.draw(SEED_SIZE, until)) as fresh:
            public = public_of(fresh)
            record = seal(wrapping.current, nonces.take(), DEVICE_PATH, fresh.data)
        await self._records.put({DEVICE_PATH: record}, until)
        self.keygens += 1
        with suppress(Unusable):  # the key is there, and durable; the next `open` sets the mark
            await self._replace(Wrapping(keys=wrapping.keys, device=public))
        return public

    async def device(self, until: Nanos) -> Secret | None:
        """The device key's seed; None only if none was ever made."""
        wrapping = await self.open(until)
        seed = await self.get(DEVICE_PATH, until)
        marked = None if wrapping is None else wrapping.device
        if seed is None:
            if marked is not None:
                raise corrupted("the device key's record is gone")
            return None
        if len(seed) != SEED_SIZE or marked not in (None, public_of(seed)):
            seed.wipe()
            raise corrupted("the device key's record holds another key")
        return seed

    # ------------------------------------------------------------------ wrapping keys

    async def rotate(self, until: Nanos) -> int:
        """Seal everything with a new wrapping key; its number.

        A rotation that was not finished is finished instead: it is the one that was asked for.
        """
        wrapping = await self._ensured(until)
        if not wrapping.rotating:
            seed = await self.device(until)
            if seed is not None:
                seed.wipe()
            _ = await self._refill(until)
            old = wrapping.current
            if old.number >= NUMBER_MAX:
                raise unavailable("no wrapping key has a larger number")
            fresh = await self._fresh(old.number + 1, until)
            wrapping = Wrapping(keys=(old, fresh), device=wrapping.device)
            self._begin_anew()
            await self._replace(wrapping)
        return await self._finish(wrapping, until)

    def _begin_anew(self) -> None:
        """The next rotation goes through all records."""
        self.sealed = 0
        self._sealed_to = b""

    async def _finish(self, wrapping: Wrapping, until: Nanos) -> int:
        """Seal with the new key what is not yet, and then forget the old one.

        What was gone through stays so when the time is over: only keystored writes these records,
        and since the rotation began with the new key.
        """
        current = wrapping.current
        more = True
        while more and self.sealed <= RECORDS_MAX:
            paths, more = await self._records.page(ROOT, self._sealed_to, until)
            await self._seal_page(wrapping, paths, until)
            more = more and bool(paths)
        if self.sealed > RECORDS_MAX:
            self._begin_anew()
            raise unavailable("too many records")
        await self._replace(Wrapping(keys=(current,), device=wrapping.device))
        for key in wrapping.keys[:-1]:
            key.secret.wipe()
        self._begin_anew()
        self.rotations += 1
        return current.number

    async def _seal_page(self, wrapping: Wrapping, paths: list[bytes], until: Nanos) -> None:
        """Seal some records with the new key, in as few batches as hold them."""
        batch: dict[bytes, bytes] = {}
        size = waiting = 0
        before = b""
        for path in paths:
            record = await self._resealed(wrapping, path, until)
            weight = len(path) + len(record) + CHANGE_OVERHEAD
            if batch and (size + weight > PACKED_MAX or len(batch) >= BATCH_MAX):
                await self._records.put(batch, until)
                self._on_sealed(before, waiting)
                batch, size, waiting = {}, 0, 0
            if record:
                batch[path] = record
                size += weight
            before = path
            waiting += 1
        if batch:
            await self._records.put(batch, until)
        self._on_sealed(before, waiting)

    def _on_sealed(self, path: bytes, count: int) -> None:
        """All records up to this one are under the new key."""
        if count:
            self._sealed_to = path
            self.sealed += count

    async def _resealed(self, wrapping: Wrapping, path: bytes, until: Nanos) -> bytes:
        """The record under the new key; b"" if there is nothing to write.

        An entry that no key opens is left as it is. The device key's stops the rotation: with both
        wrapping keys kept, whatever can still be done for it can be done.
        """
        try:
            record = await self._records.get(path, until)
            if record is None or number_of(record) == wrapping.current.number:
                return b""
            nonces = await self._refill(until)
            with unseal(wrapping, path, record) as value:
                return seal(wrapping.current, nonces.take(), path, value.data)
        except Unsealable:
            fault = corrupted("the device key's record does not open")
        except Unusable as raised:
            fault = raised
        if path == DEVICE_PATH or fault.status is not KeystoredStatus.CORRUPTED:
            raise fault
        self.damaged += 1
        return b""

    async def _ensured(self, until: Nanos) -> Wrapping:
        """The wrapping keys, safe to seal with; the first is made here, when nothing is sealed."""
        wrapping = await self.open(until)
        if wrapping is None:
            fresh = await self._fresh(1, until)
            wrapping = Wrapping(keys=(fresh,), device=None)
        if not self._firm:
            await self._replace(wrapping)
        return wrapping

    async def _fresh(self, number: int, until: Nanos) -> WrappingKey:
        key = Secret(await self._random.draw(WRAPPING_SIZE, until))
        return WrappingKey(number=number, secret=key)

    async def _replace(self, wrapping: Wrapping) -> None:
        """Have the kernel keep these; if it does not, what it keeps is what counts."""
        try:
            await self._kept.replace(pack(wrapping))
        except Unusable:
            self.forget()
            raise
        self._wrapping = wrapping
        self._firm = True

    async def _refill(self, until: Nanos) -> Nonces:
        """Nonces that are left, at least for one batch of a record each."""
        if self._nonces is None or self._nonces.spent:
            self._nonces = Nonces(await self._random.draw(NONCE_PREFIX_SIZE, until))
        return self._nonces
