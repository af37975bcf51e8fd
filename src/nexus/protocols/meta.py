"""meta protocol: what every service answers on its endpoint, by its runtime.

Bind makes a link answerable: the reply to a request goes over the SEND link that the sender
moved with Bind. A request that carries a capability its class does not declare is answered over
that capability once, and the capability is closed.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import Nanos
from nexus.wire import I64, U16, U32, U64, Blob, List, Message, Protocol, Request, Text

DIGEST_SIZE: Final = 64  # characters of a SHA-256 in hexadecimal
SENDERS_MAX: Final = 64  # senders counted one by one; the others share the row with service 0
STATUS_ROWS_MAX: Final = 64  # different statuses one service may refuse with
FACTS_MAX: Final = 32  # named numbers one service may report
FACT_NAME_SIZE_MAX: Final = 32  # characters
FACT_NAME: Final = r"^[a-z][a-z0-9_]*\Z"  # it stands in evidence as it is: nothing to escape
SETTINGS_SIZE_MAX: Final = 2048  # bytes; a control link has room for it
PROBE_SIZE_MAX: Final = 48  # characters that a log probe carries
PROBE_PATTERN: Final = r"^[a-z0-9.-]+\Z"
PROBES_MAX: Final = 16  # log probes of one instance: they are for a proof, and no source of records
COUNTERS_MAX: Final = 32  # fields of abi.TaskCounters (21), with room for new ones


HEALTH_ANSWER: Final = Nanos(2_000_000_000)  # ns to answer a probe, where nothing else is said


class MetaStatus(IntEnum):
    """Why a runtime refuses. The numbers are wire format and are never reused."""

    NOT_READY = 16  # the service is up and does not yet do its work
    BAD_SETTINGS = 17  # the new settings are not what it takes; the old ones are in force
    NEEDS_RESTART = 18  # it cannot change these settings while it runs


class Bound(Message):
    """The link is answerable; the generation of the instance that says so."""

    generation: Annotated[int, U32()]


class Bind(Request[Bound], op=1, idempotent=True, moves=True):
    """Answer requests of this link over the SEND link that moves with this message.

    *Refuses*: BUSY when the service already keeps as many links as it may.
    """


class Healthy(Message):
    """The service does its work. `digest` is the SHA-256 of the argument it was started with.

    `served` and `expired` count this instance's requests: all, and those whose deadline had passed
    before their turn came. init's watchdog compares them from probe to probe. `set_version` and
    `set_digest` are of the system set that the answering process imported its code from; 0 and
    "" in one that runs outside of a slot.
    """

    generation: Annotated[int, U32()]
    digest: Annotated[str, Text(size_min=DIGEST_SIZE, size_max=DIGEST_SIZE)]
    served: Annotated[int, U64()]
    expired: Annotated[int, U64()]
    set_version: Annotated[int, U64()]
    set_digest: Annotated[str, Text(size_max=DIGEST_SIZE)]


class Health(Request[Healthy], op=2, idempotent=True, refuses=MetaStatus):
    """Does it work? *Refuses*: NOT_READY."""


class StatusCount(Message):
    """How many replies carried this status."""

    status: Annotated[int, U16()]
    count: Annotated[int, U64()]


class SenderCount(Message):
    """How many requests the kernel stamped with this service; 0 is all further senders."""

    service: Annotated[int, U64()]
    requests: Annotated[int, U64()]


class Fact(Message):
    """A number a service reports about itself."""

    name: Annotated[str, Text(size_min=1, size_max=FACT_NAME_SIZE_MAX, pattern=FACT_NAME)]
    value: Annotated[int, I64()]


class ServiceStatus(Message):
    """The runtime's own account, in rows ordered by number or name.

    `requests` are messages taken from the queue; `replies` were queued to their callers and
    `lost` were not, because the caller does not read or is gone. `malformed` and `expired` count
    refusals before the handler; `unanswerable` are requests on a link that was never bound.
    `counters` are the kernel's TaskCounters of this task, in the order of their declaration.
    """

    generation: Annotated[int, U32()]
    requests: Annotated[int, U64()]
    replies: Annotated[int, U64()]
    lost: Annotated[int, U64()]
    malformed: Annotated[int, U64()]
    expired: Annotated[int, U64()]
    unanswerable: Annotated[int, U64()]
    refusals: Annotated[list[StatusCount], List(count_max=STATUS_ROWS_MAX)]
    senders: Annotated[list[SenderCount], List(count_max=SENDERS_MAX + 1)]
    facts: Annotated[list[Fact], List(count_max=FACTS_MAX)]
    counters: Annotated[list[Annotated[int, U64()]], List(count_max=COUNTERS_MAX)]


class GetStatus(Request[ServiceStatus], op=3, idempotent=True):
    """The counters of this instance."""


class Stopping(Message):
    """The service leaves its loop now."""


class Stop(Request[Stopping], op=4, idempotent=True):
    """End with exit code 0. *Refuses*: DENIED to everybody but init."""


class Configured(Message):
    """The new settings are in force."""


class Configure(Request[Configured], op=5, idempotent=True, refuses=MetaStatus):
    """Use these settings from now on: MessagePack of the table [service.NAME.settings].

    *Refuses*: DENIED to everybody but init, BAD_SETTINGS, NEEDS_RESTART.
    """

    settings: Annotated[bytes, Blob(size_min=1, size_max=SETTINGS_SIZE_MAX)]


class Probed(Message):
    """The record is written into the service's own log."""


class LogProbe(Request[Probed], op=6, idempotent=False):
    """Write one record with this token into your own log, as any other: level INFO, field `token`.

    *Refuses*: BUSY without a log, and from the PROBES_MAX + 1st probe of this instance on.
    """

    token: Annotated[str, Text(size_min=1, size_max=PROBE_SIZE_MAX, pattern=PROBE_PATTERN)]


MetaRequest: TypeAlias = Bind | Health | GetStatus | Stop | Configure | LogProbe
PROTOCOL: Final = Protocol(
    "meta", number=0, version=4, requests=(Bind, Health, GetStatus, Stop, Configure, LogProbe)
)
