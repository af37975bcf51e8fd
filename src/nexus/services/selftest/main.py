"""The program: find the services, wait for the whole system, climb, report."""

from typing import Any, Final

import msgspec

from nexus.abi import (
    EVIDENCE_SIZE_MAX,
    INIT_NAME,
    AbiError,
    BootImage,
    ConsoleWrite,
    Nanos,
    TaskStats,
)
from nexus.ipc import Client, Exchange, Peers, RetryBudget, RetryTokens, retry_until
from nexus.protocols.execd import PROTOCOL as EXECD
from nexus.protocols.exportd import PROTOCOL as EXPORTD
from nexus.protocols.init import (
    AwaitReady,
    GetSystem,
    Health,
    Ready,
    SystemInfo,
    TaskState,
    TrialState,
)
from nexus.protocols.interactive import PROTOCOL as INTERACTIVE
from nexus.protocols.keystored import PROTOCOL as KEYSTORED
from nexus.protocols.ladder import BAD_BOOT, SELFTEST, boot_of, last_boot
from nexus.protocols.ladder import Rung as Row
from nexus.protocols.ladder import rung as row_of
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.logd import StreamOpened
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.rngd import PROTOCOL as RNGD
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.runtime import Call, Server, ServiceConfig
from nexus.services.selftest.climb import Climb
from nexus.services.selftest.end_rungs import held
from nexus.services.selftest.exec_rungs import ON_DEMAND
from nexus.services.selftest.own_memory import (
    RING_SIZE,
    OwnRing,
    is_settled,
    open_stream,
    shared,
)
from nexus.services.selftest.rung import RUNG_LINE_SIZE_MAX, Evidence, Rung, RungAbsent, RungFailed
from nexus.services.selftest.rungs import RUNGS
from nexus.services.selftest.stick import open_stick
from nexus.wire import Protocol, ReplyStatus

START_BUDGET: Final = Nanos(30_000_000_000)  # ns; a whole system starts in a second, CI in ten
CONNECT_ATTEMPTS_MAX: Final = 200
CONNECT_BACKOFF: Final = Nanos(1_000_000)  # ns
EXIT_RED: Final = 1
OTHERS_MAX: Final = Nanos(8_000_000_000)  # ns; an interpreter of its own imports for a second
OTHERS_BACKOFF: Final = Nanos(5_000_000)  # ns
TAKEN_TWICE: Final = frozenset({("execd", "logd"), ("execd", "metricsd"), ("exportd", "metricsd")})
"""Client and server of links that are taken twice: by the service itself and by a library of it."""
END_RUNG: Final = 144

PROTOCOLS: Final[dict[str, Protocol]] = {
    "timed": TIMED,
    "demo.testsvc": TESTSVC,
    "demo.interactive": INTERACTIVE,
    "policyd": POLICYD,
    "logd": LOGD,
    "rngd": RNGD,
    "statefsd": STATEFSD,
    "keystored": KEYSTORED,
    "metricsd": METRICSD,
    "execd": EXECD,
    "exportd": EXPORTD,
    "updated": UPDATED,
}


class Selftest:
    """What the client answers on its own endpoint: init's meta requests, and nothing else."""

    def handle(self, call: Call, _request: object) -> Any:
        """Nobody has business with this task."""
        raise call.refuse(ReplyStatus.DENIED)


async def main(boot: BootImage) -> int:
    """Exit code 0 if every rung held, 1 if one failed or the system did not come up."""
    config = ServiceConfig.of(boot)
    peers = Peers(boot, config.trace_seed)
    server = Server(Selftest(), TESTSVC, boot, peers.caller)
    until = Nanos(boot.now + START_BUDGET)
    _ = await server.step(until)
    if config.boot == BAD_BOOT and UPDATED.name in config.uses:
        return await _until_stopped(server, peers, until)
    climb = await _connect(boot, config, peers, until)
    if isinstance(climb, str):
        await _fail("start", climb)
        return EXIT_RED
    started = await climb.control.start(AwaitReady(), until)
    # The answer to a later question on that link: init knows that we wait, and asks nothing
    # after the health probe that we would have to serve while we climb.
    climb.services = frozenset(row.name for row in (await climb.tasks()).rows)
    _ = await server.step(until)
    ready = await climb.control.finish(started)
    if not isinstance(ready, Ready):
        missing = [f"{row.client}-{row.server}" for row in await climb.links() if not row.taken]
        await _fail("start", f"the system is not ready: {ready!r}, not linked: {missing}")
        return EXIT_RED
    climb.held_at_ready = held(await TaskStats())
    return await _climb(climb)


async def _until_stopped(server: Server, peers: Peers, until: Nanos) -> int:
    """The life of this client in the boot of a bad set, which init ends: nobody else has anything
    to do in it. A boot that is no trial is not that one, and ends at once. One that init does not
    end is a run that the runner ends."""
    control = await peers.control(until)
    if isinstance(control, Exchange):
        system = await control.call(GetSystem(), until)
        if isinstance(system, SystemInfo) and system.trial is TrialState.NONE:
            return 0
    return await server.run()


async def _connect(
    boot: BootImage, config: ServiceConfig, peers: Peers, until: Nanos
) -> Climb | str:
    """The clients of all planned uses that start with the system, or why one is missing."""
    control = await peers.control(until)
    if not isinstance(control, Exchange):
        return f"no link to init: {control!r}"
    climb = Climb(boot, config, peers, control)
    await _await_others(climb, until)
    budget = RetryBudget(attempts_max=CONNECT_ATTEMPTS_MAX, backoff=CONNECT_BACKOFF, deadline=until)
    for name in (each for each in config.uses if each not in ON_DEMAND):
        client = await peers.connect(name, PROTOCOLS[name], budget)
        if not isinstance(client, Client):
            return f"no link to {name}: {client!r}"
        climb.clients[name] = client
    return await _share(climb, until) or climb


async def _await_others(climb: Climb, until: Nanos) -> None:
    """Wait until the others work and have found whom they use; our own planned links are what the
    system is then not ready without. A service may have two links to another, one of its own and
    one of a library's, of which the plan knows one: what is held at ready is to have both."""
    deadline = Nanos(min(until, await climb.ahead(OTHERS_MAX)))
    for row in (await climb.tasks()).rows:
        if row.state is not TaskState.ON_DEMAND and row.name not in (INIT_NAME, climb.boot.name):
            await _until_well(climb, row.name, deadline)
    budget = RetryBudget(
        attempts_max=CONNECT_ATTEMPTS_MAX, backoff=OTHERS_BACKOFF, deadline=deadline
    )
    climb.lacking = await retry_until(lambda: _lacking(climb), bool, budget, RetryTokens())


async def _lacking(climb: Climb) -> list[str]:
    """The links that others will have, and have not taken yet or not often enough."""
    tasks = (await climb.tasks()).rows
    awaited = {row.name for row in tasks if row.state is not TaskState.ON_DEMAND}
    return [
        f"{row.client}-{row.server}"
        for row in await climb.links()
        if {row.client, row.server} <= awaited
        and row.client != climb.boot.name
        and row.taken <= ((row.client, row.server) in TAKEN_TWICE)
    ]


async def _until_well(climb: Climb, name: str, deadline: Nanos) -> None:
    """Wait for one of them. Its pauses begin anew: whoever comes last is not waited for long."""
    budget = RetryBudget(
        attempts_max=CONNECT_ATTEMPTS_MAX, backoff=OTHERS_BACKOFF, deadline=deadline
    )
    _ = await retry_until(
        lambda: climb.record(name),
        lambda record: record.health is not Health.OK,
        budget,
        RetryTokens(),
    )


async def _share(climb: Climb, until: Nanos) -> str:
    """Have logd drain a ring of ours and metricsd read a page; what went wrong, or nothing."""
    if "logd" in climb.clients:
        ring = climb.own_ring = OwnRing(await shared(RING_SIZE))
        opened = await open_stream(climb.client("logd"), ring.memory, until)
        if not isinstance(opened, StreamOpened):
            return f"logd does not drain our ring: {opened!r}"
    if "updated" in climb.clients:
        _ = await open_stick(climb)  # whose window this task holds from now on
    if "metricsd" in climb.clients:
        await climb.metrics.begin()
        if not await is_settled(climb.metrics, until):
            return f"metricsd does not read our page: {climb.metrics.counts()!r}"
    return ""


async def _climb(climb: Climb) -> int:
    """Every rung of this boot whose services this system has, in order; the others are the
    runner's to name."""
    rungs = _of_boot(climb)
    climb.planned = [rung.number for rung in rungs if not (rung.stated or rung.number == END_RUNG)]
    behind: set[int] = set()  # failed, or blocked by one that failed
    for rung in rungs:
        blocked = behind.intersection(row_of(rung.number).after)
        if blocked or not await _holds(climb, rung):
            behind.add(rung.number)
    return EXIT_RED if climb.failed else 0


def _of_boot(climb: Climb) -> list[Rung]:
    rungs = [rung for rung in RUNGS if _is_in_system(row_of(rung.number), climb)]
    last = last_boot(row_of(rung.number) for rung in rungs)
    return [rung for rung in rungs if rung.always or _boot_of(rung, last) == climb.config.boot]


def _boot_of(rung: Rung, last: int) -> int:
    return boot_of(row_of(rung.number), last) if rung.boot is None else rung.boot


def _is_in_system(row: Row, climb: Climb) -> bool:
    return climb.services.issuperset(row.services)


async def _holds(climb: Climb, rung: Rung) -> bool:
    """Climb one rung and report it; whether it held."""
    row = row_of(rung.number)
    before = await climb.used_slots()
    try:
        evidence = await rung.check(climb)
    except RungAbsent:
        climb.planned.remove(rung.number)
        return True
    except RungFailed as failure:
        why = str(failure)
    except AbiError as error:
        why = f"the kernel refused a trap of the rung: {error}"
    else:
        if rung.stated:
            await state(row, evidence)
        else:
            climb.passed.append(rung.number)
            await report(row, evidence)
        return True
    climb.failed.append(rung.number)
    await climb.let_go(before)
    await _fail(row.marker.removesuffix(" ok").removeprefix("SELFTEST: "), why)
    return False


async def report(row: Row, evidence: Evidence) -> None:
    """Print the marker of a rung whose evidence was compared, and the evidence next to it."""
    encoded = msgspec.json.encode(evidence)
    assert len(encoded) <= EVIDENCE_SIZE_MAX, f"#{row.number}: evidence of {len(encoded)} bytes"
    await ConsoleWrite(row.marker, encoded)


async def state(row: Row, evidence: Evidence) -> None:
    """Say what was measured for a rung whose marker somebody else prints."""
    await ConsoleWrite(f"{SELFTEST}: measured #{row.number}", msgspec.json.encode(evidence))


async def _fail(name: str, why: str) -> None:
    """Print that a rung failed, and why."""
    text = "".join(char if char.isprintable() else "?" for char in f"SELFTEST: {name} FAIL {why}")
    await ConsoleWrite(text.encode()[:RUNG_LINE_SIZE_MAX].decode(errors="ignore"))
