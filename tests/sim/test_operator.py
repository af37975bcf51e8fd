"""operator in a whole simulated system, asked by processes outside of it."""

import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from nexus.abi import (
    LINK_DEPTH_DEFAULT,
    NO_WAIT,
    PORT_PEERS_MAX,
    BootImage,
    CapClose,
    Event,
    EventKind,
    LinkId,
    Message,
    Nanos,
    Now,
    PeerIdentity,
    Program,
    Send,
    Signal,
    SleepUntil,
    Slot,
    Trap,
)
from nexus.init.ground import init_program, limits_of, programs_of
from nexus.init.plan import make_plan
from nexus.init.system import parse
from nexus.ipc import Answer, Client, Exchange, Peers, Pending, Refused, RetryBudget, offer_bulk
from nexus.kernel.sim.kernel import SimKernel
from nexus.kernel.sim.ports import SimPeer
from nexus.metrics import Recorder
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import GetSystem, GetTasks, Restart, Route, SetPolicy, Shutdown
from nexus.protocols.interactive import PROTOCOL as INTERACTIVE
from nexus.protocols.interactive import RegisterFor
from nexus.protocols.logd import EVERY_RECORD, THIS_BOOT, Follow, Query, Records
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Stop
from nexus.protocols.operator import (
    PART_SIZE_MAX,
    PROTOCOL,
    RELAY_FRAME_SIZE_MAX,
    OperatorStatus,
    PartTaken,
    PolicyReloaded,
    PutPolicyPart,
    Relay,
    Relayed,
    ReloadPolicy,
)
from nexus.protocols.policy import AUTHORITY, POLICY_SIZE_MAX, Policy, Right
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import PolicydStatus, ReloadBulk
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Cancel, Register, TimedStatus, Timer, Wait
from nexus.runtime import Call, Deferred, Server, ServiceConfig
from nexus.services.operator.relay import AT_ONCE, Ended, Passing, Spanned
from nexus.services.operator.relay import Relay as Relaying
from nexus.services.operator.service import IDLE_MAX, Operator
from nexus.wire import (
    FLAG_BATCH,
    FLAGS_INDEX,
    HEADER,
    HEADER_SIZE,
    OP_INDEX,
    STATUS_OFFSET,
    TRACE_OFFSET,
    Protocol,
    ReplyStatus,
    Request,
    answer,
    encode,
    nonce_of,
    status_of,
)

ROOT = Path(__file__).parents[2]
MS = 1_000_000
SECOND = 1_000 * MS
USER = 1000
STRANGER = 4711
DRIVER = "demo.interactive"  # the test's own program stands in for it


class Stranger:
    """What the test's service does with the requests it gets: nothing but remember them."""

    def __init__(self) -> None:
        self.asked: list[tuple[LinkId, Deferred]] = []

    def handle(self, call: Call, request: Any) -> Deferred:
        deferred = call.defer()
        self.asked.append((call.link, deferred))
        return deferred


class Outside:
    """The test, as a service of the system that also plays the processes outside."""

    def __init__(self, kernel: SimKernel, server: Server, stranger: Stranger, peers: Peers) -> None:
        self.kernel = kernel
        self.peers = peers
        self.server = server
        self.stranger = stranger
        self._nonces = itertools.count(1)

    def connect(self, uid: int = USER, pid: int = 77) -> SimPeer:
        return self.kernel.port("operator").connect(pid, uid)

    async def sleep(self, span: int) -> None:
        until = Nanos(await Now() + span)
        while await Now() < until:
            _ = await self.server.step(until)

    async def take(self, peer: SimPeer, wait: int = 5 * SECOND) -> bytes | None:
        """The next message for the peer, None if there is none in time."""
        until = await Now() + wait
        while await Now() < until:
            found = peer.take()
            if found:
                assert len(found) == 1
                return found[0]
            await self.sleep(MS)
        return None

    async def frame(self, protocol: Protocol, request: Request[Any], wait: int = SECOND) -> bytes:
        codec = protocol.codecs[type(request)]
        fields = HEADER.unpack(codec.prefix.ljust(HEADER_SIZE, b"\0"))[:6]
        until = await Now() + wait
        head = HEADER.pack(*fields, next(self._nonces), until, b"t" * 16, b"s" * 8)
        return head + encode(request)

    async def ask(self, peer: SimPeer, request: Request[Any], wait: int = SECOND) -> Any:
        """operator's answer: the reply, or its status."""
        frame = await self.frame(PROTOCOL, request, wait)
        assert peer.send(frame)
        data = await self.take(peer)
        assert data is not None
        return self.read(request, frame, data)

    def read(self, request: Request[Any], frame: bytes, data: bytes) -> Any:
        codec = PROTOCOL.codecs[type(request)]
        assert nonce_of(data) == nonce_of(frame)
        assert data[:STATUS_OFFSET] == codec.reply_prefix[:STATUS_OFFSET]
        if status_of(data):
            return codec.statuses[status_of(data)]
        return codec.decode_reply(data[HEADER_SIZE:])

    async def relay(
        self,
        peer: SimPeer,
        service: str,
        protocol: Protocol,
        request: Request[Any],
        wait: int = SECOND,
    ) -> Any:
        """The service's answer: its reply, its status, or operator's status."""
        inner = await self.frame(protocol, request, wait)
        relayed = await self.ask(peer, Relay(service, inner), wait)
        if not isinstance(relayed, Relayed):
            return relayed
        codec = protocol.codecs[type(request)]
        assert nonce_of(relayed.frame) == nonce_of(inner)
        status = status_of(relayed.frame)
        if status:
            return codec.statuses[status]
        return codec.decode_reply(relayed.frame[HEADER_SIZE:])


Body = Callable[[Outside], Coroutine[Trap[Any], Any, None]]


def run(
    body: Body, *, operator: str = "", uses: str = "timed", bound: int = 120 * SECOND
) -> list[Event]:
    """Run `body` in systems/minimal.toml, its `demo.interactive` replaced; what happened."""
    text = (ROOT / "systems" / "minimal.toml").read_text()
    text += 'health = { deadline = "2s", every = "0s" }\n'
    if operator:
        text += f"\n[service.operator.settings]\n{operator}\n"
    if uses != "timed":
        text = text.replace("uses = { timed = {} }", f"uses = {{ {uses} = {{}} }}")
        text = text.replace('"demo.interactive" = { sync = false }\n', "")
    plan = make_plan(parse(text.encode(), ROOT / "systems" / "minimal.toml"))
    events: list[Event] = []
    failures: list[BaseException] = []
    done: list[bool] = []

    async def main(boot: BootImage) -> int:
        stranger = Stranger()
        config = ServiceConfig.of(boot)
        peers = Peers(boot, config.trace_seed)
        server = Server(stranger, INTERACTIVE, boot, peers.caller)
        outside = Outside(kernel, server, stranger, peers)
        await outside.sleep(300 * MS)
        try:
            await body(outside)
            done.append(True)
        except BaseException as failure:  # noqa: BLE001 (is raised by the test again)
            failures.append(failure)
        peer = outside.connect(uid=0)
        shutdown = await outside.frame(INIT, Shutdown())
        _ = peer.send(await outside.frame(PROTOCOL, Relay("init-lite", shutdown)))
        return await server.run()

    kernel = SimKernel(
        dict(programs_of(plan)) | {DRIVER: Program(name=DRIVER, main=main, digest="0" * 64)},
        seed=7,
        recorder=events.append,
        cpu_count=1,
        limits=limits_of(plan),
        boot_memory=b"",
    )
    ended = kernel.run(init_program(plan, 1), b"", until=Nanos(kernel.now + bound))
    if failures:
        raise failures[0]
    assert done
    assert ended.code == 0, [event for event in events if event.kind is EventKind.CONSOLE]
    return events


def test_a_command_is_passed_on_and_its_answer_comes_back() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        timer = await outside.relay(peer, "timed", TIMED, Register(await Now() + SECOND))
        assert isinstance(timer, Timer)
        again = await outside.relay(peer, "timed", TIMED, Cancel(timer.timer_id))
        assert again.timer_id == timer.timer_id

    _ = run(body)


def test_a_refusal_of_the_service_is_not_one_of_operator() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        assert await outside.relay(peer, "timed", TIMED, Cancel(99)) is TimedStatus.NOT_FOUND

    _ = run(body)


def test_init_is_asked_through_operator_under_its_rights() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        info = await outside.relay(peer, "init-lite", INIT, GetSystem())
        assert info.name == "minimal"
        assert (await outside.relay(peer, "init-lite", INIT, GetTasks())).live == 6

    _ = run(body)


@pytest.mark.covers("operator.NO_SERVICE")
def test_a_service_that_operator_does_not_use_is_not_asked() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        for name in ("selftest-client", "operator"):
            answer = await outside.relay(peer, name, TIMED, Cancel(1))
            assert answer is OperatorStatus.NO_SERVICE, name

    _ = run(body)


@pytest.mark.covers("operator.BAD_FRAME")
@pytest.mark.parametrize(
    ("service", "protocol", "request_"),
    [
        ("init-lite", INIT, Route("timed")),
        ("init-lite", INIT, SetPolicy(1)),
        ("timed", META, Stop()),
    ],
)
def test_what_hands_out_links_or_ends_services_is_not_passed_on(
    service: str, protocol: Protocol, request_: Request[Any]
) -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        answer = await outside.relay(peer, service, protocol, request_)
        assert answer is OperatorStatus.BAD_FRAME

    _ = run(body)


@pytest.mark.covers("operator.BAD_FRAME")
def test_batches_and_replies_are_not_passed_on() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        plain = await outside.frame(TIMED, Cancel(1))
        for index, value in ((FLAGS_INDEX, FLAG_BATCH), (OP_INDEX, 0x81), (0, 0x11)):
            inner = bytearray(plain)
            inner[index] = value
            asked = await outside.ask(peer, Relay("timed", bytes(inner)))
            assert asked is OperatorStatus.BAD_FRAME, index

    _ = run(body)


@pytest.mark.covers("operator.TIMED_OUT")
def test_a_service_that_is_silent_ends_in_a_time_out_and_not_in_a_wait() -> None:
    async def body(outside: Outside) -> None:
        slow, quick = outside.connect(), outside.connect()
        timer = await outside.relay(slow, "timed", TIMED, Register(await Now() + 9 * SECOND))
        inner = await outside.frame(TIMED, Wait(timer.timer_id), 2 * SECOND)
        request = Relay("timed", inner)
        frame = await outside.frame(PROTOCOL, request, 2 * SECOND)
        start = await Now()
        assert slow.send(frame)
        # Somebody else is served meanwhile.
        assert (await outside.relay(quick, "init-lite", INIT, GetSystem())).name == "minimal"
        assert await Now() - start < SECOND
        data = await outside.take(slow)
        assert data is not None
        assert outside.read(request, frame, data) is OperatorStatus.TIMED_OUT
        assert 2 * SECOND <= await Now() - start < 2 * SECOND + 100 * MS

    _ = run(body)


@pytest.mark.covers("operator.CUT_OFF", "operator.UNREACHABLE")
def test_a_service_that_dies_cuts_the_request_off_and_is_found_again() -> None:
    async def body(outside: Outside) -> None:
        waiting, acting = outside.connect(), outside.connect()
        timer = await outside.relay(waiting, "timed", TIMED, Register(await Now() + 9 * SECOND))
        request = Relay("timed", await outside.frame(TIMED, Wait(timer.timer_id), 5 * SECOND))
        frame = await outside.frame(PROTOCOL, request, 5 * SECOND)
        assert waiting.send(frame)
        await outside.sleep(20 * MS)
        _ = await outside.relay(acting, "init-lite", INIT, Restart("timed"))
        data = await outside.take(waiting)
        assert data is not None
        assert outside.read(request, frame, data) is OperatorStatus.CUT_OFF
        down = await outside.relay(acting, "timed", TIMED, Cancel(1))
        assert down is OperatorStatus.UNREACHABLE
        await outside.sleep(2 * SECOND)
        again = await outside.relay(acting, "timed", TIMED, Cancel(1))
        assert again is TimedStatus.NOT_FOUND

    _ = run(body)


def test_an_answer_that_has_come_is_handed_on_before_the_end() -> None:
    """As that of a switch that reboots: operator finds the Stop and the answer at once."""
    found: list[SimPeer] = []
    frames: list[tuple[Relay, bytes]] = []
    outsides: list[Outside] = []

    async def body(outside: Outside) -> None:
        peer = outside.connect()
        timer = await outside.relay(peer, "timed", TIMED, Register(await Now() + 50 * MS))
        request = Relay("timed", await outside.frame(TIMED, Wait(timer.timer_id), SECOND))
        frame = await outside.frame(PROTOCOL, request, SECOND)
        assert peer.send(frame)
        await outside.sleep(20 * MS)
        assert outside.kernel.freeze("operator", Nanos(await Now() + 200 * MS))
        await outside.sleep(100 * MS)
        assert not peer.take()
        outside.kernel.signal(Signal.TERM)
        found.append(peer)
        frames.append((request, frame))
        outsides.append(outside)

    _ = run(body)

    (data,) = found[0].take()
    assert isinstance(outsides[0].read(*frames[0], data), Relayed)


@pytest.mark.covers("operator.BAD_ANSWER")
def test_a_frame_that_answers_something_else_is_no_answer() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        request = Relay(DRIVER, await outside.frame(INTERACTIVE, RegisterFor(5)))
        frame = await outside.frame(PROTOCOL, request)
        assert peer.send(frame)
        while not outside.stranger.asked:
            await outside.sleep(MS)
        link, deferred = outside.stranger.asked.pop()
        slot = outside.server.reply_slot(link)
        assert slot is not None
        other = bytearray(answer(deferred.header, 0))
        other[OP_INDEX] ^= 0x02
        await Send(slot, other, deadline=NO_WAIT)
        data = await outside.take(peer)
        assert data is not None
        assert outside.read(request, frame, data) is OperatorStatus.BAD_ANSWER

    _ = run(body)


def test_one_request_at_a_time_per_connection() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        first = Relay(DRIVER, await outside.frame(INTERACTIVE, RegisterFor(5), 3 * SECOND))
        frame = await outside.frame(PROTOCOL, first, 3 * SECOND)
        assert peer.send(frame)
        await outside.sleep(20 * MS)
        second = await outside.relay(peer, "init-lite", INIT, GetSystem())
        assert second is ReplyStatus.BUSY
        data = await outside.take(peer)
        assert data is not None
        assert outside.read(first, frame, data) is OperatorStatus.TIMED_OUT
        assert (await outside.relay(peer, "init-lite", INIT, GetSystem())).name == "minimal"

    _ = run(body)


def test_a_queue_that_is_full_is_busy_and_holds_nobody_up() -> None:
    async def body(outside: Outside) -> None:
        # The test's service takes nothing from its queue while this loop does not step it.
        peers = [outside.connect() for _ in range(PORT_PEERS_MAX - 1)]
        statuses: list[int] = []
        for _ in range(2):
            for peer in peers:
                inner = await outside.frame(INTERACTIVE, RegisterFor(5), 50 * MS)
                assert peer.send(await outside.frame(PROTOCOL, Relay(DRIVER, inner), 50 * MS))
            _ = await SleepUntil(Nanos(await Now() + 100 * MS))
            statuses += [status_of(data) for peer in peers for data in peer.take()]
        queued = [status for status in statuses if status == OperatorStatus.TIMED_OUT]
        assert len(statuses) == 2 * len(peers)
        assert len(queued) == LINK_DEPTH_DEFAULT
        assert set(statuses) - set(queued) == {ReplyStatus.BUSY}

    _ = run(body)


def test_malformed_frames_are_answered_as_such() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        good = await outside.frame(PROTOCOL, PutPolicyPart(0, b"x"))
        cases = {
            good[:20]: ReplyStatus.MALFORMED,
            b"\x11" + good[1:]: ReplyStatus.MALFORMED,
            good[:OP_INDEX] + b"\x70" + good[OP_INDEX + 1 :]: ReplyStatus.UNSUPPORTED,
            good + b"\0": ReplyStatus.MALFORMED,
        }
        for frame, status in cases.items():
            assert peer.send(frame)
            data = await outside.take(peer)
            assert data is not None
            assert status_of(data) == status, frame
        late = HEADER.pack(*HEADER.unpack(good[:HEADER_SIZE])[:7], 1, b"t" * 16, b"s" * 8)
        assert peer.send(late + good[HEADER_SIZE:])
        data = await outside.take(peer)
        assert data is not None
        assert status_of(data) == ReplyStatus.EXPIRED

    _ = run(body)


def test_a_stranger_is_turned_away_by_name_of_the_kernel() -> None:
    async def body(outside: Outside) -> None:
        assert outside.connect(uid=STRANGER).closed  # by the kernel already

    _ = run(body)


def test_an_entry_that_names_one_user_turns_the_others_away() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect(uid=USER)
        assert peer.send(await outside.frame(PROTOCOL, PutPolicyPart(0, b"x")))
        await outside.sleep(50 * MS)
        assert peer.closed
        assert peer.take() == []
        root = outside.connect(uid=0)
        assert await outside.ask(root, PutPolicyPart(0, b"x")) == PartTaken(1)

    _ = run(body, operator="uid = 5")


def test_a_connection_that_asks_for_nothing_gives_its_place() -> None:
    async def body(outside: Outside) -> None:
        idle, busy = outside.connect(), outside.connect()
        for peer in (idle, busy):
            assert await outside.ask(peer, PutPolicyPart(0, b"x")) == PartTaken(1)
        await outside.sleep(int(IDLE_MAX) - 10 * SECOND)
        assert await outside.ask(busy, PutPolicyPart(0, b"x")) == PartTaken(1)
        await outside.sleep(11 * SECOND)
        assert idle.closed
        assert not busy.closed

    _ = run(body, bound=400 * SECOND)


def test_a_new_policy_is_put_together_and_put_in_force() -> None:
    plan = make_plan(
        parse((ROOT / "systems" / "minimal.toml").read_bytes(), ROOT / "systems" / "minimal.toml")
    )
    policy = plan.policy.encoded()

    async def body(outside: Outside) -> None:
        peer = outside.connect()
        for offset in range(0, len(policy), 100):
            part = policy[offset : offset + 100]
            taken = await outside.ask(peer, PutPolicyPart(offset, part))
            assert taken == PartTaken(offset + len(part))
        before = (await outside.relay(peer, "init-lite", INIT, GetSystem())).policy_generation
        done = await outside.ask(peer, ReloadPolicy(len(policy)), 2 * SECOND)
        assert isinstance(done, PolicyReloaded), done
        assert done.digest == plan.policy.digest
        after = (await outside.relay(peer, "init-lite", INIT, GetSystem())).policy_generation
        assert done.generation == after
        assert after > before

    _ = run(body)


def test_operator_ends_with_the_right_to_its_port_and_is_back_with_it() -> None:
    """What it has open cannot be taken from it, so init ends it, and its connections with it."""
    file = ROOT / "systems" / "minimal.toml"
    full = make_plan(parse(file.read_bytes(), file)).policy
    door = Right("port.operator", "new.toml", 1)
    kept = [right for right in full.allow["operator"] if right.name != door.name]
    mine = [*full.allow[DRIVER], Right(AUTHORITY, "new.toml", 2)]  # the way back
    less = msgspec.structs.replace(full, allow={**full.allow, "operator": kept, DRIVER: mine})

    async def put(outside: Outside, policy: Policy) -> tuple[SimPeer, Nanos]:
        peer = outside.connect()
        data = policy.encoded()
        for offset in range(0, len(data), PART_SIZE_MAX):
            part = PutPolicyPart(offset, data[offset : offset + PART_SIZE_MAX])
            assert isinstance(await outside.ask(peer, part), PartTaken)
        frame = await outside.frame(PROTOCOL, ReloadPolicy(len(data)), 2 * SECOND)
        assert peer.send(frame)
        return peer, await Now()

    async def body(outside: Outside) -> None:
        idle = outside.connect()
        peer, _ = await put(outside, full)
        assert await outside.take(peer) is not None
        assert not idle.closed  # who keeps the right keeps what it has open
        peer, sent = await put(outside, less)
        while not all(each.closed for each in (idle, peer)):
            await outside.sleep(MS)
        assert await Now() - sent < 20 * MS  # policyd asks init, init ends operator
        await outside.sleep(500 * MS)
        with pytest.raises(ConnectionRefusedError):
            _ = outside.connect()
        control = await outside.peers.control(Nanos(await Now() + SECOND))
        assert isinstance(control, Exchange)
        slot = await offer_bulk(full.encoded())
        assert slot is not None
        size = len(full.encoded())
        taken = await control.ask(SetPolicy(size), Nanos(await Now() + SECOND), move=slot)
        assert isinstance(taken, Answer), taken
        await outside.sleep(500 * MS)
        info = await outside.relay(outside.connect(), "init-lite", INIT, GetSystem())
        assert info.policy_digest == full.digest

    lines = [str(event.fields["line"]) for event in run(body) if event.kind is EventKind.CONSOLE]
    story = ["init: grants of operator revoked", "init: end of operator"]
    story += ["init: no start of operator", "init: restart operator"]
    assert [line for line in lines if line in story] == story


@pytest.mark.covers("operator.BAD_POLICY")
def test_bytes_that_are_no_policy_change_nothing() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        before = (await outside.relay(peer, "init-lite", INIT, GetSystem())).policy_generation
        assert await outside.ask(peer, PutPolicyPart(0, b"nonsense")) == PartTaken(8)
        assert await outside.ask(peer, ReloadPolicy(8)) is OperatorStatus.BAD_POLICY
        after = (await outside.relay(peer, "init-lite", INIT, GetSystem())).policy_generation
        assert after == before

    _ = run(body)


@pytest.mark.covers("operator.BAD_PART")
def test_parts_that_do_not_join_are_refused_and_bounded() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect()
        assert await outside.ask(peer, PutPolicyPart(3, b"x")) is OperatorStatus.BAD_PART
        assert await outside.ask(peer, ReloadPolicy(5)) is OperatorStatus.BAD_PART
        part = bytes(PART_SIZE_MAX)
        for offset in range(0, POLICY_SIZE_MAX, PART_SIZE_MAX):
            assert isinstance(await outside.ask(peer, PutPolicyPart(offset, part)), PartTaken)
        more = await outside.ask(peer, PutPolicyPart(POLICY_SIZE_MAX, b"x"))
        assert more is OperatorStatus.BAD_PART
        other = outside.connect()
        assert await outside.ask(other, PutPolicyPart(8, b"x")) is OperatorStatus.BAD_PART

    _ = run(body)


def test_who_follows_the_journal_does_not_feed_it() -> None:
    """Else each answer would be the reason for the next one."""

    async def body(outside: Outside) -> None:
        peer = outside.connect(pid=123)
        for _ in range(5):
            page = await outside.relay(peer, "logd", LOGD, Follow(1, 1, EVERY_RECORD))
            assert isinstance(page, Records)
        await outside.sleep(100 * MS)
        wanted = structs.replace(EVERY_RECORD, key="request", value="Follow")
        page = await outside.relay(peer, "logd", LOGD, Query(THIS_BOOT, 1, 16, wanted))
        assert isinstance(page, Records)
        assert len(page.records) == 1

    _ = run(body)


def test_who_asked_for_what_is_in_the_journal_and_looks_only_once() -> None:
    async def body(outside: Outside) -> None:
        peer = outside.connect(pid=123)
        for _ in range(3):
            _ = await outside.relay(peer, "init-lite", INIT, GetSystem())
            _ = await outside.relay(peer, "timed", TIMED, Cancel(1))
        await outside.sleep(100 * MS)
        wanted = structs.replace(EVERY_RECORD, key="peer_pid", value="123")
        query = Query(THIS_BOOT, 1, 16, wanted)
        page = await outside.relay(peer, "logd", LOGD, query)
        assert isinstance(page, Records)
        seen = [
            tuple(field.value for field in record.fields if field.key in ("request", "target"))
            for record in page.records
        ]
        assert seen.count(("GetSystem", "init-lite")) == 1
        assert seen.count(("protocol 2 op 2", "timed")) == 3
        assert all(
            ("peer_uid", str(USER)) in [(field.key, field.value) for field in record.fields]
            for record in page.records
        )

    _ = run(body)


def test_services_have_no_business_with_operator() -> None:
    async def body(outside: Outside) -> None:
        budget = RetryBudget(
            attempts_max=3, backoff=Nanos(MS), deadline=Nanos(await Now() + SECOND)
        )
        client = await outside.peers.connect("operator", PROTOCOL, budget)
        assert isinstance(client, Client)
        outcome = await client.call(PutPolicyPart(0, b"x"), Nanos(await Now() + SECOND))
        assert outcome == Refused(ReplyStatus.DENIED)

    _ = run(body, uses="operator")


class Silent:
    """A log that keeps what is written."""

    def info(self, text: str, /, **fields: object) -> None: ...

    def warning(self, text: str, /, **fields: object) -> None: ...


def operator_alone() -> tuple[Operator, BootImage]:
    boot = BootImage(
        name="operator",
        service=1,  # type: ignore[arg-type]
        pid=1,  # type: ignore[arg-type]
        generation=1,
        control=Slot(0),
        endpoint=Slot(1),
        now=Nanos(0),
        argument=b"",
    )
    peers = Peers(boot, b"seed")
    return Operator(Slot(2), Relaying(peers, []), Silent(), Recorder(peers.caller)), boot


def ended(request: type, data: bytes) -> Ended:
    outer = bytes(HEADER.pack(0x4E, 1, 1, 0, 8, 0, 5, 9, b"t" * 16, b"s" * 8))
    codec = PROTOCOL.codecs[request]
    pending = Pending(1, None, codec, Nanos(9), b"", 0)  # type: ignore[arg-type]
    passing = Passing(LinkId(3), outer, codec, outer, pending, Spanned(outer[TRACE_OFFSET:]))
    return Ended(passing, data, ReplyStatus.OK)


@pytest.mark.covers("operator.TOO_LARGE")
def test_an_answer_that_does_not_fit_is_refused_and_not_cut() -> None:
    operator, _ = operator_alone()

    fits = operator._told(ended(Relay, bytes(RELAY_FRAME_SIZE_MAX)))
    too_large = operator._told(ended(Relay, bytes(RELAY_FRAME_SIZE_MAX + 1)))

    assert status_of(fits) == ReplyStatus.OK
    assert status_of(too_large) == OperatorStatus.TOO_LARGE
    assert len(too_large) == HEADER_SIZE


@pytest.mark.covers("operator.POLICY_NOT_TAKEN")
@pytest.mark.parametrize(
    ("status", "told"),
    [
        (PolicydStatus.INIT_REFUSED, OperatorStatus.POLICY_NOT_TAKEN),
        (PolicydStatus.BAD_POLICY, OperatorStatus.BAD_POLICY),
        (ReplyStatus.DENIED, ReplyStatus.DENIED),
        (ReplyStatus.MALFORMED, OperatorStatus.BAD_ANSWER),
        (0, OperatorStatus.BAD_ANSWER),
    ],
)
def test_what_policyd_says_to_a_policy_is_said_outside(status: int, told: int) -> None:
    operator, _ = operator_alone()
    frame = bytes(answer(POLICYD.codecs[ReloadBulk].prefix.ljust(HEADER_SIZE, b"\0"), status))

    assert status_of(operator._told(ended(ReloadPolicy, frame))) == told


def test_the_kernel_is_asked_who_is_there() -> None:
    operator, _ = operator_alone()

    assert operator._is_welcome(PeerIdentity(1, 0))
    assert operator._is_welcome(PeerIdentity(1, 1234))
    relay, recorder = operator._relay, operator._recorder
    assert not Operator(Slot(2), relay, Silent(), recorder, 5)._is_welcome(PeerIdentity(1, 6))
    assert Operator(Slot(2), relay, Silent(), recorder, 5)._is_welcome(PeerIdentity(1, 5))


def test_an_answer_that_came_while_something_else_was_awaited_is_told_at_once() -> None:
    operator, _ = operator_alone()
    relay = operator._relay
    relay._known.clear()  # it looks for nobody
    passing = ended(Relay, b"").passing
    correlator = relay._peers.caller.correlator
    correlator.on_sent(passing.pending)
    relay._passing[passing.pending.nonce] = passing
    due = operator.next_time()

    message = Message(passing.inner, None, LinkId(7), None, Nanos(3), Slot(4))  # type: ignore[arg-type]
    _ = correlator.buffer.push(passing.pending.nonce, message)

    assert (due, operator.next_time()) == (9, AT_ONCE)
    with pytest.raises(StopIteration):  # without a wait
        operator.on_time(Nanos(3)).send(None)
    assert operator.facts()["passing"] == 0
    assert operator.next_time() is None


def test_a_capability_that_came_with_an_answer_is_closed() -> None:
    operator, _ = operator_alone()
    passing = ended(Relay, b"").passing

    telling = operator._tell([Ended(passing, None, OperatorStatus.BAD_ANSWER, Slot(9))])

    trap = telling.send(None)
    telling.close()

    assert isinstance(trap, CapClose)
    assert trap.slot == 9
