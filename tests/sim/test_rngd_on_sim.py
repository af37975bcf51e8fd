"""rngd, policyd and logd under the real init on the simulated kernel, with a device on the bus."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest

from nexus.abi import BootImage, ConsoleWrite, Event, EventKind, Nanos, service_id
from nexus.init.ground import init_program, limits_of
from nexus.init.programs import PROGRAMS, load_program
from nexus.kernel.sim.faults import FaultPoint, Faults, NthRequest, Plan
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.meta import GetStatus
from nexus.protocols.rngd import (
    DRAW_SIZE_MAX,
)
from nexus.services.rngd.service import QUOTA_SIZE_MAX
from nexus.services.rngd.source import LATE_MAX, START_MAX, START_PAUSE
from nexus.testing.rig import program, reporting
from tests.fakes.initrig import MS, SECOND, Main
from tests.fakes.policyrig import (
    Hands,
    Outcome,
    Script,
    carry_out,
    driver_of,
    plan_of,
)
from tests.fakes.rngdrig import SYSTEM, draw, source

pytestmark = pytest.mark.sim

DENIED: Final = SYSTEM.replace(', "log.read", "rng.entropy"]', ', "log.read"]')
STARTED: Final = 4  # requests that the device has served when the system is up
assert DENIED != SYSTEM

Boot = Callable[..., Outcome]


async def idle(boot: BootImage) -> int:
    """The second client, with nothing to do."""
    hands = Hands(boot)
    await hands.begin(ready=False)
    return await hands.server.run()


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> Boot:
    """Boots the system with a script, and with a fault of the device."""

    def run(
        script: Script,
        *faults: NthRequest,
        text: str = SYSTEM,
        second: Main = idle,
        seed: int = 1,
        driven: bool = False,
    ) -> Outcome:
        plan = plan_of(monkeypatch, text)
        events: list[Event] = []

        def record(event: Event) -> None:
            events.append(event)
            carry_out(
                event, lambda *order: kernel.at(Nanos(kernel.now + 1), partial(freeze, *order))
            )

        def freeze(_what: str, name: str) -> None:
            _ = kernel.freeze(name, Nanos(kernel.now + 5 * SECOND))

        kernel = SimKernel(
            {
                **{name: load_program(PROGRAMS[name]) for name in ("policyd", "logd", "rngd")},
                "guard": program("guard", reporting(second)),
                "driver": program("driver", reporting(driver_of(script))),
            },
            seed=seed,
            recorder=record,
            limits=limits_of(plan),
            faults=Faults(Plan(requests=faults)) if faults else None,
            hardware=plan.hardware,
            kernel_driven={"noise"} if driven else (),
        )
        until = Nanos(kernel.now + 60 * SECOND)
        ended = kernel.run(init_program(plan, 1), b"", until=until)
        assert not kernel.crashes, kernel.crashes
        return Outcome(plan, ended, events)

    return run


async def facts(hands: Hands) -> dict[str, int]:
    status = await hands.call("rngd", GetStatus())
    return {fact.name: fact.value for fact in status.facts}


def evidence(outcome: Outcome, line: str) -> dict[str, Any]:
    """The evidence of the one line so named."""
    (found,) = [
        event.fields["evidence"] for event in outcome.events if event.fields.get("line") == line
    ]
    said: dict[str, Any] = json.loads(found) if isinstance(found, str | bytes) else found  # type: ignore[assignment]
    return said


def delivered(outcome: Outcome) -> list[int]:
    """The device's own account: the bytes of each draw."""
    return [
        int(str(event.fields["size"]))
        for event in outcome.events
        if event.kind is EventKind.DEVICE and event.fields["what"] == "draw"
    ]


# ---------------------------------------------------------------- what is answered


def test_draws_are_bounded_and_differ(boot: Boot) -> None:
    async def script(hands: Hands) -> list[str]:
        return [await draw(hands, size) for size in (1, 32, 32, 256, 0, 257, 0xFFFF)]

    found = boot(script).result

    assert [len(each) // 2 for each in found[:4]] == [1, 32, 32, 256]
    assert found[1] != found[2]
    assert found[4:] == ["OVERSIZED"] * 3


def test_who_lacks_the_right_is_denied_and_the_device_is_not_asked(boot: Boot) -> None:
    async def script(hands: Hands) -> list[str]:
        return [await draw(hands, size) for size in (32, 257)]

    outcome = boot(script, text=DENIED)

    assert outcome.result == ["DENIED", "OVERSIZED"]
    assert len(delivered(outcome)) == STARTED
    assert "rngd: policy allow" not in outcome.lines()


def test_a_used_up_rate_is_the_caller_s_and_not_another_s(boot: Boot) -> None:
    full = QUOTA_SIZE_MAX // DRAW_SIZE_MAX

    async def greedy(boot: BootImage) -> int:
        hands = Hands(boot)
        await hands.begin(ready=False)
        got = [await draw(hands, DRAW_SIZE_MAX) for _ in range(full + 1)]
        last = got.pop()
        assert all(len(each) == 2 * DRAW_SIZE_MAX for each in got)
        await ConsoleWrite(f"second: {last}")
        return await hands.server.run()

    async def script(hands: Hands) -> list[Any]:
        got = [await draw(hands, DRAW_SIZE_MAX) for _ in range(full + 1)]
        await hands.pause(SECOND)
        return [{len(each) for each in got[:full]} == {512}, got[full], len(await draw(hands, 1))]

    outcome = boot(script, second=greedy)

    assert outcome.result == [True, "RATE_LIMITED", 2]
    assert "second: RATE_LIMITED" in outcome.lines()


def test_a_silent_policyd_allows_no_draw(boot: Boot) -> None:
    async def script(hands: Hands) -> str:
        await hands.outside("freeze policyd")
        await hands.pause(MS)
        return await draw(hands, 32)

    outcome = boot(script)

    assert outcome.result == "DENIED"
    assert len(delivered(outcome)) == STARTED


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_its_statements_agree_with_the_device_and_with_policyd(boot: Boot, seed: int) -> None:
    async def script(hands: Hands) -> list[Any]:
        for _ in range(2):
            _ = await draw(hands, 32)
        told = await source(hands)
        await hands.pause(SECOND)  # the audit does not hold up an answer
        return [told.backing, told.fit, told.delivered, told.given_to_caller, await hands.audits()]

    outcome = boot(script, seed=seed)
    backing, fit, counted, given, audits = outcome.result

    assert (backing, fit, given) == ("virtio-mmio", True, 64)
    assert counted == sum(delivered(outcome))
    window = evidence(outcome, "rngd: mmio window mapped ok")
    assert (window["magic"], window["version"], window["device_id"]) == (0x74726976, 2, 4)
    assert window["delivered"] == sum(delivered(outcome)[:STARTED])
    assert evidence(outcome, "rngd: ready")["source"] == "virtio-mmio"
    allow = evidence(outcome, "rngd: policy allow")
    assert allow["subject"] == f"0x{service_id('driver'):016x}"
    (audit,) = [
        each
        for each in audits
        if each.get("action") == "rng.entropy" and each.get("subject") == "driver"
    ]
    assert (audit["decision"], audit["asked_by"]) == ("allow", "rngd")
    assert audit["trace"] == allow["trace"], "the draw's own trace, all the way"


def test_a_source_that_the_kernel_drives_is_named_and_has_no_window(boot: Boot) -> None:
    async def script(hands: Hands) -> list[Any]:
        return [(await source(hands)).backing, len(await draw(hands, 32))]

    outcome = boot(script, driven=True)

    assert outcome.result[0] in ("hwrng", "getrandom")
    assert outcome.result[1] == 64
    assert "rngd: mmio window mapped ok" not in outcome.lines()


def test_no_drawn_byte_is_in_an_event_or_a_record(boot: Boot) -> None:
    async def script(hands: Hands) -> list[Any]:
        drawn = await draw(hands, 32)
        await hands.pause(SECOND)
        audits = json.dumps(await hands.audits())
        return [[byte for byte in bytes.fromhex(drawn)], drawn[:8] in audits]  # noqa: C416

    outcome = boot(script)
    digits, in_audits = outcome.result
    drawn = bytes(digits)

    assert not in_audits
    for event in outcome.events:
        if event.fields.get("line") == "driver: result":
            continue
        said = repr(event.fields)
        assert drawn[:4].hex() not in said
        assert repr(drawn[:4])[2:-1] not in said


# ---------------------------------------------------------------- a device that fails

FAILURES: Final = {
    FaultPoint.ENTROPY_NONE: "device_faults_total",
    FaultPoint.ENTROPY_SHORT: "device_faults_total",
    FaultPoint.ENTROPY_CONSTANT: "alarms_repetition_total",
    FaultPoint.ENTROPY_REPEAT: "alarms_repeated_total",
    FaultPoint.LOST_COMPLETION: "device_late_total",
}


@pytest.mark.parametrize("point", FAILURES)
def test_a_broken_device_is_unavailable_and_rngd_goes_on(boot: Boot, point: FaultPoint) -> None:
    async def script(hands: Hands) -> list[Any]:
        first = await draw(hands, 256)
        rest = [await draw(hands, 256) for _ in range(LATE_MAX)]
        await hands.pause(START_PAUSE + 2 * START_MAX)
        told = await source(hands)
        return [len(first), rest, told.fit, await facts(hands)]

    fault = NthRequest(device="noise", point=point, nth=STARTED + 2, persistent=True)
    outcome = boot(script, fault)
    first, rest, fit, counted = outcome.result

    assert first == 512
    assert rest == ["UNAVAILABLE"] * LATE_MAX
    assert not fit
    assert counted[FAILURES[point]] >= 2, "the draw, and a start-up test"
    assert counted["start_tests_failed_total"] >= 1
    assert "rngd: ready again" not in outcome.lines(), "it was not restarted for it"


@pytest.mark.parametrize("point", [FaultPoint.ENTROPY_CONSTANT, FaultPoint.ENTROPY_REPEAT])
def test_a_device_that_works_again_is_used_after_a_start_up_test(
    boot: Boot, point: FaultPoint
) -> None:
    async def script(hands: Hands) -> list[Any]:
        _ = await draw(hands, 256)
        broken = await draw(hands, 256)
        await hands.pause(START_PAUSE + START_MAX)
        return [broken, len(await draw(hands, 256)), await facts(hands)]

    broken, again, counted = boot(
        script, NthRequest(device="noise", point=point, nth=STARTED + 2)
    ).result

    assert broken == "UNAVAILABLE"
    assert again == 512
    assert counted["start_tests_passed_total"] == 2


@pytest.mark.parametrize("point", [FaultPoint.ENTROPY_NONE, FaultPoint.ENTROPY_SHORT])
def test_one_short_delivery_is_made_up_for(boot: Boot, point: FaultPoint) -> None:
    async def script(hands: Hands) -> list[str]:
        return [await draw(hands, 256) for _ in range(3)]

    outcome = boot(script, NthRequest(device="noise", point=point, nth=STARTED + 2))

    assert [len(each) for each in outcome.result] == [512] * 3
    assert len(set(outcome.result)) == 3
    assert sum(delivered(outcome)[STARTED:]) == 3 * 256


def test_a_draw_that_the_device_loses_is_unavailable_and_the_next_is_another(boot: Boot) -> None:
    async def script(hands: Hands) -> list[Any]:
        got = [await draw(hands, 256) for _ in range(3)]
        return [got, await facts(hands)]

    fault = NthRequest(device="noise", point=FaultPoint.LOST_COMPLETION, nth=STARTED + 2)
    (first, lost, last), counted = boot(script, fault).result

    assert lost == "UNAVAILABLE"
    assert len(first) == len(last) == 512
    assert first != last
    assert (counted["start_tests_passed_total"], counted["device_late_total"]) == (1, 1)
