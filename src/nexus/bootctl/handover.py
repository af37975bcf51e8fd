"""What the loader and the init that it starts tell each other.

    loader --SlotBoot--> init --exit code, and what it left in the boot memory--> loader

Both may be of different releases: the loader of the device, init out of the slot.
"""

from enum import StrEnum, unique
from typing import Annotated, Final

import msgspec

from nexus.abi import BOOT_MEMORY_SIZE_MAX, SERVICE_NAME_SIZE_MAX

EXIT_REBOOT: Final = 3  # somebody asked for a reboot: the loader chooses again
EXIT_SLOT_FAILED: Final = 4  # the trial of the slot failed; the cause is in the boot memory
EXIT_ENDED: Final = 5  # somebody wished its end, and not every service ended cleanly: stay down
EXIT_STOPPED: Final = 6  # the same, and every one did; 0 is what an init says that has no verdict

SET_NAME_SIZE_MAX: Final = 48  # characters of a set's name
SET_DIGEST_SIZE: Final = 64  # characters of a SHA-256 in hexadecimal
FAILED_REASON_SIZE_MAX: Final = 32  # characters
FAILED_DETAIL_SIZE_MAX: Final = 200  # characters of a sentence for people
TRACE_SIZE: Final = 32  # characters of a trace id in hexadecimal
SPAN_MAX: Final = 2**63 - 1  # ns; what a signed 64-bit clock can count

_Slot = Annotated[str, msgspec.Meta(pattern="^[ab]$", max_length=1)]
_Version = Annotated[int, msgspec.Meta(ge=0)]  # 64 bits: msgspec bounds no more than 63
_Count = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
_Span = Annotated[int, msgspec.Meta(ge=0, le=SPAN_MAX)]


class SlotBoot(msgspec.Struct, frozen=True, kw_only=True):
    """Which slot is booted, the set in it, and whether that is a trial.

    `attempt` counts the boots of this trial from 1 and is 0 without one; a trial that is not
    committed `deadline` ns after the start has failed. `snapshot` is the state's snapshot of before
    the switch, 0 without one; with `restore` the state goes back to it before it is served.
    """

    slot: _Slot
    version: _Version
    name: Annotated[str, msgspec.Meta(max_length=SET_NAME_SIZE_MAX)]
    digest: Annotated[
        str, msgspec.Meta(min_length=SET_DIGEST_SIZE, max_length=SET_DIGEST_SIZE)
    ]  # SHA-256 of the set file
    trial: bool
    attempt: _Count = 0
    deadline: _Span = 0
    snapshot: _Count = 0
    restore: bool = False


@unique
class TrialReason(StrEnum):
    """Why init takes a trial for failed; a loader may meet words of a later init's."""

    NOT_READY = "not ready"  # a service was not ready by its readiness deadline
    CRASHED = "crashed"  # a service ended more often than a trial allows
    UNHEALTHY = "unhealthy"  # a service that had been well said that it is not
    HUNG = "hung"  # a service that had been well answered no more, or too late
    DEADLINE = "deadline"  # the deadline of the trial passed before its commit was durable


class TrialFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a trial failed, as init judged it: its last word to the loader.

    `boot` is init's own number of that boot, `at` ns since its start; `trace` is the trace id that
    init's questions of that boot carry. `service` is empty where none is to blame;
    `reason` is a TrialReason.
    """

    slot: _Slot
    version: _Version
    attempt: _Count
    boot: _Count
    at: _Span
    trace: Annotated[str, msgspec.Meta(max_length=TRACE_SIZE)]
    service: Annotated[str, msgspec.Meta(max_length=SERVICE_NAME_SIZE_MAX)]
    reason: Annotated[str, msgspec.Meta(max_length=FAILED_REASON_SIZE_MAX)]
    detail: Annotated[str, msgspec.Meta(max_length=FAILED_DETAIL_SIZE_MAX)]


class _Memory(msgspec.Struct, frozen=True):
    """Of a boot memory what concerns the loader; the rest is init's own."""

    trial: TrialFailure | None = None


def read_failure(memory: bytes) -> TrialFailure | None:
    """The failed trial that a boot memory tells of; None if it tells of none, or cannot be read.

    *Bounds*: BOOT_MEMORY_SIZE_MAX bytes.
    """
    if not memory or len(memory) > BOOT_MEMORY_SIZE_MAX:
        return None
    try:
        return msgspec.json.decode(memory, type=_Memory).trial
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a page nests deeply enough
        return None
