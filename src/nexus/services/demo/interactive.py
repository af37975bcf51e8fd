"""demo.interactive: a task of class Interactive that uses timed when it is told to.

Owns nothing. It exists so that the proof ladder sees timed treat two classes differently; the
class is its entry's in the system file, and timed learns it from the kernel. It also waits on
demo.testsvc over a link it is given, so that a death has a second witness.
"""

from typing import Final, TypeVar, assert_never

from nexus.abi import BootImage, CapClose, LinkTerms, Nanos, Now, TaskQos, service_id
from nexus.ipc import (
    GENERATION_ANY,
    CallFailure,
    Client,
    Exchange,
    Peers,
    Refused,
    RetryBudget,
    Stale,
    Unknown,
    Way,
    deadline_after,
)
from nexus.protocols.interactive import (
    PROTOCOL,
    HoldAt,
    HoldEnded,
    InteractiveRequest,
    InteractiveStatus,
    Registered,
    RegisterFor,
    SleepFor,
    Slept,
)
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.testsvc import Hold
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Cancel, Register, Sleep
from nexus.runtime import Call, Refusal, Server, ServiceConfig
from nexus.wire import Request

CONNECT_ATTEMPTS_MAX: Final = 20  # with doubling pauses from CONNECT_BACKOFF on
CONNECT_BACKOFF: Final = Nanos(2_000_000)
CONNECT_MAX: Final = Nanos(2_000_000_000)  # ns; the reference's route deadline
EXIT_NO_TIMED: Final = 1

ReplyT = TypeVar("ReplyT")


class Interactive:
    """Serves nexus.protocols.interactive."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.timed: Client | None = None

    def ready(self) -> bool:
        """Whether timed was found."""
        return self.timed is not None

    async def handle(
        self, call: Call, request: InteractiveRequest
    ) -> Registered | Slept | HoldEnded:
        """The reply."""
        match request:
            case RegisterFor():
                return await self._register(call, request)
            case SleepFor():
                return await self._sleep(call, request)
            case HoldAt():
                return await self._hold_at(call, request)
            case _:
                assert_never(request)

    async def _register(self, call: Call, request: RegisterFor) -> Registered:
        timer = await self._at_timed(call, Register(request.deadline))
        _ = await self._at_timed(call, Cancel(timer.timer_id))
        return Registered(qos=await TaskQos(), timer_id=timer.timer_id, deadline=timer.deadline)

    async def _sleep(self, call: Call, request: SleepFor) -> Slept:
        woken = await self._at_timed(call, Sleep(request.deadline))
        return Slept(qos=await TaskQos(), deadline=woken.deadline, woken=woken.now, now=await Now())

    async def _at_timed(self, call: Call, request: Request[ReplyT]) -> ReplyT:
        """timed's answer. After Stale nothing was sent; the next call finds the new instance."""
        timed = self._found(call)
        outcome = await timed.call(request, call.deadline)
        if isinstance(outcome, Stale):
            outcome = await timed.call(request, call.deadline)
        if isinstance(outcome, Refused | CallFailure):
            raise self._refusal(call, outcome)
        return outcome

    async def _hold_at(self, call: Call, request: HoldAt) -> HoldEnded:
        slot = call.take_cap()
        if slot is None:
            raise call.refuse(InteractiveStatus.NO_CAPABILITY)
        testsvc = await self._peers.bind(
            Way(
                slot=slot,
                protocol=TESTSVC,
                name="demo.testsvc",
                service=service_id("demo.testsvc"),
                generation=GENERATION_ANY,
                terms=LinkTerms(),
                reply_terms=LinkTerms(),
            ),
            call.deadline,
        )
        if not isinstance(testsvc, Exchange):
            await CapClose(slot)
            raise call.refuse(InteractiveStatus.TESTSVC_UNREACHABLE)
        outcome = await testsvc.call(Hold(request.token), call.deadline)
        noticed = await Now()
        await self._peers.discard(testsvc.peer)
        return HoldEnded(isinstance(outcome, Unknown), noticed)

    def _found(self, call: Call) -> Client:
        if self.timed is None:
            raise call.refuse(InteractiveStatus.TIMED_UNREACHABLE)
        return self.timed

    def _refusal(self, call: Call, outcome: Refused | CallFailure) -> Refusal:
        """What went wrong at timed, told to the caller."""
        call.note("timed", outcome)
        if isinstance(outcome, Refused):
            return call.refuse(InteractiveStatus.TIMED_REFUSED)
        return call.refuse(InteractiveStatus.TIMED_UNREACHABLE)


async def main(boot: BootImage) -> int:
    """Answer init's Bind, connect to timed, then serve until init says Stop."""
    config = ServiceConfig.of(boot)
    peers = Peers(boot, config.trace_seed)
    service = Interactive(peers)
    server = Server(service, PROTOCOL, boot, peers.caller)
    until = deadline_after(boot.now, CONNECT_MAX)
    _ = await server.step(until)
    budget = RetryBudget(attempts_max=CONNECT_ATTEMPTS_MAX, backoff=CONNECT_BACKOFF, deadline=until)
    timed = await peers.connect("timed", TIMED, budget)
    if not isinstance(timed, Client):
        return EXIT_NO_TIMED
    service.timed = timed
    return await server.run()
