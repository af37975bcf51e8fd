"""Services of one's own as the system file names them: forked, exec'd, and under asyncio."""

import json
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, ConsoleWrite, Event, EventKind, Nanos
from nexus.init import plan as plan_module
from nexus.init.ground import init_program, limits_of
from nexus.init.plan import make_plan
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.init.system import parse
from nexus.kernel.linux import LinuxKernel
from nexus.protocols.meta import GetStatus, ServiceStatus
from nexus.testing.rig import REPORT_LINE, program, reporting
from tests.fakes import initrig
from tests.fakes.adder import Add, AdderStatus, Sum
from tests.fakes.initrig import SECOND, Driver
from tests.fakes.own import PROTOCOL

pytestmark = [pytest.mark.linux, pytest.mark.slow]

ROOT: Final = Path(__file__).resolve().parents[2]
SYSTEM: Final = """
[system]
name = "own"
total_size = "4MiB"
owner_size = "256KiB"
ends_with = "driver"
path = ["."]

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]

[service.logd]
program = "logd"
stage = "core"
capabilities = ["policy.delegate"]
uses = { policyd = {} }

[service.adder]
module = "tests.fakes.own:Plain"
protocol = "tests.fakes.own"

[service.doubling]
module = "tests.fakes.own:DoublingAdder"
protocol = "tests.fakes.own"
isolation = "exec"
uses = { adder = {}, logd = { sync = false } }
settings = { offset = 7 }
health = { deadline = "10s" }

[service.asyncio]
module = "tests.fakes.own:ordinary"
protocol = "tests.fakes.own"
ordinary = true
double = "tests.fakes.own:Lazy"
isolation = "exec"
uses = { adder = {}, logd = { sync = false } }
health = { deadline = "10s" }

[service.driver]
program = "driver"
capabilities = ["proof.control"]
uses = { adder = {}, doubling = {}, asyncio = {} }
health = { deadline = "20s", every = "0s" }
"""


async def driver(boot: BootImage) -> int:
    hands = Driver(boot)
    await hands.begin()
    found: dict[str, Any] = {}
    for name in ("adder", "doubling", "asyncio"):
        client = hands.clients[name]
        sums = [
            await client.call(Add(*pair), await hands.ahead(10 * SECOND))
            for pair in ((1, 2), (900, 900), (3, 4))
        ]
        found[name] = [
            each.value if isinstance(each, Sum) else repr(getattr(each, "status", each))
            for each in sums
        ]
        status = await client.call(GetStatus(), await hands.ahead(10 * SECOND))
        assert isinstance(status, ServiceStatus), status
        found[f"{name} facts"] = [fact.name for fact in status.facts]
    await ConsoleWrite("driver: result", json.dumps(found).encode())
    return 0


def test_the_same_service_code_runs_forked_execd_and_under_asyncio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = ProgramSource(
        name="driver", module="tests.fakes.initrig", protocols=("nexus.protocols.testsvc",)
    )
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, "driver": source})
    for name in ("adder", "doubling", "asyncio"):
        monkeypatch.setitem(initrig.PROTOCOLS, name, PROTOCOL)
    plan = make_plan(parse(SYSTEM.encode(), ROOT / "own-test.toml"))
    sources = plan_module.sources_of(plan)
    programs = {
        **{name: load_program(each) for name, each in sources.items() if name != "driver"},
        "driver": program("driver", reporting(driver)),
    }
    events: list[Event] = []
    kernel = LinuxKernel(programs, recorder=events.append, limits=limits_of(plan))

    ended = kernel.run(init_program(plan, 1), b"", until=Nanos(kernel.now + 40 * SECOND))

    assert ended.code == 0, _console(events)
    found = _result(events)
    assert found["adder"] == [3, repr(AdderStatus.TOO_LARGE), 7]
    assert found["doubling"] == [13, repr(AdderStatus.TOO_LARGE), 21]
    assert found["asyncio"] == [103, repr(AdderStatus.TOO_LARGE), 107]
    assert "ordinary" in found["asyncio facts"]
    assert "offset" in found["doubling facts"]
    assert "asyncio: ready" in _console(events)


def _console(events: list[Event]) -> list[str]:
    return [str(each.fields["line"]) for each in events if each.kind is EventKind.CONSOLE]


def _result(events: list[Event]) -> dict[str, Any]:
    """What the driver said last, or why it failed."""
    for event in events:
        if event.fields.get("line") in ("driver: result", REPORT_LINE):
            evidence: Any = event.fields["evidence"]
            found = json.loads(evidence) if isinstance(evidence, str | bytes) else evidence
            assert "text" not in found, found["text"]
            return dict(found)
    raise AssertionError(_console(events))
