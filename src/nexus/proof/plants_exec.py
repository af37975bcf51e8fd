"""Saboteurs of execd's and exportd's rungs: 23-26, 37, 38, 55, 84-94, 129 and 130."""

# ruff: noqa: SLF001 (saboteurs break what is private)

import json
from functools import partial
from typing import Any, Final

import msgspec

from nexus.abi import BootImage, ConsoleWrite, Nanos, SleepUntil, service_id
from nexus.init.launches import Launches
from nexus.init.record import Record
from nexus.proof.plants_init import missing, wait_longer, withheld
from nexus.proof.plants_keys import execute_instead
from nexus.proof.plants_policy import route_to_logd
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.execd import Ended, Exec, GetPrograms, ProgramRows, Report, Started, Wait
from nexus.protocols.init import Launched
from nexus.protocols.ladder import SELFTEST, Ground
from nexus.runtime import Call, Server
from nexus.services.demo import exit0, exit42, hello
from nexus.services.execd.service import Execd
from nexus.services.logd.streams import Stream, Streams
from nexus.services.selftest.exec_rungs import (
    BAD_NONCE,
    COPY,
    EXECD_NAME,
    EXIT0,
    EXIT42,
    HELLO,
    NOBODY,
)
from nexus.services.selftest.export_rungs import EXPORTD_NAME
from nexus.wire import nonce_of

SIM: Final = frozenset({Ground.SIM})
LINUX: Final = frozenset({Ground.LINUX, Ground.VM})
BOTH: Final = SIM | LINUX
ENTRY: Final = "nexus.proof.planted_exportd:sabotaged"
LATE: Final = 38
INSIDE: Final = (LATE, 130)  # broken in exportd itself: planted_exportd
SILENT: Final = "demo: started"  # what a program says whose own line execd prints
LINGER: Final = Nanos(100_000_000)  # ns that demo.exit0 lives while its end is already told
FIRST: Final = 1  # generation
SECOND: Final = 2


def _table_left_empty() -> None:
    """#37: nothing of it is told; what it says there it starts all the same."""

    def rows(_execd: Execd, _request: GetPrograms) -> ProgramRows:
        return ProgramRows(0, [])

    def evidence(execd: Execd) -> dict[str, Any]:
        told: dict[str, Any] = original(execd)
        return {**told, "programs": {}}

    _ = replace(Execd, "_program_rows", rows)
    original = replace(Execd, "evidence", evidence)


def _digest_not_compared() -> None:
    """#84."""

    def is_program(_launches: Launches, _record: Record, _digest: str) -> bool:
        return True

    _ = replace(Launches, "_is_program", is_program)


def _on_launched(around: Any) -> None:
    """Have `around` see each answer of init to a launch, and perhaps give another."""

    async def launch(execd: Execd, call: Call, request: Exec, *rest: Any) -> Launched:
        launched: Launched = await original(execd, call, request, *rest)
        seen = await around(execd, request.program, launched)
        return launched if seen is None else seen

    original = replace(Execd, "_launch", launch)


def _line_of_the_child(module: Any, program: str) -> None:
    """#85, #87, #90: execd says in its child's place what the child does not say."""
    line: str = module.LINE

    async def told(_execd: Execd, name: str, launched: Launched) -> None:
        if name == program and launched.generation == FIRST:
            evidence = {"pid": launched.pid, "generation": launched.generation}
            await ConsoleWrite(line, json.dumps(evidence).encode())

    _ = replace(module, "LINE", SILENT)
    _on_launched(told)


def _never_started() -> None:
    """#86: the second start of demo.hello, which is that rung's own."""
    seen = 0

    async def exec_(execd: Execd, call: Call, request: Exec) -> Started:
        nonlocal seen
        seen += request.program == HELLO
        if request.program == HELLO and seen == SECOND:
            return Started(NOBODY - 1, SECOND)
        started: Started = await original(execd, call, request)
        return started

    original = replace(Execd, "_exec", exec_)


def _told_before_reaped() -> None:
    """#88: demo.exit0 is said to have exited when it has just been started."""

    async def told(_execd: Execd, name: str, launched: Launched) -> None:
        if name == EXIT0:
            who = f"name={EXIT0} generation={launched.generation}"
            line = f"execd: child exited pid={launched.pid} code={exit0.CODE} {who}"
            await ConsoleWrite(line, json.dumps({"name": name}).encode())

    async def say(execd: Execd, line: str, evidence: Any) -> None:
        if not (line.startswith("execd: child exited") and evidence["name"] == EXIT0):
            await original(execd, line, evidence)

    async def lingering(boot: BootImage) -> int:
        code: int = await main(boot)
        _ = await SleepUntil(Nanos(boot.now + LINGER))
        return code

    original = replace(Execd, "_say", say)
    main = replace(exit0, "main", lingering)
    _on_launched(told)


def _unknown_ended_well() -> None:
    """#89."""

    def wait(execd: Execd, call: Call, request: Wait) -> Any:
        if request.pid == NOBODY:
            return Ended(request.pid, FIRST, 0, 0, 0)
        return original(execd, call, request)

    original = replace(Execd, "_wait", wait)


def _anybody_reports() -> None:
    """#91."""
    _ = replace(Execd, "_is_parent", lambda _execd, _call: True)


def _pid_of_another() -> None:
    """#92: the record of demo.exit42 carries the pid of demo.exit0."""
    pids: list[int] = []

    async def seen(_execd: Execd, name: str, launched: Launched) -> None:
        if name == EXIT0:
            pids.append(launched.pid)

    def write(execd: Execd, report: Report, *rest: Any) -> None:
        if report.crash.name == EXIT42 and pids:
            crash = msgspec.structs.replace(report.crash, pid=pids[-1])
            report = msgspec.structs.replace(report, crash=crash)
        original(execd, report, *rest)

    _on_launched(seen)
    original = replace(Execd, "_write_record", write)


def _denied_after_the_start() -> None:
    """#93."""

    async def exec_(execd: Execd, call: Call, request: Exec) -> Started:
        if execd._is_requester(call, request):
            started: Started = await original(execd, call, request)
            return started
        own = Exec(
            request.program,
            SELFTEST,
            request.arguments,
            request.environment,
            request.restart,
        )
        _ = await original(execd, call, own)
        await execd._authorise(call, request)
        raise AssertionError("another's name is denied")

    original = replace(Execd, "_exec", exec_)


def _malformed_dropped() -> None:
    """#94: the answer to the frame of that rung; others belong to #73."""

    async def send(server: Server, slot: Any, frame: bytes, **options: Any) -> bool:
        if server.boot.name == EXECD_NAME and nonce_of(frame) == BAD_NONCE:
            return True
        sent: bool = await original(server, slot, frame, **options)
        return sent

    original = replace(Server, "_send", send)


def _ring_freed_at_exit() -> None:
    """#129: what is left in the ring of a copy when it ends is read by nobody."""

    def drain_to_end(streams: Streams, stream: Stream, *rest: Any) -> None:
        if stream.sender.service != service_id(COPY):
            original(streams, stream, *rest)

    original = replace(Streams, "drain_to_end", drain_to_end)


def _inside_sim(number: int) -> None:
    """The simulator runs exportd in this process."""
    from nexus.proof.planted_exportd import plant  # which imports what init must not

    plant(number)
    if number == LATE:
        wait_longer()


def _inside_linux(number: int) -> None:
    """exportd has an interpreter of its own."""
    execute_instead(EXPORTD_NAME, f"{ENTRY} {number}")
    if number == LATE:
        wait_longer()


SABOTEURS: Final = (
    Saboteur(rung=23, grounds=BOTH, plant=partial(missing, EXECD_NAME)),
    Saboteur(rung=24, grounds=BOTH, plant=partial(withheld, EXECD_NAME)),
    Saboteur(rung=37, grounds=BOTH, plant=_table_left_empty),
    Saboteur(rung=55, grounds=BOTH, plant=partial(route_to_logd, EXECD_NAME)),
    Saboteur(rung=84, grounds=BOTH, plant=_digest_not_compared),
    Saboteur(rung=85, grounds=BOTH, plant=partial(_line_of_the_child, hello, HELLO)),
    Saboteur(rung=86, grounds=BOTH, plant=_never_started),
    Saboteur(rung=87, grounds=BOTH, plant=partial(_line_of_the_child, exit0, EXIT0)),
    Saboteur(rung=88, grounds=BOTH, plant=_told_before_reaped),
    Saboteur(rung=89, grounds=BOTH, plant=_unknown_ended_well),
    Saboteur(rung=90, grounds=BOTH, plant=partial(_line_of_the_child, exit42, EXIT42)),
    Saboteur(rung=91, grounds=BOTH, plant=_anybody_reports),
    Saboteur(rung=92, grounds=BOTH, plant=_pid_of_another),
    Saboteur(rung=93, grounds=BOTH, plant=_denied_after_the_start),
    Saboteur(rung=94, grounds=BOTH, plant=_malformed_dropped),
    Saboteur(rung=25, grounds=BOTH, plant=partial(missing, EXPORTD_NAME)),
    Saboteur(rung=26, grounds=BOTH, plant=partial(withheld, EXPORTD_NAME)),
    Saboteur(rung=129, grounds=BOTH, plant=_ring_freed_at_exit),
    *(Saboteur(rung=each, grounds=SIM, plant=partial(_inside_sim, each)) for each in INSIDE),
    *(Saboteur(rung=each, grounds=LINUX, plant=partial(_inside_linux, each)) for each in INSIDE),
)
