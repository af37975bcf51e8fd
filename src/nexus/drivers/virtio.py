"""A virtio device behind its memory-mapped registers: one queue, one request at a time.

    DOWN --bring_up--> UP --perform--> UP
    DOWN --bring_up refused--> DOWN, FAILED is set
    UP --time-out | a lie | NEEDS_RESET--> DOWN, the device is reset

Only the modern transport (register version 2) with VERSION_1 is driven. Nothing the device writes
is believed: an index, id or length that was not asked for resets it. A request that times out is
lost: the device is reset, and only once it says so is its memory used again. The descriptors of a
request begin where no request before it began, so that a completion that comes late, or twice, does
not pass for the present one (with a queue of one entry only the index tells).

Order of memory accesses: Python has no barriers. Each access here is a call into C of its own, so
no compiler merges, splits (an index is one aligned 16-bit store or load) or moves it; x86 keeps
stores in order and loads in order, and on the simulated bus the device acts inside the access. A
weaker processor may reorder, so that between what is said and the index that says it, both ways,
the status register is read: in a virtual machine that leaves the guest, and everything before it is
done before the machine monitor looks, everything after it is done after (linux.md 10, vm.md 10).

Source: Virtual I/O Device 1.2, 2.1 status, 2.6 features, 2.7 split virtqueues, 3.1 initialisation,
4.2 over MMIO.
"""

import struct
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from nexus.abi import PAGE_SIZE, DmaArea, Nanos, Now, RegisterWindow, SleepUntil
from nexus.drivers.block import DeviceFault, Fault

MAGIC: Final = 0x74726976  # "virt"
VERSION: Final = 2  # the modern register layout; 1 is the legacy one
BACKING: Final = "virtio-mmio"

# Registers (4.2.2).
MAGIC_VALUE: Final = 0x000
VERSION_VALUE: Final = 0x004
DEVICE_ID: Final = 0x008
DEVICE_FEATURES: Final = 0x010
DEVICE_FEATURES_SELECT: Final = 0x014
DRIVER_FEATURES: Final = 0x020
DRIVER_FEATURES_SELECT: Final = 0x024
QUEUE_SELECT: Final = 0x030
QUEUE_COUNT_MAX: Final = 0x034
QUEUE_COUNT: Final = 0x038
QUEUE_READY: Final = 0x044
QUEUE_NOTIFY: Final = 0x050
STATUS: Final = 0x070
QUEUE_DESCRIPTORS: Final = 0x080
QUEUE_DRIVER: Final = 0x090
QUEUE_DEVICE: Final = 0x0A0
CONFIG_GENERATION: Final = 0x0FC
CONFIG: Final = 0x100

# Status bits (2.1).
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64  # the device has lost its way
FAILED: Final = 128
RUNNING: Final = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK  # and nothing else

VERSION_1: Final = 1 << 32  # the feature (6)

# The queue, in the first page of the device's memory (2.7).
ENTRIES_MAX: Final = 32  # descriptors; one for each page of a DmaArea, and a power of two
DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, size, flags, next
DESCRIPTORS_AT: Final = 0
AVAILABLE_AT: Final = ENTRIES_MAX * DESCRIPTOR.size
AVAILABLE_INDEX_AT: Final = AVAILABLE_AT + 2
AVAILABLE_RING_AT: Final = AVAILABLE_AT + 4
AVAILABLE_ENTRY: Final = struct.Struct("<H")  # the first descriptor of a request
USED_AT: Final = 1024
USED_INDEX_AT: Final = USED_AT + 2
USED_RING_AT: Final = USED_AT + 4
USED_ENTRY: Final = struct.Struct("<II")  # first descriptor, bytes written
NEXT: Final = 1  # descriptor flag: there is a next one
DEVICE_WRITES: Final = 2  # descriptor flag: the device writes here
NO_INTERRUPT: Final = 1  # flag of the available ring: we look by ourselves
INDEX_COUNT: Final = 1 << 16  # indexes wrap here

RESET_MAX: Final = Nanos(100_000_000)  # ns for a reset to be done; devices take none we can see
PAUSE_LEAST: Final = Nanos(20_000)  # ns before the second look; a fast disk answers in 100 us
PAUSE_MAX: Final = Nanos(1_000_000)  # ns between looks at a slow device; each doubles the last
CONFIG_READS_MAX: Final = 8  # of a configuration that changes while it is read

assert AVAILABLE_RING_AT + AVAILABLE_ENTRY.size * ENTRIES_MAX + 2 <= USED_AT
assert USED_RING_AT + USED_ENTRY.size * ENTRIES_MAX + 2 <= PAGE_SIZE, "the queue is one page"
assert AVAILABLE_AT % 2 == 0
assert USED_AT % 4 == 0
assert INDEX_COUNT % ENTRIES_MAX == 0, "positions go on where an index wraps"
assert sys.byteorder == "little", "an index is loaded and stored as the processor has it"


class Piece(NamedTuple):
    """Part of a request: `size` bytes at `offset` in one page of the device's memory."""

    page: int
    offset: int
    size: int
    device_writes: bool


class Identity(NamedTuple):
    """What the registers said when the device was brought up, and the features in use."""

    magic: int
    version: int
    device_id: int
    features: int


class Virtio:
    """A device and its queue. Every method that reaches the device raises DeviceFault."""

    def __init__(
        self, window: RegisterWindow, area: DmaArea, device_id: int, wanted: int, *, pieces_max: int
    ) -> None:
        """`wanted` are features used if they are offered, besides VERSION_1. A request has up to
        `pieces_max` pieces, fewer if the device's queue is shorter (`entries`)."""
        assert 1 <= pieces_max <= ENTRIES_MAX
        self._window = window
        self._area = area
        self._device_id = device_id
        self._wanted = wanted
        self._pieces_max = pieces_max
        queue = area.view[:PAGE_SIZE]
        self._queue = queue
        self._available_index = queue[AVAILABLE_INDEX_AT : AVAILABLE_INDEX_AT + 2].cast("H")
        self._used_index = queue[USED_INDEX_AT : USED_INDEX_AT + 2].cast("H")
        self._index = 0  # of both rings, as every request before this one was completed
        self._serial = 0  # of requests since this driver began; never set back by a reset
        self._busy = False
        self.up = False
        self.entries = 0  # of the queue, from the first bring-up on
        self.identity: Identity | None = None  # from the first bring-up on
        self.resets = 0  # of a device that failed

    @property
    def view(self) -> memoryview:
        """The device's memory. The first page is the queue's."""
        return self._area.view

    # ------------------------------------------------------------------ up and down

    async def begin(self, until: Nanos) -> None:
        """Before a request's memory is filled: see that the device is up, and that nothing of an
        earlier request can still reach its memory."""
        assert not self._busy, "one request at a time"
        if not self.up:
            await self.bring_up(until)
        self._check_running()
        if self._used_index[0] != self._index:
            raise self._lie(f"it completed what nobody asked for, index {self._used_index[0]}")

    async def bring_up(self, until: Nanos) -> None:
        """Reset the device and make it ready, in the order of 3.1."""
        self.up = False
        magic, version, device_id = (
            self._window.read(at) for at in (MAGIC_VALUE, VERSION_VALUE, DEVICE_ID)
        )
        self._check_identity(magic, version, device_id)
        await self._reset(until)
        self._window.write(STATUS, ACKNOWLEDGE)
        self._window.write(STATUS, ACKNOWLEDGE | DRIVER)
        features = self._negotiate()
        entries = self._set_queue_up()
        identity = Identity(magic, version, device_id, features)
        if self.identity not in (None, identity) or self.entries not in (0, entries):
            raise self.refuse("it is not what it was before its reset")
        self.identity = identity
        self.entries = entries
        self._window.write(STATUS, RUNNING)
        if self._window.read(STATUS) != RUNNING:
            raise self.refuse("it does not start")
        self.up = True

    def _check_identity(self, magic: int, version: int, device_id: int) -> None:
        """Refuse what is not ours to drive, before anything is written to it."""
        if magic != MAGIC:
            raise DeviceFault(Fault.REFUSED, f"magic {magic:#x} is not {MAGIC:#x}")
        if version != VERSION:
            raise DeviceFault(Fault.REFUSED, f"register version {version} is not {VERSION}")
        if device_id != self._device_id:
            raise DeviceFault(Fault.REFUSED, f"device id {device_id} is not {self._device_id}")

    async def _reset(self, until: Nanos) -> None:
        """Reset, and wait until it is done: only then is the device's memory ours again."""
        self._window.write(STATUS, 0)
        now = await Now()
        done = await self._seen(
            lambda: self._window.read(STATUS) == 0, now, min(until, Nanos(now + RESET_MAX))
        )
        if not done:
            raise DeviceFault(Fault.TIMED_OUT, "it does not finish its reset")
        self._queue[:] = bytes(PAGE_SIZE)
        self._index = 0

    def _negotiate(self) -> int:
        """The features in use; the device has to agree."""
        offered = 0
        for word in (0, 1):
            self._window.write(DEVICE_FEATURES_SELECT, word)
            offered |= self._window.read(DEVICE_FEATURES) << (32 * word)
        if not offered & VERSION_1:
            raise self.refuse("it does not offer VERSION_1")
        features = offered & (VERSION_1 | self._wanted)
        for word in (0, 1):
            self._window.write(DRIVER_FEATURES_SELECT, word)
            self._window.write(DRIVER_FEATURES, (features >> (32 * word)) & 0xFFFF_FFFF)
        self._window.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        if not self._window.read(STATUS) & FEATURES_OK:
            raise self.refuse(f"it does not agree to the features {features:#x}")
        return features

    def _set_queue_up(self) -> int:
        """Give the device its queue; how many entries it has."""
        self._window.write(QUEUE_SELECT, 0)
        if self._window.read(QUEUE_READY):
            raise self.refuse("its queue is in use")
        largest = min(self._window.read(QUEUE_COUNT_MAX), ENTRIES_MAX)
        if not largest:
            raise self.refuse("it has no queue")
        entries = 1 << (largest.bit_length() - 1)  # 2.7: a power of two
        self._window.write(QUEUE_COUNT, entries)
        self._queue[AVAILABLE_AT] = NO_INTERRUPT
        base = self._area.addresses[0]
        for register, offset in (
            (QUEUE_DESCRIPTORS, DESCRIPTORS_AT),
            (QUEUE_DRIVER, AVAILABLE_AT),
            (QUEUE_DEVICE, USED_AT),
        ):
            address = base + offset
            self._window.write(register, address & 0xFFFF_FFFF)
            self._window.write(register + 4, address >> 32)
        self._window.write(QUEUE_READY, 1)
        return entries

    def refuse(self, why: str) -> DeviceFault:
        """Give the device up: it is not one to drive."""
        self.up = False
        self._window.write(STATUS, self._window.read(STATUS) | FAILED)
        return DeviceFault(Fault.REFUSED, why)

    def _drop(self) -> None:
        """Reset a device that failed; it is brought up again before it is next used."""
        self._window.write(STATUS, 0)
        self.up = False
        self.resets += 1

    def _check_running(self) -> None:
        """Raises GONE if the device asks for a reset, was reset, or is there no more."""
        status = self._window.read(STATUS)
        if status != RUNNING:
            self._drop()
            what = "it asks for a reset" if status & NEEDS_RESET else "it does not run any more"
            raise DeviceFault(Fault.GONE, f"{what}, status {status:#x}")

    def _lie(self, what: str) -> DeviceFault:
        """The device said what cannot be: nothing else it said counts."""
        self._drop()
        return DeviceFault(Fault.IO, what)

    # ------------------------------------------------------------------ requests

    async def perform(self, pieces: Sequence[Piece], until: Nanos) -> int:
        """One request, what the device reads before what it writes; how many bytes it wrote.

        `begin` came before. Whatever is raised, the request is not repeated here: whether the
        device did it is not known.
        """
        assert self.up, "begin comes first"
        assert not self._busy, "one request at a time"
        assert 1 <= len(pieces) <= min(self.entries, self._pieces_max), "the queue takes no more"
        self._busy = True
        try:
            return await self._perform(pieces, until)
        finally:
            self._busy = False

    async def _perform(self, pieces: Sequence[Piece], until: Nanos) -> int:
        head = self._submit(pieces)
        done = await self._seen(self._has_answered, await Now(), until)
        self._check_running()  # in any case: reading the status orders what follows
        if not done:
            self._drop()
            raise DeviceFault(Fault.TIMED_OUT)
        return self._take_used(head, sum(piece.size for piece in pieces if piece.device_writes))

    def _submit(self, pieces: Sequence[Piece]) -> int:
        """Tell the device of a request; its first descriptor."""
        head = self._serial % self.entries
        self._serial += 1
        last = len(pieces) - 1
        for number, (page, offset, size, device_writes) in enumerate(pieces):
            assert size > 0
            assert offset + size <= PAGE_SIZE, "pages need not follow one another"
            entry = (head + number) % self.entries
            flags = (DEVICE_WRITES if device_writes else 0) | (NEXT if number < last else 0)
            DESCRIPTOR.pack_into(
                self._queue,
                DESCRIPTORS_AT + entry * DESCRIPTOR.size,
                self._area.addresses[page] + offset,
                size,
                flags,
                (entry + 1) % self.entries if number < last else 0,
            )
        position = AVAILABLE_RING_AT + self._index % self.entries * AVAILABLE_ENTRY.size
        AVAILABLE_ENTRY.pack_into(self._queue, position, head)
        _ = self._window.read(STATUS)  # orders: the request stands before the index says so
        self._available_index[0] = (self._index + 1) % INDEX_COUNT
        self._window.write(QUEUE_NOTIFY, 0)
        return head

    def _has_answered(self) -> bool:
        """Whether there is something to look at: a completion, or a device that gave up."""
        return self._used_index[0] != self._index or self._window.read(STATUS) != RUNNING

    def _take_used(self, head: int, size_max: int) -> int:
        """Check what the device says it did; the bytes it wrote."""
        expected = (self._index + 1) % INDEX_COUNT
        index = self._used_index[0]
        if index != expected:
            raise self._lie(f"its index went from {self._index} to {index}")
        position = USED_RING_AT + self._index % self.entries * USED_ENTRY.size
        entry, size = USED_ENTRY.unpack_from(self._queue, position)
        if entry != head:
            raise self._lie(f"it completed request {entry}, not {head}")
        if size > size_max:
            raise self._lie(f"it says it wrote {size} bytes where there is room for {size_max}")
        self._index = expected
        written: int = size
        return written

    async def _seen(self, test: Callable[[], bool], now: Nanos, until: Nanos) -> bool:
        """Whether `test` comes true before `until`: looked at with growing pauses, at the end once
        more. Nothing wakes us, as we take no interrupts."""
        pause = PAUSE_LEAST
        while not test():
            if now >= until:
                return False
            now = await SleepUntil(min(until, Nanos(now + pause)))
            pause = min(Nanos(2 * pause), PAUSE_MAX)
        return True

    # ------------------------------------------------------------------ configuration

    def config_u64(self, offset: int) -> int:
        """A number of the device's configuration, read while it did not change (2.5.1)."""
        at = CONFIG + offset
        for _ in range(CONFIG_READS_MAX):
            before = self._window.read(CONFIG_GENERATION)
            value = self._window.read(at) | self._window.read(at + 4) << 32
            if self._window.read(CONFIG_GENERATION) == before:
                return value
        raise self.refuse("its configuration does not stand still")


class VirtioDevice:
    """What the drivers of all kinds say of the transport that they drive."""

    backing: Final = BACKING

    def __init__(self, virtio: Virtio) -> None:
        self._virtio = virtio

    @property
    def identity(self) -> Identity:
        """What the registers said, and the features in use."""
        identity = self._virtio.identity
        assert identity is not None, "open comes first"
        return identity

    @property
    def resets(self) -> int:
        """How often the device had to be reset because it failed."""
        return self._virtio.resets
