"""logd: the bounded journal of the system, read by id and only with the right to.

Owns the journal and the senders' accounts, which are lost with it. Trusts the kernel's word about a
sender and nothing in a record; what could be mistaken for the end of a record or a line is escaped
when the record is taken in. Never refuses a good record for want of room, never waits for anybody
but policyd, and for that under the caller's deadline.
"""

import json
from typing import Final, Protocol, assert_never

from nexus.abi import AbiError, ConsoleWrite
from nexus.protocols.logd import (
    LOG_READ,
    PROTOCOL,
    Append,
    Appended,
    GetStats,
    LogdRequest,
    LogdStatus,
    Query,
    Records,
    Stats,
)
from nexus.runtime import Call, Refusal
from nexus.runtime.program import Context, program_of
from nexus.services.logd.checks import claims_identity, is_over_limit
from nexus.services.logd.config import Settings
from nexus.services.logd.journal import Journal
from nexus.services.logd.senders import Row, Senders

JOURNAL_TARGET: Final = "journal"  # what log.read is asked for; there is one


class Gate(Protocol):
    """What logd needs of runtime.authority.Authority."""

    async def require(self, call: Call, right: str, target: str = "") -> None:
        """Raises the refusal of a caller that may not."""


class Logd:
    """Serves nexus.protocols.logd."""

    def __init__(self, settings: Settings, authority: Gate) -> None:
        self._authority = authority
        self._journal = Journal(settings.records, settings.size_bytes)
        self._senders = Senders(settings.core_ids, settings.core_rate)
        self._denied = 0
        self._told: set[LogdStatus] = set()  # refusals that the console knows of

    async def handle(self, call: Call, request: LogdRequest) -> Appended | Records | Stats:
        """The reply; a refused record is accounted for before its sender hears of it."""
        match request:
            case Append():
                return await self._append(call, request)
            case Query():
                return await self._query(call, request)
            case GetStats():
                return self._stats()
            case _:
                assert_never(request)

    def facts(self) -> dict[str, int]:
        """The size of the ring, and what only grows; what is in it now is told by GetStats."""
        journal = self._journal
        return {
            "capacity_records": journal.records_max,
            "capacity_size": journal.size_max,
            "accepted_total": journal.total,
            "dropped_total": journal.dropped,
            "denied_total": self._denied,
        }

    async def _append(self, call: Call, request: Append) -> Appended:
        row = self._senders.heard(call.sender.service)
        refusal = self._refusal_of(call, request, row)
        if refusal is not None:
            row.on_refused(refusal)
            await self._tell(call, refusal)
            raise call.refuse(refusal)
        row.on_accepted()
        record = self._journal.append(call.sender, request, row, call.now)
        return Appended(record, self._journal.dropped)

    def _refusal_of(self, call: Call, request: Append, row: Row) -> LogdStatus | None:
        """Why this is no record of the journal, in the order of the protocol."""
        if self._claims_identity(call, request):
            return LogdStatus.INVALID_ARGS
        if self._is_over_limit(request):
            return LogdStatus.OVER_LIMIT
        if row.is_over_rate(call.now):
            return LogdStatus.RATE_LIMITED
        return None

    async def _query(self, call: Call, request: Query) -> Records:
        try:
            await self._authority.require(call, LOG_READ, JOURNAL_TARGET)
        except Refusal:
            self._denied += 1
            raise
        journal = self._journal
        page = journal.page(request)
        return Records(page.next, journal.oldest, journal.total, journal.dropped, page.records)

    def _stats(self) -> Stats:
        journal = self._journal
        totals = self._senders.totals()
        rows = self._senders.rows()
        return Stats(
            total=journal.total,
            dropped=journal.dropped,
            capacity_records=journal.records_max,
            capacity_size=journal.size_max,
            used_records=len(journal),
            used_size=journal.size,
            invalid_args=totals.invalid_args,
            over_limit=totals.over_limit,
            rate_limited=totals.rate_limited,
            denied=self._denied,
            senders=len(self._senders),
            rows=[row.told() for row in rows],
        )

    async def _tell(self, call: Call, status: LogdStatus) -> None:
        """Say on the console, once per reason, that a record was refused; a full one, next time."""
        if status in self._told:
            return
        reason = status.name.lower()
        evidence = {
            "sender": f"0x{call.sender.service:016x}",
            "reason": reason,
            "count": self._count_of(status),
        }
        try:
            await ConsoleWrite(f"logd: reject {reason}", json.dumps(evidence).encode())
        except AbiError:
            return
        self._told.add(status)

    def _count_of(self, status: LogdStatus) -> int:
        """How often a record was refused for this reason, by anybody."""
        totals = self._senders.totals()
        match status:
            case LogdStatus.INVALID_ARGS:
                return totals.invalid_args
            case LogdStatus.OVER_LIMIT:
                return totals.over_limit
            case LogdStatus.RATE_LIMITED:
                return totals.rate_limited

    # What follows decides by what a ladder row breaks; each is small for that.

    def _claims_identity(self, call: Call, request: Append) -> bool:
        """Whether the payload says who sends it."""
        return claims_identity(request, is_core=self._senders.is_core(call.sender.service))

    def _is_over_limit(self, request: Append) -> bool:
        """Whether it is larger than a record may be."""
        return is_over_limit(request)


def made(context: Context) -> Logd:
    """logd as the system file wants it."""
    return Logd(context.settings_as(Settings), context.authority)


main: Final = program_of(made, PROTOCOL)
