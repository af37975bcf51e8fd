"""init-lite on the simulated kernel: what it starts, answers, restarts and ends."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    EVIDENCE_SIZE_MAX,
    INIT_NAME,
    NEVER,
    AbiError,
    BootImage,
    CapClose,
    ConsoleWrite,
    EndpointCreate,
    EventKind,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    Program,
    Recv,
    Send,
    SetTaskQos,
    SleepUntil,
    Slot,
    Spawn,
    Status,
    Trap,
    VmoCreate,
    VmoSeal,
    Wait,
    service_id,
)
from nexus.init.console import evidence_of
from nexus.init.desk import Desk, Held
from nexus.init.ground import init_program, limits_of
from nexus.init.instances import REAP_MAX
from nexus.init.plan import make_plan
from nexus.init.programs import PROGRAMS, load_program
from nexus.init.record import Record
from nexus.init.system import parse
from nexus.init.watch import PROBE_PAUSE
from nexus.ipc import Answer, CallFailure, Refused, TimedOut
from nexus.kernel.sim.faults import FAILURES, Faults, NthFailure
from nexus.kernel.sim.faults import Plan as FaultPlan
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.init import (
    BOOT_ID_SIZE,
    AuditRows,
    AwaitReady,
    GetAudit,
    GetLinks,
    GetResources,
    GetRouteCounts,
    GetService,
    GetTasks,
    Health,
    InitStatus,
    LinkRows,
    Resources,
    Restart,
    Restarting,
    Route,
    RouteCounts,
    Routed,
    ServiceRecord,
    Shutdown,
    ShuttingDown,
    TaskRows,
    TaskState,
)
from nexus.protocols.init import PROTOCOL as PROTOCOLS_INIT
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Bind, Bound, Fact, GetStatus, Stop
from nexus.protocols.meta import Health as Probe
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.timed import Seen, Whoami
from nexus.runtime import Server, serve
from nexus.wire import (
    HEADER_SIZE,
    ReplyStatus,
    Request,
    answer,
    encode,
    nonce_of,
)
from tests.fakes.initrig import (
    DRIVER,
    HEALTH,
    MS,
    OTHER,
    SECOND,
    SYSTEM,
    Boot,
    Driver,
    Main,
    Nothing,
    boot,
    healthy,
    idle,
    nothing,
    play,
    status,
)

__all__ = ["boot"]  # the fixture


def late(span: int) -> Main:
    """A service that takes its planned links only after this time, and is an ordinary one then."""

    async def main(boot: BootImage) -> int:
        await SleepUntil(Nanos(await Now() + span))
        driver = Driver(boot)
        await driver.begin(ready=False)
        return await driver.server.run()

    return main


# ---------------------------------------------------------------- the boot


def test_a_system_boots_in_order_and_ends_cleanly(boot: Boot) -> None:
    run = boot(nothing)

    assert run.ended.code == 0
    lines = [line for line in run.lines("init: ") if " health " not in line]
    assert lines == [
        "init: start",
        "init: start timed",
        "init: start driver",
        "init: up timed",
        "init: up driver",
        "init: ready",
        "init: stopped",
    ]


def test_the_lines_carry_evidence_that_others_can_check(boot: Boot) -> None:
    run = boot(nothing)

    assert run.evidence("init: start") == {"digest": run.plan.digest, "services": 2}
    (spawned,) = run.spawns("timed")
    start = run.evidence("init: start timed")
    assert start == {"program": "timed", "digest": spawned.fields["digest"]}
    up = run.evidence("init: up timed")
    assert (up["pid"], up["service"]) == (spawned.pid, f"0x{service_id('timed'):016x}")
    assert (up["generation"], up["echo_nonce"]) == (1, 1)
    (link,) = run.plan.links
    terms = ["driver", "timed", link.depth, link.size, link.delegations]
    ready = run.evidence("init: ready")
    assert (ready["links"], ready["grants"], ready["boot"]) == ([[*terms, 1, 1]], [], 0)
    assert len(bytes.fromhex(ready["boot_id"])) == BOOT_ID_SIZE
    health = run.evidence("init: health timed ok")
    assert (health["generation"], health["facts"]["timers"]) == (1, 0)
    assert run.evidence("init: stopped")["exits"] == {"timed": [0, 0], "driver": [0, 0]}


def test_init_is_not_ready_before_every_planned_link_exists(boot: Boot) -> None:
    async def lazy(driver: Driver) -> str:
        await driver.pause(500 * MS)
        return "done"

    text = SYSTEM + DRIVER + OTHER.replace("100ms", "2s") + 'uses = [{ name = "timed" }]\n'
    run = boot(lazy, text=text, other=late(300 * MS))

    assert run.time("init: ready") - run.time("init: start") >= 300 * MS


def test_a_link_that_was_lost_with_its_server_does_not_hold_up_the_rest(boot: Boot) -> None:
    """driver has its link to timed, needs nothing more of it, and timed is started anew before
    the third service has taken its own."""

    async def driver(driver: Driver) -> int:
        _ = await driver.reply(Restart("timed"), Restarting)
        await driver.pause(500 * MS)
        return (await driver.record("timed")).generation

    text = SYSTEM + DRIVER + OTHER.replace("100ms", "2s") + 'uses = [{ name = "timed" }]\n'
    run = boot(driver, text=text, other=late(300 * MS), ready=False)

    assert run.result == 2
    assert run.time("init: ready") - run.time("init: start") >= 300 * MS
    assert [row[:2] for row in run.evidence("init: ready")["links"]] == [["other", "timed"]]


def test_two_boots_of_one_seed_are_equal(boot: Boot) -> None:
    assert boot(nothing).events == boot(nothing).events


def test_a_program_that_cannot_be_started_is_tried_again_after_its_backoff(boot: Boot) -> None:
    async def driver(driver: Driver) -> ServiceRecord:
        await driver.pause(200 * MS)
        return await driver.record("other")

    text = SYSTEM + DRIVER + OTHER.replace('program = "other"', 'program = "absent"')
    run = boot(driver, text=text, ready=False)

    assert run.result.state is TaskState.BACKING_OFF
    assert run.result.spawn_refused == 3  # after 0, 30 and 90 ms; the next one is due at 210
    assert run.result.spawn_reason == 5
    assert run.lines("init: ready") == []
    assert "init: no start of other" in run.lines()
    assert run.ended.code == 0


# ---------------------------------------------------------------- routes


def test_routes_are_counted_by_outcome(boot: Boot) -> None:
    async def driver(driver: Driver) -> tuple[list[Any], RouteCounts]:
        outcomes = [
            await driver.ask(Route(name)) for name in ("@reply", "nobody", "other", "driver")
        ]
        return outcomes, await driver.reply(GetRouteCounts("driver"), RouteCounts)

    run = boot(driver, text=SYSTEM + DRIVER + OTHER)
    (own, nobody, other, itself), counts = run.result

    assert (own.service, own.generation, own.size) == (service_id("driver"), 1, 0)
    assert nobody == Refused(InitStatus.ROUTE_NOT_FOUND)
    assert other == Refused(InitStatus.ROUTE_DENIED)
    assert itself == Refused(InitStatus.ROUTE_DENIED)
    assert (counts.ok, counts.not_found, counts.denied, counts.down) == (2, 1, 2, 0)


def test_a_route_that_init_answers_after_its_deadline_is_taken_by_nobody(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = Desk._route
    slow = [False]

    async def slowly(desk: Desk, asker: Record, request: Route) -> Any:
        grant = await route(desk, asker, request)
        if slow[0]:
            _ = await SleepUntil(Nanos(await Now() + 30 * MS))
        return grant

    async def driver(driver: Driver) -> tuple[Any, int, LinkRows]:
        before = await driver.reply(GetRouteCounts("driver"), RouteCounts)
        slow[0] = True
        outcome = await driver.control.ask(Route("timed"), await driver.ahead(20 * MS))
        slow[0] = False
        after = await driver.reply(GetRouteCounts("driver"), RouteCounts)
        return outcome, after.ok - before.ok, await driver.reply(GetLinks(0), LinkRows)

    monkeypatch.setattr(Desk, "_route", slowly)
    outcome, more, links = boot(driver).result

    (row,) = links.rows
    assert (outcome, more, row.taken) == (TimedOut(), 0, 1)


def test_a_route_gives_the_planned_terms_and_a_working_link(boot: Boot) -> None:
    async def driver(driver: Driver) -> tuple[Routed, Any, LinkRows]:
        answer = await driver.control.ask(Route("timed"), await driver.ahead(SECOND))
        seen = await driver.clients["timed"].call(Whoami(1, "x"), await driver.ahead(SECOND))
        assert isinstance(answer, Answer), answer
        assert answer.cap is not None
        await Send(answer.cap, b"\x01")
        return answer.reply, seen, await driver.reply(GetLinks(0), LinkRows)

    run = boot(driver)
    routed, seen, links = run.result

    (link,) = run.plan.links
    assert (routed.depth, routed.size, routed.delegations) == (8, 16384, 0)
    assert (routed.reply_depth, routed.reply_size) == (link.reply_depth, link.reply_size)
    assert isinstance(seen, Seen)
    (row,) = links.rows
    assert (links.total, row.client, row.server, row.taken) == (1, "driver", "timed", 2)


def test_a_client_that_takes_links_without_end_meets_busy_and_not_the_others_share(
    boot: Boot,
) -> None:
    async def greedy(driver: Driver) -> list[Any]:
        outcomes: list[Any] = []
        for _ in range(60):
            answer = await driver.control.ask(Route("timed"), await driver.ahead(SECOND))
            outcomes.append(answer)
        return outcomes

    text = SYSTEM + DRIVER + OTHER.replace("100ms", "2s") + 'uses = [{ name = "timed" }]\n'
    run = boot(greedy, text=text, other=late(500 * MS), ready=False)

    refused = [each for each in run.result if isinstance(each, Refused)]
    assert refused
    assert set(refused) == {Refused(ReplyStatus.BUSY)}
    timed = run.plan.by_name["timed"]
    taken = len(run.result) - len(refused)
    assert timed.reserved_size + taken * 16384 <= timed.owner_size


def test_everything_but_route_needs_the_capability(boot: Boot) -> None:
    requests: list[Request[Any]] = [
        AwaitReady(),
        GetTasks(),
        GetLinks(0),
        GetRouteCounts("timed"),
        Restart("timed"),
        GetService("timed"),
        GetAudit(0),
        GetResources("timed"),
        Shutdown(),
    ]

    async def driver(driver: Driver) -> list[Any]:
        return [await driver.ask(request) for request in requests]

    text = SYSTEM + DRIVER.replace('capabilities = ["proof.control"]\n', "")
    run = boot(driver, text=text, ready=False)

    assert run.result == [Refused(ReplyStatus.DENIED)] * len(requests)
    assert len(run.spawns("timed")) == 1


def test_names_that_do_not_exist_are_not_found(boot: Boot) -> None:
    async def driver(driver: Driver) -> list[Any]:
        return [
            await driver.ask(request)
            for request in (
                GetRouteCounts("x"),
                Restart("x"),
                GetService("x"),
                GetResources("x"),
            )
        ]

    assert boot(driver).result == [Refused(InitStatus.ROUTE_NOT_FOUND)] * 4


def test_malformed_and_unknown_frames_are_answered_and_counted(boot: Boot) -> None:
    async def driver(driver: Driver) -> tuple[list[tuple[int, int]], RouteCounts]:
        route = PROTOCOLS_INIT.codecs[Route].prefix
        far = (await driver.ahead(SECOND)).to_bytes(8, "little")
        rest = far + bytes(24)
        frames = [
            (route + (900).to_bytes(8, "little") + rest + b"\xc0"),  # no array
            (route + (901).to_bytes(8, "little") + rest + b"\x91\xa1x\x00"),  # a trailing byte
            (route[:2] + b"\x7e" + route[3:] + (902).to_bytes(8, "little") + rest),  # no such op
            (route[:1] + b"\x09" + route[2:] + (903).to_bytes(8, "little") + rest),  # version 9
            (route + (904).to_bytes(8, "little")),  # cut behind the nonce
            (META.codecs[Stop].prefix + (905).to_bytes(8, "little") + rest + b"\x90"),
            (route + (906).to_bytes(8, "little") + bytes(7) + b"\0" * 25 + b"\x91\xa1x"),
        ]
        peer = driver.control.peer
        answers = []
        for frame in frames:
            await Send(peer.slot, frame)
            message = await Recv((peer.inbox,), await driver.ahead(SECOND), link=peer.link)
            answers.append((nonce_of(message.data), message.data[6]))
        return answers, await driver.reply(GetRouteCounts("driver"), RouteCounts)

    answers, counts = boot(driver).result

    assert answers == [
        (900, ReplyStatus.MALFORMED),
        (901, ReplyStatus.MALFORMED),
        (902, ReplyStatus.UNSUPPORTED),
        (903, ReplyStatus.UNSUPPORTED),
        (904, ReplyStatus.MALFORMED),
        (905, ReplyStatus.UNSUPPORTED),
        (906, ReplyStatus.EXPIRED),
    ]
    assert counts.malformed == 6


def test_an_answer_sent_to_init_as_a_request_is_never_answered(boot: Boot) -> None:
    async def driver(driver: Driver) -> Any:
        peer = driver.control.peer
        request = PROTOCOLS_INIT.codecs[Route].prefix + bytes(HEADER_SIZE - 8) + b"\x91\xa1x"
        await Send(peer.slot, bytes(answer(request, 0)))
        try:
            await Recv((peer.inbox,), await driver.ahead(50 * MS), link=peer.link)
        except AbiError as error:
            return error.status
        return None

    assert boot(driver).result is Status.TIMED_OUT


BIND_FRAME: Final = META.codecs[Bind].prefix + bytes(HEADER_SIZE - 8) + encode(Bind())


@pytest.mark.parametrize(
    "frame",
    [b"garbage", BIND_FRAME, BIND_FRAME + b"\0", PROTOCOLS_INIT.codecs[Route].prefix + bytes(99)],
    ids=["garbage", "Bind", "malformed Bind", "malformed Route"],
)
def test_memory_where_a_reply_link_is_due_costs_its_sender_the_answer_and_nobody_else(
    boot: Boot, frame: bytes
) -> None:
    async def driver(driver: Driver) -> TaskRows:
        vmo = await VmoCreate(4096)
        await VmoSeal(vmo)
        await Send(driver.control.peer.slot, frame, move=vmo)
        return await driver.reply(GetTasks(), TaskRows)  # over the link of the earlier Bind

    run = boot(driver)

    assert run.result.live == 3
    assert run.ended.code == 0
    assert run.evidence("init: stopped")["lost"] == 1


# ---------------------------------------------------------------- restarts


def test_a_killed_service_comes_back_after_its_backoff_with_the_next_generation(
    boot: Boot,
) -> None:
    async def driver(driver: Driver) -> tuple[Any, ...]:
        before = await driver.record("timed")
        killed_at = await Now()
        restarting = await driver.reply(Restart("timed"), Restarting)
        await driver.pause(10 * MS)
        down = await driver.ask(Route("timed"))
        during = await driver.record("timed")
        await driver.pause(200 * MS)
        link = driver.clients["timed"]
        stale = await link.call(Whoami(0, ""), await driver.ahead(SECOND))
        again = await link.call(Whoami(0, ""), await driver.ahead(SECOND))
        return (
            before,
            killed_at,
            restarting,
            down,
            during,
            stale,
            again,
            await driver.record("timed"),
        )

    run = boot(driver)
    before, killed_at, restarting, down, during, stale, again, after = run.result

    assert (before.generation, restarting.generation) == (1, 1)
    assert restarting.pid == before.pid
    assert down == Refused(InitStatus.ROUTE_DOWN)
    assert (during.state, during.pid) == (TaskState.BACKING_OFF, 0)
    assert (during.exit_signal, during.reason) == (9, "asked")
    assert killed_at < during.died < killed_at + 5 * MS
    assert isinstance(stale, CallFailure)
    assert isinstance(again, Seen)
    assert (after.state, after.generation, after.restarts) == (TaskState.UP, 2, 1)
    assert after.health is Health.OK
    first, second = run.spawns("timed")
    assert 50 * MS <= second.time - during.died < 55 * MS
    assert first.time < second.time
    assert run.ended.code == 0


def test_a_restart_prints_no_marker_twice(boot: Boot) -> None:
    async def driver(driver: Driver) -> None:
        _ = await driver.reply(Restart("timed"), Restarting)
        await driver.pause(300 * MS)

    run = boot(driver)

    lines = run.lines()
    assert lines.count("init: start timed") == lines.count("init: up timed") == 1
    assert lines.count("timed: ready") == lines.count("init: ready") == 1
    assert "init: restart timed" in lines
    assert run.evidence("init: back timed")["generation"] == 2


def test_a_service_that_is_down_cannot_be_killed_again(boot: Boot) -> None:
    async def driver(driver: Driver) -> Any:
        _ = await driver.reply(Restart("timed"), Restarting)
        await driver.pause(10 * MS)
        return await driver.ask(Restart("timed"))

    assert boot(driver).result == Refused(InitStatus.ROUTE_DOWN)


def test_a_service_that_ends_again_and_again_is_restarted_at_the_declared_pace(
    boot: Boot,
) -> None:
    async def short_lived(boot: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, boot)
        _ = await server.step(NEVER)
        return 3

    async def driver(driver: Driver) -> ServiceRecord:
        await driver.pause(600 * MS)
        return await driver.record("other")

    text = SYSTEM + DRIVER + OTHER.replace('"30ms"', '"30ms", backoff_max = "100ms"')
    run = boot(driver, text=text, other=short_lived, ready=False)

    starts = run.spawns("other")
    gaps = [(later.time - earlier.time) // (5 * MS) for earlier, later in pairwise(starts)]
    assert gaps[:4] == [6, 12, 20, 20]
    assert len(starts) == 8
    assert (run.result.exit_code, run.result.reason) == (3, "exit")
    assert [event.fields["generation"] for event in starts] == list(range(1, len(starts) + 1))
    assert run.ended.code == 0


def test_a_service_that_never_answers_the_echo_is_killed_and_restarted(boot: Boot) -> None:
    async def deaf(_boot: BootImage) -> int:
        await SleepUntil(NEVER)
        return 0

    async def driver(driver: Driver) -> ServiceRecord:
        await driver.pause(500 * MS)
        return await driver.record("other")

    run = boot(driver, text=SYSTEM + DRIVER + OTHER, other=deaf, ready=False)

    assert run.result.reason == "no echo"
    assert 3 <= len(run.spawns("other")) <= 5
    assert "init: up other" not in run.lines()


def test_a_service_that_closes_its_control_link_is_ended(boot: Boot) -> None:
    async def loner(boot: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, boot)
        _ = await server.step(NEVER)
        await CapClose(Slot(0))
        return await server.run()

    async def driver(driver: Driver) -> tuple[ServiceRecord, int]:
        await driver.pause(2 * REAP_MAX)
        return await driver.record("other"), len((await driver.reply(GetTasks(), TaskRows)).rows)

    run = boot(driver, text=SYSTEM + DRIVER + OTHER, other=loner, ready=False)

    record, rows = run.result
    assert record.reason == "control link closed"
    assert record.exit_signal == 9
    assert rows == 4


def test_a_service_that_is_not_ready_in_time_is_late_and_later_ok(boot: Boot) -> None:
    class Slow(Nothing):
        """Ready only some time after its start."""

        def __init__(self, at: int) -> None:
            self.at = at
            self.now = 0

        def ready(self) -> bool:
            return self.now >= self.at

        def next_time(self) -> Nanos | None:
            return Nanos(self.at) if self.now < self.at else None

        def on_time(self, now: Nanos) -> None:
            self.now = now

    async def slow(boot: BootImage) -> int:
        return await serve(Slow(boot.now + 250 * MS), TESTSVC, boot)

    async def driver(driver: Driver) -> tuple[ServiceRecord, ServiceRecord]:
        late = await driver.record("other")
        await driver.pause(400 * MS)
        return late, await driver.record("other")

    text = SYSTEM + DRIVER + OTHER.replace('"100ms"', '"100ms", every = "0s"')
    run = boot(driver, text=text, other=slow)

    late, later = run.result
    assert (late.health, later.health) == (Health.LATE, Health.OK)
    assert run.time("init: health other late") - run.time("init: up other") >= HEALTH
    assert run.time("other: ready") > run.time("init: health other late")


def junk(_boot: BootImage) -> bytes:
    return b"\xc1 is no MessagePack"


def unprintable(boot: BootImage) -> bytes:
    return status(boot, [Fact("\x01" * 30 + f"{nth:02}", 2**62) for nth in range(32)])


def silence(_boot: BootImage) -> None:
    return None


def end(_boot: BootImage) -> int:
    return 3


Misstep = Callable[[BootImage], bytes | int | None]


@pytest.mark.parametrize("nth", [1, 2], ids=["probe", "baseline"])
@pytest.mark.parametrize("misstep", [junk, unprintable, silence, end])
def test_whoever_waits_for_the_system_hears_even_if_a_service_tells_no_account(
    boot: Boot, misstep: Misstep, nth: int
) -> None:
    async def other(boot: BootImage) -> int:
        def script(request: Request[Any], count: int) -> bytes | int | None:
            if isinstance(request, Probe):
                return healthy(boot)
            return misstep(boot) if count >= nth else status(boot)

        return await play(boot, script)

    run = boot(nothing, text=SYSTEM + DRIVER + OTHER, other=other)  # begins with AwaitReady

    assert run.ended.code == 0
    assert run.time("init: stopped") - run.time("init: ready") < 3 * HEALTH + SECOND


@pytest.mark.parametrize("misstep", [junk, unprintable, silence])
@pytest.mark.parametrize("kind", [Probe, GetStatus])
def test_a_probe_that_is_answered_badly_or_not_is_asked_again(
    boot: Boot, kind: type, misstep: Misstep
) -> None:
    async def other(boot: BootImage) -> int:
        def script(request: Request[Any], count: int) -> bytes | int | None:
            if isinstance(request, kind) and count == 1:
                return misstep(boot)
            return healthy(boot) if isinstance(request, Probe) else status(boot)

        return await play(boot, script)

    async def driver(driver: Driver) -> None:
        await driver.pause(2 * HEALTH)

    run = boot(driver, text=SYSTEM + DRIVER + OTHER, other=other)

    took = run.time("init: health other ok") - run.time("init: up other")
    assert PROBE_PAUSE <= took < HEALTH + 2 * PROBE_PAUSE


def test_a_service_that_closes_the_link_its_answers_go_by_is_ended(boot: Boot) -> None:
    async def mute(boot: BootImage) -> int:
        return await play(boot, lambda _request, _count: None, keeps_link=False)

    async def driver(driver: Driver) -> ServiceRecord:
        await driver.pause(2 * REAP_MAX)
        return await driver.record("other")

    run = boot(driver, text=SYSTEM + DRIVER + OTHER, other=mute, ready=False)

    assert (run.result.reason, run.result.exit_signal) == ("answers link closed", 9)
    first, second = run.spawns("other")[:2]
    assert REAP_MAX <= second.time - first.time < REAP_MAX + 50 * MS


def test_a_service_that_ends_after_it_gave_its_control_link_away_comes_back(boot: Boot) -> None:
    async def giver(boot: BootImage) -> int:
        if boot.generation > 1:
            return await idle(boot)
        while True:
            message = await Recv((boot.endpoint,), NEVER)
            if message.cap is not None:
                if message.data == b"\x01":
                    await Send(message.cap, b"\x01", move=boot.control)
                    return 3
                bound = encode(Bound(boot.generation))
                await Send(message.cap, answer(message.data, 0, bound))

    async def driver(driver: Driver) -> ServiceRecord:
        routed = await driver.control.ask(Route("other"), await driver.ahead(SECOND))
        assert isinstance(routed, Answer), routed
        assert routed.cap is not None
        inbox = await EndpointCreate()
        await Send(routed.cap, b"\x01", move=(await LinkCreate(inbox, LinkTerms(1, 64, 0))).slot)
        given = await Recv((inbox,), await driver.ahead(SECOND))
        assert given.cap is not None
        await driver.pause(2 * REAP_MAX)
        return await driver.record("other")

    text = SYSTEM + DRIVER.replace('"timed" }', '"other" }') + OTHER
    run = boot(driver, text=text, other=giver, ready=False)

    assert (run.result.state, run.result.generation) == (TaskState.UP, 2)
    assert run.result.exit_code == 3
    assert run.ended.code == 0


# ---------------------------------------------------------------- what init tells


def test_evidence_that_is_too_long_is_told_by_its_counts_and_says_so() -> None:
    exits = {f"service-{nth}": [0, 0] for nth in range(400)}

    short = evidence_of({"exits": {"a": [0, 9]}, "tasks": 1})
    long = evidence_of({"exits": exits, "dirty": ["a"], "tasks": 1})

    assert json.loads(short) == {"exits": {"a": [0, 9]}, "tasks": 1}
    assert len(long) <= EVIDENCE_SIZE_MAX
    assert json.loads(long) == {
        "exits": 400,
        "dirty": 1,
        "tasks": 1,
        "counted": ["exits", "dirty"],
    }


def test_two_answers_that_wait_for_the_same_are_two(boot: Boot) -> None:
    record = Record(planned=boot(nothing).plan.services[0])

    first, second = (Held(record, 1, b"header", None, None) for _ in range(2))

    assert first != second


def test_the_task_list_is_the_kernels(boot: Boot) -> None:
    async def driver(driver: Driver) -> TaskRows:
        return await driver.reply(GetTasks(), TaskRows)

    run = boot(driver)

    rows = {row.name: row for row in run.result.rows}
    assert list(rows) == [INIT_NAME, "timed", "driver"]
    assert run.result.live == 3
    for name, row in rows.items():
        (spawned,) = run.spawns(name)
        assert (row.pid, row.generation, row.state) == (spawned.pid, 1, TaskState.UP)
        assert row.service == service_id(name)


def test_audit_lines_of_the_kernel_are_kept_and_paged(boot: Boot) -> None:
    async def driver(driver: Driver) -> tuple[AuditRows, AuditRows]:
        for _ in range(20):
            with pytest.raises(AbiError):
                await SetTaskQos(None, 2)
        first = await driver.reply(GetAudit(0), AuditRows)
        return first, await driver.reply(GetAudit(len(first.lines)), AuditRows)

    first, second = boot(driver).result

    assert (first.first, first.total, len(first.lines)) == (0, 20, 16)
    assert (second.first, len(second.lines), second.dropped) == (16, 4, 0)
    assert "reason=unauthorized_escalation" in first.lines[0]


def test_accounts_are_those_at_ready_and_now(boot: Boot) -> None:
    async def driver(driver: Driver) -> tuple[Resources, Resources]:
        own = await driver.reply(GetResources(INIT_NAME), Resources)
        return own, await driver.reply(GetResources("timed"), Resources)

    own, timed = boot(driver).result

    assert own.ready.generation == own.now.generation == 1
    assert own.ready.counters[:4] == own.now.counters[:4]
    assert timed.ready.generation == timed.now.generation == 1
    assert {fact.name: fact.value for fact in timed.now.facts}["timers"] == 0
    assert timed.ready.counters[:4] == timed.now.counters[:4]
    assert (own.tasks_ready, own.tasks_now) == (3, 3)


def test_the_account_of_a_service_that_does_not_answer_is_empty_in_time(boot: Boot) -> None:
    async def driver(driver: Driver) -> tuple[Resources, int]:
        before = await Now()
        resources = await driver.reply(GetResources("driver"), Resources)
        return resources, await Now() - before

    resources, took = boot(driver).result

    assert resources.now.generation == 0
    assert 500 * MS <= took < 510 * MS


# ---------------------------------------------------------------- the end


def test_shutdown_stops_the_services_in_reverse_order(boot: Boot) -> None:
    async def driver(driver: Driver) -> None:
        down = await driver.reply(Shutdown(), ShuttingDown)
        assert down.services == 3
        await driver.server.run()

    run = boot(driver, text=SYSTEM + OTHER + DRIVER)

    exits = [event.fields["name"] for event in run.events if event.kind is EventKind.EXIT]
    assert exits == ["driver", "other", "timed", INIT_NAME]
    stopped = run.evidence("init: stopped")
    assert stopped["dirty"] == []
    assert stopped["tasks"] == 1
    assert (stopped["links"], stopped["queued"]) == (0, 0)
    assert run.ended.code == 0


def test_a_service_that_ignores_stop_is_killed_after_the_bound_and_the_run_is_dirty(
    boot: Boot,
) -> None:
    async def stubborn(boot: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, boot)
        for _ in range(4):  # Bind, Health, and GetStatus twice
            _ = await server.step(NEVER)
        await SleepUntil(NEVER)
        return 0

    text = SYSTEM + DRIVER + OTHER.replace("100ms", "3s")
    run = boot(nothing, text=text, other=stubborn)

    assert run.ended.code == 1
    stopped = run.evidence("init: stopped")
    assert stopped["dirty"] == ["other"]
    assert stopped["exits"]["other"][1] == 9
    driver_end = next(e.time for e in run.events if e.kind is EventKind.EXIT)
    stop_max = run.plan.by_name["other"].stop_max
    assert stop_max <= run.time("init: stopped") - driver_end < stop_max + 50 * MS


def test_the_exit_code_of_the_last_service_is_the_systems(boot: Boot) -> None:
    async def fail(_driver: Driver) -> None:
        raise RuntimeError("planned by the test")

    run = boot(fail, crashes=1)

    assert run.ended.code == 1
    assert run.evidence("init: stopped")["dirty"] == ["driver"]


def test_the_status_of_a_service_reaches_its_client_too(boot: Boot) -> None:
    async def driver(driver: Driver) -> Any:
        return await driver.clients["timed"].call(GetStatus(), await driver.ahead(SECOND))

    status = boot(driver).result

    assert status.generation == 1
    assert len(status.counters) == 21


# ---------------------------------------------------------------- the Nth failure of every trap


SWEPT: Final = [
    (trap, status)
    for trap, statuses in FAILURES.items()
    for status in statuses
    if trap in {LinkCreate, Send, Recv, Spawn, Wait, ConsoleWrite}
]
DRIVER_PROGRAM: Final = ('program = "driver"', 'program = "demo.testsvc"')
OCCURRENCES: Final = 14  # of each trap in a small boot with one restart; the last ones are past it


@pytest.mark.parametrize("nth", range(1, OCCURRENCES + 1))
@pytest.mark.parametrize(
    ("trap", "status"), SWEPT, ids=[f"{trap.__name__}-{status.name}" for trap, status in SWEPT]
)
def test_init_survives_the_failure_of_any_of_its_traps(
    trap: type[Trap[Any]], status: Status, nth: int
) -> None:
    async def driver(boot: BootImage) -> int:
        hands = Driver(boot)
        try:
            await hands.begin(ready=False)
        except AssertionError:
            return 3  # an answer of init's was lost; what matters here is init
        _ = await hands.ask(Restart("timed"))
        await hands.pause(100 * MS)
        _ = await hands.ask(Shutdown())
        return 0

    plan = make_plan(parse((SYSTEM + DRIVER).replace(*DRIVER_PROGRAM).encode(), Path("test.toml")))
    programs = {
        "timed": load_program(PROGRAMS["timed"]),
        "demo.testsvc": Program(name="demo.testsvc", main=driver, digest=""),
    }
    failure = NthFailure(trap=trap, nth=nth, status=status, task=INIT_NAME)
    kernel = SimKernel(
        programs,
        seed=1,
        recorder=lambda _event: None,
        limits=limits_of(plan),
        faults=Faults(FaultPlan(nth=(failure,))),
    )

    ended = kernel.run(init_program(plan, 1), b"", until=Nanos(kernel.now + 30 * SECOND))

    assert kernel.crashes == []
    assert ended.code in {0, 1}
