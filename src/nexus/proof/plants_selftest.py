"""Saboteurs of the rungs that selftest-client climbs: 56-76 and 142-144."""

import importlib
import time
from functools import partial
from typing import Any, Final

import msgspec

from nexus.abi import (
    INIT_NAME,
    MESSAGE_SIZE_MAX,
    AbiError,
    ConsoleWrite,
    Message,
    Nanos,
    Pid,
    QosClass,
    Sender,
    ServiceId,
    Slot,
    Status,
    service_id,
)
from nexus.init.desk import Desk
from nexus.init.record import Record
from nexus.ipc import correlate, exchange
from nexus.ipc.outcome import NotFound, Refused, RouteRetryOutcome
from nexus.ipc.route import RouteAttempt
from nexus.kernel.core import qos
from nexus.kernel.core.qos import QosReason
from nexus.kernel.linux.driver import Driver
from nexus.kernel.linux.kernel import LinuxKernel
from nexus.kernel.linux.objects import Endpoint, OwnerLink, Vmo
from nexus.kernel.sim import kernel as sim_kernel
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.heap import Heap
from nexus.kernel.sim.ipc import Ipc
from nexus.kernel.sim.objects import Entry, Link, Task
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.init import InitStatus, ServiceRecord
from nexus.protocols.interactive import PROTOCOL as INTERACTIVE
from nexus.protocols.interactive import RegisterFor
from nexus.protocols.ladder import SELFTEST, Ground, Rung
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.testsvc import Hold
from nexus.protocols.timed import Whoami
from nexus.runtime import Call, Server
from nexus.services.selftest.kernel_rungs import VMO_SIZE
from nexus.services.timed import service as timed_service
from nexus.services.timed.service import Timed
from nexus.wire import NONCE_OFFSET, Codec, RemoteProtocolError, encode

BOTH: Final = frozenset(Ground)
SIM: Final = frozenset({Ground.SIM})
LINUX: Final = frozenset({Ground.LINUX, Ground.VM})
LATE: Final = Nanos(20_000_000)  # ns; twenty times what a rung accepts
LONG_PAST: Final = 500_000_000  # ns; half of what rung 59 uses
QUIET: Final = 60_000_000  # ns; longer than a call of rung 72 may take
NOBODY: Final = Sender(ServiceId(0), Pid(0), 0, QosClass.NORMAL)
OTHER_WAITER: Final = "demo.interactive"


def _unknown_name_found() -> None:
    """#56: a name nobody has leads to timed."""

    def find(desk: Desk, name: str) -> Any:
        return original(desk, name) or original(desk, "timed")

    original = replace(Desk, "find", find)


def _last_byte_lost_sim() -> None:
    """#57."""

    def copy_in(data: bytes | bytearray) -> bytes:
        return bytes(data[:-1] if len(data) == MESSAGE_SIZE_MAX else data)

    _ = replace(Ipc, "copy_in", staticmethod(copy_in))


def _last_byte_lost_linux() -> None:
    """#57."""

    def own(driver: Driver, *arguments: Any) -> OwnerLink:
        link: OwnerLink = original(driver, *arguments)
        recvmsg = link.recvmsg

        def cutting(*sizes: int) -> Any:
            data, *rest = recvmsg(*sizes)
            return (data[:-1] if len(data) == MESSAGE_SIZE_MAX else data, *rest)

        link.recvmsg = cutting
        return link

    original = replace(Driver, "own", own)


def _nonce_off_by_one() -> None:
    """#58: the server that selftest runs on an endpoint of its own."""

    async def send(server: Server, slot: Slot, frame: bytes, **options: Any) -> bool:
        if server.boot.name == SELFTEST and server.boot.endpoint != FIRST_ENDPOINT:
            nonce = (frame[NONCE_OFFSET] + 1) & 0xFF
            frame = frame[:NONCE_OFFSET] + bytes((nonce,)) + frame[NONCE_OFFSET + 1 :]
        sent: bool = await original(server, slot, frame, **options)
        return sent

    original = replace(Server, "_send", send)


FIRST_ENDPOINT: Final = Slot(1)


def _past_deadline_is_empty_sim() -> None:
    """#59: deadlines that were past when the receive began."""

    def empty_status(ipc: Ipc, deadline: Nanos) -> Status:
        if deadline < ipc.clock.now - LONG_PAST:
            return Status.QUEUE_EMPTY
        status: Status = original(ipc, deadline)
        return status

    original = replace(Ipc, "empty_status", empty_status)


def _past_deadline_is_empty_linux() -> None:
    """#59: as on sim."""

    def expired(driver: Driver, deadline: int) -> AbiError:
        if deadline < time.monotonic_ns() - LONG_PAST:
            return AbiError(Status.QUEUE_EMPTY)
        error: AbiError = original(driver, deadline)
        return error

    original = replace(Driver, "_expired", expired)


def _expired_overlooked_sim() -> None:
    """#60: nobody looks at an expired waiter until something else happens, here 20 ms later."""

    def expire(clock: Clock, task: Task) -> None:
        clock.late = lambda: LATE
        original(clock, task)

    original = replace(Clock, "expire", expire)


def _expired_overlooked_linux() -> None:
    """#60: as on sim; the timer is set too late, and so is every short wait."""
    arm = Driver._arm  # noqa: SLF001 (saboteurs break what is private)

    def late(driver: Driver, deadline: int) -> None:
        arm(driver, deadline + LATE)

    _ = replace(Driver, "_arm", late)


def _pid_from_payload() -> None:
    """#61."""

    def pid_of(_timed: Timed, _call: Call, request: Whoami) -> int:
        return request.claimed_pid

    _ = replace(Timed, "_pid_of", pid_of)


def _id_from_payload() -> None:
    """#62."""

    def service_of(_timed: Timed, call: Call, request: Whoami) -> int:
        name = request.claimed_name
        return service_id(name) if name == INIT_NAME else call.sender.service

    _ = replace(Timed, "_service_of", service_of)


def _unknown_sender_is_nobody_sim() -> None:
    """#63."""

    def make_lookup(ipc: Ipc) -> Any:
        lookup = original(ipc)
        return lambda pid: lookup(pid) or NOBODY

    original = replace(Ipc, "make_lookup", make_lookup)


def _unknown_sender_is_nobody_linux() -> None:
    """#63."""

    def sender_of(driver: Driver, link: OwnerLink, credentials: bytes) -> Sender:
        return original(driver, link, credentials) or NOBODY

    original = replace(Driver, "_sender_of", sender_of)


def _first_holder_stamped_sim() -> None:
    """#64."""

    def stamp(ipc: Ipc, task: Task, link: Link) -> Pid:
        maker = ipc.identities.get(link.maker_pid)
        derived = link.parent is not None and maker is not None and maker.service != INIT
        return (
            link.maker_pid if derived and _leads_to_timed(ipc, link) else original(ipc, task, link)
        )

    original = replace(Ipc, "stamp", stamp)


def _first_holder_stamped_linux() -> None:
    """#64."""

    def sender_of(driver: Driver, link: OwnerLink, credentials: bytes) -> Sender | None:
        maker = link.maker
        if maker is not None and maker.service != INIT and driver.me.service == TIMED_ID:
            return maker
        stamped: Sender | None = original(driver, link, credentials)
        return stamped

    original = replace(Driver, "_sender_of", sender_of)


INIT: Final = service_id(INIT_NAME)
TIMED_ID: Final = service_id("timed")  # whose link rung 64 gives away; 116 gives logd's


def _leads_to_timed(ipc: Ipc, link: Link) -> bool:
    owner = ipc.identities.get(link.endpoint.owner.pid)
    return owner is not None and owner.service == TIMED_ID


def _moved_cap_kept() -> None:
    """#65: timed keeps the link of a one-shot reply."""

    async def send(server: Server, slot: Slot, frame: bytes, **options: Any) -> bool:
        if server.boot.name == "timed":
            _ = options.pop("close", None)
        sent: bool = await original(server, slot, frame, **options)
        return sent

    original = replace(Server, "_send", send)


def _slot_emptied_first_sim() -> None:
    """#66."""

    def send(
        ipc: Ipc, task: Task, slot: Slot, data: bytes | bytearray, move: Slot | None = None
    ) -> None:
        try:
            original(ipc, task, slot, data, move)
        except AbiError:
            if move is not None:
                ipc.close_slot(task, move)
            raise

    original = replace(Ipc, "send", send)


def _slot_emptied_first_linux() -> None:
    """#66."""

    def send_moving(
        driver: Driver, link: Any, data: bytes | bytearray, move: Slot, deadline: int
    ) -> None:
        try:
            original(driver, link, data, move, deadline)
        except AbiError:
            driver.drop(move)
            raise

    original = replace(Driver, "_send_moving", send_moving)


def _taken_before_the_table_sim() -> None:
    """#67: the message is gone by the time the table turns out to be full."""

    def check_take(ipc: Ipc, task: Task, entry: Entry) -> None:
        try:
            original(ipc, task, entry)
        except AbiError:
            for endpoint in task.sources:
                for link in endpoint.links.values():
                    if link.queue and link.queue[0] is entry:
                        _ = link.queue.popleft()
                        link.queued_size -= len(entry[0])
            raise

    original = replace(Ipc, "check_take", check_take)


def _taken_before_the_table_linux() -> None:
    """#67: as on sim."""

    def fits(driver: Driver, link: OwnerLink, size_max: int) -> bool:
        held: bool = original(driver, link, size_max)
        if not held:
            _ = link.sock.recv(MESSAGE_SIZE_MAX)
        return held

    original = replace(Driver, "_fits", fits)


def _second_waiter_sleeps_on_sim() -> None:
    """#68: of the two tasks that wait, the second learns nothing."""

    def listens(ipc: Ipc, owner: Task, link: Link) -> bool:
        second = owner.name == OTHER_WAITER and link.closed and owner.filter is link
        return False if second else original(ipc, owner, link)

    original = replace(Ipc, "listens", listens)


def _second_waiter_sleeps_on_linux() -> None:
    """#68: as on sim; the end of a link that is waited for alone is not noticed."""

    def receive_one(driver: Driver, link: OwnerLink, deadline: int) -> Message:
        try:
            message: Message = original(driver, link, deadline)
        except AbiError:
            if driver.me.service == service_id(OTHER_WAITER):
                driver.idle_until(deadline)
                raise AbiError(Status.TIMED_OUT) from None
            raise
        return message

    original = replace(Driver, "_receive_one", receive_one)


def _answers_in_order_of_arrival() -> None:
    """#69: the first answer to a Hold goes to the oldest Hold, whatever its nonce."""
    reply = TESTSVC.codecs[Hold].reply_prefix
    in_flight: dict[int, Any] = {}

    def nonce_of(data: bytes) -> int:
        if data[: len(reply)] == reply:
            holds = [n for n, p in in_flight.items() if p.codec.request_type is Hold]
            if holds:
                return holds[0]
        nonce: int = original(data)
        return nonce

    def on_sent(correlator: correlate.Correlator, pending: correlate.Pending) -> None:
        nonlocal in_flight
        in_flight = correlator.in_flight
        original_sent(correlator, pending)

    original_sent = replace(correlate.Correlator, "on_sent", on_sent)
    original = replace(correlate, "nonce_of", nonce_of)
    _ = replace(exchange, "nonce_of", nonce_of)


def _denied_is_not_found() -> None:
    """#70."""

    def on_refused(attempt: RouteAttempt, refused: Refused) -> RouteRetryOutcome | Refused:
        if refused.status is InitStatus.ROUTE_DENIED:
            return NotFound()
        outcome: RouteRetryOutcome | Refused = original(attempt, refused)
        return outcome

    original = replace(RouteAttempt, "on_refused", on_refused)


def _generation_kept() -> None:
    """#71: in init's table a restarted timed is still the first one."""

    def service(desk: Desk, record: Record) -> ServiceRecord:
        row: ServiceRecord = original(desk, record)
        return msgspec.structs.replace(row, generation=1) if record.name == "timed" else row

    original = replace(Desk, "_service", service)


def _one_queue_for_all() -> None:
    """#72: what one client has queued counts against all."""

    def room(ipc: Ipc, link: Link, size: int) -> Status | None:
        if sum(len(each.queue) for each in link.endpoint.links.values()) >= link.depth:
            return Status.QUEUE_FULL
        refusal: Status | None = original(ipc, link, size)
        return refusal

    original = replace(Ipc, "room", room)


def _others_behind_the_flood() -> None:
    """#72: on linux no queue is shared, so timed makes the others wait: as long as demo.testsvc
    keeps sending, it looks at nothing else, as one queue for all would have it."""
    flooder = service_id("demo.testsvc")

    def init(endpoint: Endpoint, *arguments: Any) -> None:
        original(endpoint, *arguments)
        poll = endpoint.poll
        quiet_from = 0

        def polled(timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
            nonlocal quiet_from
            events: list[tuple[int, int]] = poll(timeout, maxevents)
            now = time.monotonic_ns()
            flood = [event for event in events if is_flooders(event[0])]
            if flood:
                quiet_from = now + QUIET
            return flood if now < quiet_from else events

        def is_flooders(descriptor: int) -> bool:
            link = endpoint.links.get(descriptor)
            return link is not None and any(
                sender.service == flooder for sender in link.known.values()
            )

        endpoint.poll = polled

    original = replace(Endpoint, "__init__", init)


def _extra_elements_ignored() -> None:
    """#73: a RegisterFor with an element too many is cut to size."""
    codec: Codec = INTERACTIVE.codecs[RegisterFor]
    strict = codec.decode_request

    def lenient(body: bytes) -> Any:
        try:
            return strict(body)
        except RemoteProtocolError:
            try:
                elements = msgspec.msgpack.decode(body)
            except msgspec.DecodeError as error:
                raise RemoteProtocolError(str(error)) from error
            if not isinstance(elements, list) or len(elements) < 2 or encode(elements) != body:
                raise
            return strict(encode(elements[:1]))

    _ = replace(codec, "decode_request", lenient)


def _escalation(original: Any) -> Any:
    """Let a task raise its own class."""

    def decide(*arguments: Any) -> QosReason:
        reason: QosReason = original(*arguments)
        return QosReason.APPLIED if reason is QosReason.UNAUTHORIZED_ESCALATION else reason

    return decide


def _own_class_raised_sim() -> None:
    """#75."""
    _ = replace(sim_kernel, "decide", _escalation(qos.decide))


def _own_class_raised_linux() -> None:
    """#75."""
    _ = replace(LinuxKernel, "_decide_qos", _escalation(LinuxKernel._decide_qos))  # noqa: SLF001


def _rounded_down() -> None:
    """#76."""

    def coalesce(deadline: Nanos, window: Nanos) -> Nanos:
        return Nanos(deadline // window * window) if window else deadline

    _ = replace(timed_service, "coalesce", coalesce)


def _length_not_rounded(owner: Any, method: str) -> None:
    """#142: that rung's VMO. policyd's policy travels in one too, and is another rung's."""

    def length(holder: Any, size: int) -> int:
        rounded: int = original(holder, size)
        return size if size == VMO_SIZE else rounded

    original = replace(owner, method, length)


def _vmo_stays_sim() -> None:
    """#143: the memory of a closed VMO is not given back."""

    def vmo_size(heap: Heap, task: Task) -> int:
        size: int = original(heap, task)
        kept[task.pid] = max(size, kept.get(task.pid, 0))
        return kept[task.pid]

    kept: dict[int, int] = {}
    original = replace(Heap, "vmo_size", vmo_size)


def _vmo_stays_linux() -> None:
    """#143: as on sim."""

    def close(_driver: Driver, _vmo: Vmo) -> None:
        """Keep the descriptor and the account."""

    _ = replace(Driver, "_close_vmo", close)


def _fail_line_written() -> None:
    """#144: somebody writes a FAIL line just before the end."""

    async def report(row: Rung, evidence: Any) -> None:
        if row.number == END:
            await ConsoleWrite("selftest-client: FAIL, planted")
        await original(row, evidence)

    original = replace(importlib.import_module("nexus.services.selftest.main"), "report", report)


END: Final = 144

SABOTEURS: Final = (
    Saboteur(rung=56, grounds=BOTH, plant=_unknown_name_found),
    Saboteur(rung=57, grounds=SIM, plant=_last_byte_lost_sim),
    Saboteur(rung=57, grounds=LINUX, plant=_last_byte_lost_linux),
    Saboteur(rung=58, grounds=BOTH, plant=_nonce_off_by_one),
    Saboteur(rung=59, grounds=SIM, plant=_past_deadline_is_empty_sim),
    Saboteur(rung=59, grounds=LINUX, plant=_past_deadline_is_empty_linux),
    Saboteur(rung=60, grounds=SIM, plant=_expired_overlooked_sim),
    Saboteur(rung=60, grounds=LINUX, plant=_expired_overlooked_linux),
    Saboteur(rung=61, grounds=BOTH, plant=_pid_from_payload),
    Saboteur(rung=62, grounds=BOTH, plant=_id_from_payload),
    Saboteur(rung=63, grounds=SIM, plant=_unknown_sender_is_nobody_sim),
    Saboteur(rung=63, grounds=LINUX, plant=_unknown_sender_is_nobody_linux),
    Saboteur(rung=64, grounds=SIM, plant=_first_holder_stamped_sim),
    Saboteur(rung=64, grounds=LINUX, plant=_first_holder_stamped_linux),
    Saboteur(rung=65, grounds=BOTH, plant=_moved_cap_kept),
    Saboteur(rung=66, grounds=SIM, plant=_slot_emptied_first_sim),
    Saboteur(rung=66, grounds=LINUX, plant=_slot_emptied_first_linux),
    Saboteur(rung=67, grounds=SIM, plant=_taken_before_the_table_sim),
    Saboteur(rung=67, grounds=LINUX, plant=_taken_before_the_table_linux),
    Saboteur(rung=68, grounds=SIM, plant=_second_waiter_sleeps_on_sim),
    Saboteur(rung=68, grounds=LINUX, plant=_second_waiter_sleeps_on_linux),
    Saboteur(rung=69, grounds=BOTH, plant=_answers_in_order_of_arrival),
    Saboteur(rung=70, grounds=BOTH, plant=_denied_is_not_found),
    Saboteur(rung=71, grounds=BOTH, plant=_generation_kept),
    Saboteur(rung=72, grounds=SIM, plant=_one_queue_for_all),
    Saboteur(rung=72, grounds=LINUX, plant=_others_behind_the_flood),
    Saboteur(rung=73, grounds=BOTH, plant=_extra_elements_ignored),
    Saboteur(rung=75, grounds=SIM, plant=_own_class_raised_sim),
    Saboteur(rung=75, grounds=LINUX, plant=_own_class_raised_linux),
    Saboteur(rung=76, grounds=BOTH, plant=_rounded_down),
    Saboteur(rung=142, grounds=SIM, plant=partial(_length_not_rounded, Heap, "vmo_length")),
    Saboteur(rung=142, grounds=LINUX, plant=partial(_length_not_rounded, Driver, "_vmo_length")),
    Saboteur(rung=143, grounds=SIM, plant=_vmo_stays_sim),
    Saboteur(rung=143, grounds=LINUX, plant=_vmo_stays_linux),
    Saboteur(rung=144, grounds=BOTH, plant=_fail_line_written),
)
