"""A whole system while one of its services imports for longer than anybody waits for it."""

import json
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, ConsoleWrite, Event, EventKind, Nanos, Now, PolicyRead, Program
from nexus.init import plan as plan_module
from nexus.init.ground import init_program, limits_of
from nexus.init.plan import make_plan
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.init.reasons import Reason
from nexus.init.system import parse
from nexus.kernel.linux import LinuxKernel
from nexus.protocols.init import GetSystem, Restart, Restarting, SystemInfo
from nexus.testing.rig import REPORT_LINE, program, reporting
from tests.fakes.initrig import MS, SECOND, Driver
from tests.linux import exec_programs

pytestmark = [pytest.mark.linux, pytest.mark.slow]

READINESS: Final = 800 * MS  # of the slow service
WATCHDOG: Final = Nanos(200 * MS)  # of the service manager
LOOKED: Final = 4 * SECOND
ANSWER_MAX: Final = 500 * MS  # less than init would be held up by the import

assert ANSWER_MAX < READINESS

SYSTEM: Final = """
[system]
name = "slow"
total_size = "4MiB"
owner_size = "256KiB"
ends_with = "driver"

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]

[service.slow]
program = "slow"
isolation = "exec"
health = { deadline = "800ms" }
restart = { backoff = "100ms" }

[service.driver]
program = "driver"
capabilities = ["proof.control"]
health = { deadline = "20s", every = "0s" }
"""


async def driver(boot: BootImage) -> int:
    """Asks init again and again, and has policyd start anew, which the policy page must show."""
    hands = Driver(boot)
    await hands.begin(ready=False)
    end = await hands.ahead(LOOKED)
    slowest = 0
    words = set()
    asked_at = await Now() + LOOKED // 4
    while (now := await Now()) < end:
        await hands.reply(GetSystem(), SystemInfo)
        slowest = max(slowest, await Now() - now)
        words.add(tuple(await PolicyRead()))
        if asked_at and now >= asked_at:
            asked_at = 0
            await hands.reply(Restart("policyd"), Restarting)
        await hands.pause(10 * MS)
    slow = await hands.record("slow")
    policyd = await hands.record("policyd")
    found = {
        "slowest": slowest,
        "words": sorted(words),
        "policyd": policyd.generation,
        "slow": [slow.generation, slow.reason, slow.exit_signal, slow.spawn_refused],
    }
    await ConsoleWrite("driver: result", json.dumps(found).encode())
    return 0


def test_a_system_goes_on_while_one_of_its_services_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Init answers, tells its service manager that it lives, raises the policy page, and treats
    the slow service as any that is not ready in time."""
    sources = {
        name: ProgramSource(name=name, module=module, protocols=("nexus.protocols.testsvc",))
        for name, module in (("driver", "tests.fakes.initrig"), ("slow", "nexus.services.timed"))
    }
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **sources})
    plan = make_plan(parse(SYSTEM.encode(), tmp_path / "slow.toml"))
    programs = {
        "policyd": load_program(plan_module.sources_of(plan)["policyd"]),
        "driver": program("driver", reporting(driver)),
        "slow": Program(
            name="slow",
            main=exec_programs.gives_back,
            digest="",
            entry="tests.linux.exec_programs:sleeps 13",
        ),
    }
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "manager"))
    manager.setblocking(False)
    signs: list[int] = []  # times at which init showed that it lives
    events: list[Event] = []

    def record(event: Event) -> None:
        events.append(event)
        _take(manager, signs, kernel.now)

    kernel = LinuxKernel(
        programs,
        recorder=record,
        limits=limits_of(plan),
        notify_socket=str(tmp_path / "manager"),
    )
    ended = kernel.run(
        init_program(plan, 1, watchdog=WATCHDOG), b"", until=Nanos(kernel.now + 30 * SECOND)
    )
    _take(manager, signs, kernel.now)
    manager.close()

    lines = [str(each.fields["line"]) for each in events if each.kind is EventKind.CONSOLE]
    assert ended.code == 0, lines
    found = _result(events)
    assert found["slowest"] < ANSWER_MAX
    assert len(signs) >= LOOKED // WATCHDOG, "at half of the interval, with room"
    assert found["policyd"] == 2
    generations = [generation for generation, _ in found["words"]]
    assert max(generations) >= 3, "policyd came, went and came"
    assert {available for _, available in found["words"]} == {False, True}
    generation, reason, number, refused = found["slow"]
    assert (reason, number, refused) == (Reason.NO_ECHO, 9, 0)
    # 800 ms each, and pauses of 100, 200 and 400 ms between them
    starts = [
        each.time
        for each in events
        if each.fields.get("line") in ("init: start slow", "init: restart slow")
    ]
    assert 3 <= generation <= len(starts)
    gaps = [after - before for before, after in pairwise(starts)]
    assert all(gap >= READINESS + 100 * MS * 2**number for number, gap in enumerate(gaps)), (
        "killed at its deadline, and started again after a pause that doubles"
    )
    assert gaps[0] < 3 * READINESS, "it imports for 13 s"


def _take(manager: socket.socket, signs: list[int], now: Nanos) -> None:
    while True:
        try:
            text = manager.recv(4096)
        except BlockingIOError:
            return
        if text == b"WATCHDOG=1":
            signs.append(now)


def _result(events: list[Event]) -> dict[str, Any]:
    """What the driver said last, or why it failed."""
    for event in events:
        if event.fields.get("line") in ("driver: result", REPORT_LINE):
            evidence: Any = event.fields["evidence"]
            found = json.loads(evidence) if isinstance(evidence, str | bytes) else evidence
            assert "text" not in found, found["text"]
            return dict(found)
    raise AssertionError([str(each.fields.get("line")) for each in events])
