"""Saboteurs of policy, journal, sandbox and watchdog, as `SABOTEURS` below lists them."""

from functools import partial
from typing import Any, Final

from nexus.abi import INIT_NAME, Message, Now, ServiceId, Slot, service_id
from nexus.init.desk import Desk, Grant
from nexus.init.record import Record
from nexus.init.watch import Watch
from nexus.kernel.linux.harden import Hardening
from nexus.kernel.linux.native import PR_SET_DUMPABLE, prctl
from nexus.log import logger
from nexus.proof.plants_init import missing, ready_late, withheld
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.init import Route
from nexus.protocols.ladder import SELFTEST, Ground
from nexus.protocols.logd import FIELDS_SIZE_MAX, Append
from nexus.protocols.policyd import Decision, Reason, Verdict
from nexus.runtime import Server
from nexus.services.logd import journal
from nexus.services.logd.journal import Journal
from nexus.services.logd.reading import Page, Wanted
from nexus.services.logd.senders import Row
from nexus.services.logd.service import Logd
from nexus.services.policyd.audit import Audit
from nexus.services.policyd.judge import Judge
from nexus.services.policyd.service import Policyd
from nexus.services.selftest.policy_rungs import (
    BAD_NONCE,
    FOREIGN_RIGHT,
    MMIO_RIGHT,
    PROBE_RIGHT,
    SPOOFED,
)
from nexus.wire import ReplyStatus, answer, encode, nonce_of

BOTH: Final = frozenset(Ground)
POLICYD: Final = "policyd"
NOBODY: Final = 1  # a service id, pid and generation that nobody has
SECOND_TIME: Final = 2  # after the planned link; the rung's own
LOGD: Final = "logd"
CLIENT: Final = service_id(SELFTEST)


def _policy_says(name: str, right: str, *, held: bool) -> None:
    """The loaded policy gives a right that it should not, or lacks one that it should give."""
    subject = service_id(name)

    def has(judge: Judge, who: ServiceId, what: str, target: str) -> bool:
        if (who, what) == (subject, right):
            return held
        found: bool = original(judge, who, what, target)
        return found

    original = replace(Judge, "_has", has)


def route_to_logd(name: str) -> None:
    """For this name init hands out a link to logd, the second time the client asks for it."""
    seen = 0

    async def route(desk: Desk, asker: Record, request: Route) -> Grant:
        nonlocal seen
        if asker.name == SELFTEST and request.name == name:
            seen += 1
            if seen == SECOND_TIME:
                request = Route(LOGD)
        grant: Grant = await original(desk, asker, request)
        return grant

    original = replace(Desk, "_route", route)


def _requester_believed() -> None:
    """#79."""
    _ = replace(Judge, "_requester", lambda _judge, _sender, requester: service_id(requester))


def _malformed_is_deny() -> None:
    """#80: the frame of that rung; others belong to #73."""

    def refusal(server: Server, message: Message, status: Any, request: Any = None) -> bytearray:
        frame: bytearray = original(server, message, status, request)
        if status is ReplyStatus.MALFORMED and nonce_of(message.data) == BAD_NONCE:
            denied = Decision(Verdict.DENY, Reason.MALFORMED, 1, 1)
            return answer(message.data, ReplyStatus.OK, encode(denied))
        return frame

    original = replace(Server, "_refusal", refusal)


def _audit_names_init() -> None:
    """#139: the subject of init's own questions becomes init."""

    def put(audit: Audit, fields: dict[str, str], *rest: Any, **options: Any) -> None:
        if fields["action"] == MMIO_RIGHT:
            fields = {**fields, "subject": INIT_NAME}
        original(audit, fields, *rest, **options)

    original = replace(Audit, "put", put)


def _claim_stored() -> None:
    """#111."""
    _ = replace(Logd, "_claims_identity", lambda _logd, _call, _request: False)


def _one_byte_more() -> None:
    """#112: a bound of 513."""

    def is_over_limit(logd: Logd, request: Append) -> bool:
        if journal.fields_size(request.fields) == FIELDS_SIZE_MAX + 1:
            return False
        found: bool = original(logd, request)
        return found

    original = replace(Logd, "_is_over_limit", is_over_limit)


def _one_limit_for_all() -> None:
    """#113: policyd's records meet the limit as soon as the client's do."""
    limited: list[Row] = []

    def is_over_rate(row: Row, now: Any) -> bool:
        over: bool = original(row, now)
        if row.service == CLIENT:
            limited[:] = [row] if over else []
        return over or bool(limited and original(limited[0], now))

    original = replace(Row, "is_over_rate", is_over_rate)


def _page_skips() -> None:
    """#116: what does not fit on the page is left out, and the page goes on behind it."""

    def page(kept: Journal, since: int, count: int, wanted: Wanted) -> Page:
        found: Page = original(kept, since, count, wanted)
        of_all = wanted.is_from(NOBODY, NOBODY, NOBODY)  # rung 81 reads policyd's alone
        if of_all and len(found.records) < count and found.next <= kept.last:
            return found._replace(next=found.next + 1)
        return found

    original = replace(Journal, "page", page)


def _clone_stays() -> None:
    """#117: the clone that a slot was probed with is not closed, the first time."""
    kept: list[Slot] = []

    def close(slot: Slot) -> Any:
        if kept:
            return original(slot)
        kept.append(slot)
        return Now()  # a trap that closes nothing

    original = replace(logger, "CapClose", close)


def _only_exits_watched() -> None:
    """#96: its peer is not asked again after the first answer. policyd is: rung 81 holds it."""

    async def probe(watch: Watch, record: Record) -> None:
        if record.name != SPOOFED or record.well_since is None:
            await original(watch, record)
        else:
            record.probe_again = None

    original = replace(Watch, "probe", probe)


def _stays_dumpable() -> None:
    """#95. Where root has changed the ids Linux has done it already: it is undone."""
    _ = replace(Hardening, "_not_dumpable", lambda _hardening: prctl(PR_SET_DUMPABLE, 1))


SABOTEURS: Final = (
    Saboteur(rung=6, grounds=BOTH, plant=partial(missing, POLICYD)),
    Saboteur(rung=7, grounds=BOTH, plant=partial(withheld, POLICYD)),
    Saboteur(rung=8, grounds=BOTH, plant=partial(ready_late, Policyd)),
    Saboteur(rung=9, grounds=BOTH, plant=partial(missing, LOGD)),
    Saboteur(rung=10, grounds=BOTH, plant=partial(withheld, LOGD)),
    Saboteur(rung=30, grounds=BOTH, plant=partial(ready_late, Logd)),
    Saboteur(rung=48, grounds=BOTH, plant=partial(_policy_says, "timed", MMIO_RIGHT, held=True)),
    Saboteur(rung=53, grounds=BOTH, plant=partial(route_to_logd, POLICYD)),
    Saboteur(rung=77, grounds=BOTH, plant=partial(_policy_says, SELFTEST, PROBE_RIGHT, held=False)),
    Saboteur(
        rung=78, grounds=BOTH, plant=partial(_policy_says, SELFTEST, FOREIGN_RIGHT, held=True)
    ),
    Saboteur(rung=79, grounds=BOTH, plant=_requester_believed),
    Saboteur(rung=80, grounds=BOTH, plant=_malformed_is_deny),
    Saboteur(rung=95, grounds=frozenset({Ground.LINUX, Ground.VM}), plant=_stays_dumpable),
    Saboteur(rung=96, grounds=BOTH, plant=_only_exits_watched),
    Saboteur(rung=111, grounds=BOTH, plant=_claim_stored),
    Saboteur(rung=112, grounds=BOTH, plant=_one_byte_more),
    Saboteur(rung=113, grounds=BOTH, plant=_one_limit_for_all),
    Saboteur(rung=116, grounds=BOTH, plant=_page_skips),
    Saboteur(rung=117, grounds=BOTH, plant=_clone_stays),
    Saboteur(rung=139, grounds=BOTH, plant=_audit_names_init),
)
