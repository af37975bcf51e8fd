"""init's memory from boot to boot: how many there were, and when one that keeps crashing is safe.

    boot: unstable + 1, stored before the first service starts
      -- `stable` without an exceeded group --> unstable = 0
      -- orderly shutdown before that -------> what it was before this boot
      -- anything else ----------------------> stays counted
    a boot on trial is counted by the tries of its slot, and not here: a bad set must not lead the
    good one into safe mode; its commit makes it stable
    unstable >= safe_after at the next start: safe mode, until LeaveSafeMode

The kernel stores the bytes as a whole or not at all. What cannot be read counts as nothing, and
what cannot be stored is said and counted: memory never stops init.
"""

from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from nexus.abi import (
    BOOT_MEMORY_SIZE_MAX,
    SERVICE_NAME_SIZE_MAX,
    AbiError,
    BootMemoryRead,
    BootMemoryReplace,
    Entropy,
    Nanos,
    Status,
)
from nexus.bootctl.handover import TrialFailure
from nexus.protocols.init import BOOT_ID_SIZE, REASON_SIZE_MAX, REASON_TEXT_SIZE_MAX

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

VERSION: Final = 1  # of the stored form
ENDS_MAX: Final = 12  # unexpected ends that are kept; in ASCII they fit at their longest
STORE_PAUSE: Final = Nanos(1_000_000_000)  # ns; a crash loop costs at most one write a second
COUNT_MAX: Final = 0xFFFF_FFFF

_Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An end that nobody asked for: which service, in which boot, and how."""

    service: Annotated[str, msgspec.Meta(max_length=SERVICE_NAME_SIZE_MAX)]
    boot: _Count
    reason: Annotated[str, msgspec.Meta(max_length=REASON_SIZE_MAX)]
    code: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    signal: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]


class Memory(msgspec.Struct, kw_only=True):
    """What is stored, as JSON. What the init of another slot knows besides is dropped."""

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)] = VERSION
    boots: _Count = 0
    unstable: _Count = 0  # boots in a row that did not become stable, this one included
    why: Annotated[str, msgspec.Meta(max_length=REASON_TEXT_SIZE_MAX)] = ""  # of safe mode
    ends: Annotated[list[End], msgspec.Meta(max_length=ENDS_MAX)] = []
    trial: TrialFailure | None = None  # of the latest boot, for the loader


def decode_memory(data: bytes) -> Memory:
    """The memory in `data`. Raises msgspec.DecodeError for anything else."""
    try:
        return msgspec.json.decode(data, type=Memory)
    except UnicodeDecodeError as error:  # msgspec passes this one on as it is
        raise msgspec.DecodeError(f"text that is no UTF-8: {error}") from error
    except RecursionError as error:  # in a field of another init's
        raise msgspec.DecodeError(f"too deep: {error}") from error


def encode_memory(memory: Memory) -> bytes:
    """The memory as it is stored: at most BOOT_MEMORY_SIZE_MAX bytes.

    Every field is bounded in characters, and a character has up to six bytes as JSON. What does
    not fit goes in this order: the oldest ends, then the end of `why`.
    """
    kept = memory
    while len(data := msgspec.json.encode(kept)) > BOOT_MEMORY_SIZE_MAX:
        if kept.ends:
            kept = msgspec.structs.replace(kept, ends=kept.ends[1:])
        else:
            kept = msgspec.structs.replace(kept, why=kept.why[: len(kept.why) // 2])
    return data


class BootMemory:
    """The memory of this boot, and when it is to be stored."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._memory = Memory()
        self._before = 0  # unstable boots in a row before this one
        self._is_kept = True  # until the kernel says that this run has no place for it
        self._stable_at: Nanos | None = None
        self._store_at: Nanos | None = None
        self.failed = 0  # writes that did not succeed
        self.boot_id = bytes(BOOT_ID_SIZE)  # until `begin` has drawn it

    @property
    def boots(self) -> int:
        """Boots with this memory, this one included."""
        return self._memory.boots

    @property
    def boot(self) -> int:
        """The number of this boot: 0 for the first with this memory, and without a memory."""
        return max(0, self._memory.boots - 1)

    @property
    def unstable(self) -> int:
        """Boots in a row that did not become stable, as it is stored now."""
        return self._memory.unstable

    @property
    def ends(self) -> list[list[object]]:
        """The last unexpected ends, as evidence: service, boot, reason, code, signal."""
        return [list(msgspec.structs.astuple(end)) for end in self._memory.ends]

    async def begin(self) -> str:
        """Read, count this boot as unstable, store. Why it must be a safe one, or ""."""
        self.boot_id = await Entropy(BOOT_ID_SIZE)
        await self._read()
        memory = self._memory
        memory.boots = min(memory.boots + 1, COUNT_MAX)
        memory.trial = None
        self._before = memory.unstable
        if self._init.trial.is_counted:
            await self._store()
            return ""
        safe_after = self._init.plan.safe_after
        if safe_after and memory.unstable >= safe_after:
            memory.why = memory.why or f"{memory.unstable} boots in a row did not become stable"
            await self._store()
            return memory.why
        memory.unstable = min(memory.unstable + 1, COUNT_MAX)
        self._stable_at = Nanos(self._init.now + self._init.plan.stable)
        await self._store()
        return ""

    async def _read(self) -> None:
        try:
            data = await BootMemoryRead()
        except AbiError as error:
            self._is_kept = error.status is not Status.UNSUPPORTED
            if self._is_kept:
                await self._init.say("init: boot memory not read", status=error.status.name)
            return
        if not data:
            return
        try:
            self._memory = decode_memory(data)
        except msgspec.DecodeError as error:
            await self._init.say(
                "init: boot memory not understood", size=len(data), error=str(error)[:200]
            )

    async def _store(self) -> None:
        self._store_at = None
        if not self._is_kept:
            return
        try:
            await BootMemoryReplace(encode_memory(self._memory))
        except AbiError as error:
            self.failed += 1
            await self._init.say("init: boot memory not stored", status=error.status.name)

    def on_end(self, service: str, reason: str, code: int, signal: int) -> None:
        """An instance ended unexpectedly: remembered, and stored soon."""
        ends = [*self._memory.ends, End(service, self.boots, reason, code, signal)]
        self._memory.ends = ends[-ENDS_MAX:]
        if self._store_at is None:
            self._store_at = Nanos(self._init.now + STORE_PAUSE)

    async def on_exceeded(self, why: str) -> None:
        """A group ended more often than it may: this boot is not stable, whatever follows."""
        self._stable_at = None
        self._memory.unstable = max(1, self._memory.unstable)
        self._memory.why = why[:REASON_TEXT_SIZE_MAX]
        await self._store()

    async def on_left(self) -> None:
        """Safe mode is left: this boot counts as the first that has to become stable."""
        self._memory.why = ""
        self._memory.ends = []
        self._memory.unstable = 1
        self._before = 0
        self._stable_at = Nanos(self._init.now + self._init.plan.stable)
        await self._store()

    async def on_trial_failed(self, failure: TrialFailure) -> None:
        """The trial failed: the loader finds it, whatever comes next."""
        self._memory.trial = failure
        await self._store()

    async def on_committed(self) -> None:
        """The trial is over and went well: that is as stable as a boot gets."""
        self._before = self._memory.unstable = 0
        self._memory.why = ""
        await self._store()

    async def on_orderly_end(self) -> None:
        """The system was shut down as somebody wished: that is no crash."""
        if self._stable_at is not None:
            self._memory.unstable = self._before
        await self._store()

    def next_time(self) -> Nanos | None:
        """When the boot becomes stable, or the memory is to be stored."""
        times = (self._stable_at, self._store_at)
        return min((time for time in times if time is not None), default=None)

    async def on_time(self) -> None:
        """Do what is due."""
        now, heard = self._init.now, self._init.hearing.until
        if self._stable_at is not None and heard >= self._stable_at:
            self._stable_at = None
            self._before = self._memory.unstable = 0
            self._memory.why = ""
            await self._store()
        elif self._store_at is not None and now >= self._store_at:
            await self._store()
