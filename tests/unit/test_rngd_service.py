"""rngd as its clients see it, on the tiny kernel, over a source that a test scripts."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from nexus.abi import INIT_NAME, Nanos, Now, SleepUntil, Slot, service_id
from nexus.drivers import DRAW_MAX, DeviceFault, EntropyDevice, Fault, VirtioEntropy
from nexus.drivers import DRAW_SIZE_MAX as DEVICE_DRAW_SIZE_MAX
from nexus.drivers.entropy import SHORT_MAX
from nexus.ipc import Exchange, Refused
from nexus.protocols.meta import GetStatus
from nexus.protocols.rngd import (
    DRAW_RIGHT,
    DRAW_SIZE_MAX,
    PROTOCOL,
    Entropy,
    GetEntropy,
    GetSource,
    RngdStatus,
)
from nexus.protocols.rngd import Source as Told
from nexus.runtime import ServiceConfig
from nexus.runtime.program import Context, SettingsFault
from nexus.services.rngd import source as source_module
from nexus.services.rngd.health import MATCH_SIZE, START_SIZE, Failure, Health
from nexus.services.rngd.service import QUOTA_SIZE_MAX, QUOTA_WINDOW, Rngd, Settings, made
from nexus.services.rngd.source import LATE_MAX, START_PAUSE, STARTS_MAX, Source, State
from nexus.wire import ReplyStatus, Request
from tests.fakes.gate import ListGate
from tests.fakes.pair import FAR, Pair
from tests.fakes.source import Lie, ScriptedSource, good
from tests.fakes.tinykernel import TinyKernel
from tests.fakes.virtio import FakeEntropy, drive

CALLER = service_id(INIT_NAME)
OTHER = service_id("other")
START_DRAWS = START_SIZE // DEVICE_DRAW_SIZE_MAX


class System:
    """rngd over a scripted source, whose first start-up test has been made."""

    def __init__(self, *, told: str = "", lie: Lie | None = None) -> None:
        self.device = ScriptedSource()
        self.device.lie = lie
        self.gate = ListGate(CALLER, OTHER)
        self.source = Source(self._opened)
        self.service = Rngd(self.source, self.gate, Settings(told=told))
        self.pair = Pair(self.service, PROTOCOL)
        starting = self.pair.kernel.start(self.pair.kernel.task("start"), self.service.start())
        self.pair.kernel.run(starting)

    async def _opened(self) -> EntropyDevice:
        return self.device

    def ask(self, *requests: Request[Any], name: str = INIT_NAME) -> list[Any]:
        """The outcomes of requests in a row, as a client that then ends."""

        async def body(link: Exchange) -> list[Any]:
            return [await link.call(request, FAR) for request in requests]

        outcomes: list[Any] = self.pair.client(body, name=name)
        return outcomes

    def draw(self, size: int, name: str = INIT_NAME) -> bytes | RngdStatus:
        """The bytes, or why there are none."""
        (outcome,) = self.ask(GetEntropy(size), name=name)
        if isinstance(outcome, Refused):
            return RngdStatus(outcome.status)
        assert isinstance(outcome, Entropy), outcome
        return outcome.data

    def given(self, size: int, name: str = INIT_NAME) -> bytes:
        """The bytes of a draw that is answered."""
        drawn = self.draw(size, name)
        assert isinstance(drawn, bytes), drawn
        return drawn

    def pause(self, span: int) -> None:
        async def body() -> None:
            _ = await SleepUntil(Nanos(await Now() + span))

        kernel = self.pair.kernel
        kernel.run(kernel.start(kernel.task("pause"), body()), until=kernel.now + 2 * span)

    def facts(self) -> dict[str, int]:
        (status,) = self.ask(GetStatus())
        return {fact.name: fact.value for fact in status.facts}

    def console(self, line: str) -> list[dict[str, Any]]:
        """The evidence of every line so named."""
        return [
            json.loads(evidence) for _, text, evidence in self.pair.kernel.console if text == line
        ]


# ---------------------------------------------------------------- a draw


@pytest.mark.parametrize("size", [1, 31, MATCH_SIZE, 33, 255, DRAW_SIZE_MAX])
def test_a_draw_gives_the_source_s_bytes_and_exactly_as_many_as_asked(size: int) -> None:
    system = System()

    drawn = system.draw(size)

    assert drawn == good(START_DRAWS + 1, max(size, MATCH_SIZE))[:size]


def test_no_byte_is_given_twice() -> None:
    system = System()

    drawn = [system.draw(16) for _ in range(40)]

    assert len(set(drawn)) == 40


@pytest.mark.covers("rngd.OVERSIZED")
@pytest.mark.parametrize("size", [0, DRAW_SIZE_MAX + 1, 0xFFFF])
def test_the_bound_is_looked_at_before_the_right(size: int) -> None:
    system = System()
    drawn = system.device.drawn

    assert system.draw(size) is RngdStatus.OVERSIZED
    assert system.draw(size, name="nobody") is RngdStatus.OVERSIZED
    assert system.gate.asked == []
    assert system.device.drawn == drawn


def test_the_right_is_asked_for_the_kernels_sender_and_a_denied_draw_draws_nothing() -> None:
    system = System()
    drawn = system.device.drawn

    (outcome,) = system.ask(GetEntropy(16), name="nobody")

    assert isinstance(outcome, Refused)
    assert outcome.status is ReplyStatus.DENIED
    assert system.gate.asked == [(service_id("nobody"), DRAW_RIGHT, "")]
    assert system.device.drawn == drawn
    assert system.facts()["denied_total"] == 1


@pytest.mark.covers("rngd.RATE_LIMITED")
def test_the_rate_is_the_caller_s_own() -> None:
    system = System()
    full = QUOTA_SIZE_MAX // DRAW_SIZE_MAX

    assert all(isinstance(each, Entropy) for each in system.ask(*[GetEntropy(256)] * full))
    assert system.draw(1) is RngdStatus.RATE_LIMITED
    assert len(system.given(256, name="other")) == 256
    system.pause(QUOTA_WINDOW)
    assert len(system.given(1)) == 1


def test_a_denied_draw_costs_no_quota() -> None:
    system = System()
    system.gate.allowed.clear()
    for _ in range(2 * QUOTA_SIZE_MAX // DRAW_SIZE_MAX):
        _ = system.ask(GetEntropy(DRAW_SIZE_MAX))
    system.gate.allowed.add(CALLER)

    assert len(system.given(DRAW_SIZE_MAX)) == DRAW_SIZE_MAX


# ---------------------------------------------------------------- a source that fails


def short_once() -> Lie:
    """Every other delivery comes short."""
    counts = iter(range(1_000_000))
    return lambda data: data[: len(data) // 2] if next(counts) % 2 else data


def test_what_a_short_delivery_lacks_is_drawn_anew() -> None:
    system = System()
    system.device.lie = short_once()
    before = len(system.device.stream)

    drawn = system.ask(*[GetEntropy(100)] * 6)

    given = b"".join(each.data for each in drawn)
    assert given == system.device.stream[before:], "all of it, in order, nothing else"
    assert len(given) == 600


LIES: dict[str, Lie] = {
    "none": lambda _: b"",
    "always short": lambda data: data[:1],
    "constant": lambda data: b"\xa5" * len(data),
    "zeros": lambda data: bytes(len(data)),
    "repeating": lambda data: good(99, 256)[: len(data)],
    "few values": lambda data: bytes(each % 8 for each in data),
}


@pytest.mark.covers("rngd.UNAVAILABLE")
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_source_that_fails_gives_nothing_until_a_start_up_test_has_passed(lie: Lie) -> None:
    system = System()
    system.device.lie = lie
    outcomes = system.ask(*[GetEntropy(256)] * 3)

    assert isinstance(outcomes[-1], Refused)
    assert outcomes[-1].status is RngdStatus.UNAVAILABLE
    system.device.lie = None
    assert system.draw(16) is RngdStatus.UNAVAILABLE, "a good delivery alone does not help"
    drawn = system.device.drawn
    assert system.draw(16) is RngdStatus.UNAVAILABLE
    assert system.device.drawn == drawn, "an unfit source is not even asked"

    system.pause(2 * START_PAUSE)
    assert system.device.drawn == drawn + START_DRAWS
    assert len(system.given(16)) == 16
    assert system.facts()["start_tests_passed_total"] == 2


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_source_that_fails_at_the_start_is_not_ready(lie: Lie) -> None:
    system = System(lie=lie)

    assert not system.service.ready()
    assert system.draw(16) is RngdStatus.UNAVAILABLE

    system.device.lie = None
    system.pause(4 * START_PAUSE)
    assert system.service.ready()
    assert len(system.given(16)) == 16


@pytest.mark.parametrize("fault", [Fault.IO, Fault.REFUSED, Fault.GONE])
def test_a_device_fault_makes_the_source_unfit(fault: Fault) -> None:
    system = System()
    system.device.fault = fault

    assert system.draw(16) is RngdStatus.UNAVAILABLE
    assert system.source.state is State.UNTESTED
    assert system.facts()["device_faults_total"] == 1


def test_a_source_that_stays_broken_is_tested_a_bounded_number_of_times() -> None:
    system = System(lie=lambda data: bytes(len(data)))
    assert system.draw(16) is RngdStatus.UNAVAILABLE

    system.pause(START_PAUSE << STARTS_MAX)

    assert system.source.state is State.GIVEN_UP
    assert system.source.failed == STARTS_MAX
    assert system.source.next_start is None


def test_a_slow_device_is_waited_for_and_a_slower_one_is_not() -> None:
    system = System()
    system.device.delay = DRAW_MAX - 1
    assert len(system.given(16)) == 16

    system.device.delay = DRAW_MAX + 1
    assert system.draw(16) is RngdStatus.UNAVAILABLE
    assert system.source.state is State.FIT
    system.device.delay = 0
    assert len(system.given(16)) == 16, "late is not broken"


def test_a_device_that_is_always_late_becomes_unfit() -> None:
    system = System()
    system.device.delay = DRAW_MAX + 1

    outcomes = system.ask(*[GetEntropy(16)] * (LATE_MAX + 2))
    system.device.delay = 0

    assert {each.status for each in outcomes} == {RngdStatus.UNAVAILABLE}
    assert system.source.state is State.UNTESTED
    assert system.facts()["device_late_total"] == LATE_MAX
    assert system.draw(16) is RngdStatus.UNAVAILABLE
    system.pause(2 * START_PAUSE)
    assert len(system.given(16)) == 16


def test_a_caller_s_short_deadline_does_not_make_the_source_unfit() -> None:
    system = System()
    system.device.delay = DRAW_MAX // 2

    async def body(link: Exchange) -> Any:
        return await link.call(GetEntropy(16), Nanos(await Now() + DRAW_MAX // 4))

    outcome = system.pair.client(body)

    assert not isinstance(outcome, Entropy)
    assert len(system.given(16)) == 16
    assert system.source.state is State.FIT


def test_more_short_deliveries_than_the_bound_are_a_fault() -> None:
    system = System()
    left = SHORT_MAX

    def short(data: bytes) -> bytes:
        nonlocal left
        left -= 1
        return data[:1] if left >= 0 else data

    system.device.lie = short
    assert len(system.given(256)) == 256
    left = SHORT_MAX + 1
    assert system.draw(256) is RngdStatus.UNAVAILABLE


# ---------------------------------------------------------------- what it tells


def test_the_source_and_the_account_of_every_client_are_told_to_anybody() -> None:
    system = System()
    _ = system.ask(GetEntropy(20), GetEntropy(12))
    _ = system.draw(256, name="other")

    (told,) = system.ask(GetSource())
    (nobody,) = system.ask(GetSource(), name="nobody")

    assert isinstance(told, Told)
    assert (told.backing, told.fit, told.start_tests_passed) == ("scripted", True, 1)
    assert told.delivered == system.device.delivered == START_SIZE + 2 * MATCH_SIZE + 256
    assert (told.given, told.given_to_caller) == (288, 32)
    assert {row.service: row.given for row in told.clients} == {CALLER: 32, OTHER: 256}
    assert nobody.given_to_caller == 0


def test_the_ready_line_names_the_source() -> None:
    assert System().service.evidence() == {"source": "scripted", "start_tests_passed": 1}


def test_the_first_draw_that_policyd_decided_is_told_once() -> None:
    system = System(told=INIT_NAME)
    _ = system.ask(GetEntropy(16), name="nobody")
    _ = system.ask(GetEntropy(16), GetEntropy(16))
    _ = system.draw(16, name="other")

    (evidence,) = system.console("rngd: policy allow")

    assert evidence["subject"] == f"0x{CALLER:016x}"
    assert evidence["right"] == DRAW_RIGHT
    assert len(bytes.fromhex(evidence["trace"])) == 16


def test_a_kept_decision_is_not_told_as_policyd_s() -> None:
    system = System(told=INIT_NAME)
    require = system.gate.require

    async def kept(call: Any, right: str, target: str = "") -> None:
        system.gate.hits += 1
        await require(call, right, target)

    system.gate.require = kept  # type: ignore[method-assign]

    assert len(system.given(16)) == 16
    assert system.console("rngd: policy allow") == []


def test_the_settings_name_whose_first_draw_is_told() -> None:
    system = System(told="other")
    _ = system.draw(16)
    assert system.console("rngd: policy allow") == []

    _ = system.draw(16, name="other")
    assert [each["subject"] for each in system.console("rngd: policy allow")] == [f"0x{OTHER:016x}"]


def test_nobody_s_draw_is_told_without_the_setting() -> None:
    system = System()
    _ = system.draw(16)

    assert system.console("rngd: policy allow") == []


def test_a_source_without_a_window_says_nothing_of_one() -> None:
    system = System()
    _ = system.draw(256)

    assert system.console("rngd: mmio window mapped ok") == []


def test_no_line_holds_a_drawn_byte() -> None:
    system = System(told=INIT_NAME)
    drawn = system.draw(256)
    assert isinstance(drawn, bytes)

    said = b"".join(line.encode() + evidence for _, line, evidence in system.pair.kernel.console)
    assert said
    assert not any(drawn[at : at + 4].hex().encode() in said for at in range(len(drawn) - 3))
    assert not any(drawn[at : at + 4] in said for at in range(len(drawn) - 3))


def test_the_buffers_of_a_draw_are_wiped() -> None:
    device = FakeEntropy()
    kept: list[bytearray] = []

    async def run(body: Callable[[EntropyDevice], Awaitable[None]]) -> None:
        opened = await VirtioEntropy.open(device, device.area)
        await body(opened)

    async def body(opened: EntropyDevice) -> None:
        class Keeping:
            backing = "keeping"

            async def draw(self, size: int, deadline: Nanos) -> bytearray:
                drawn = await opened.draw(size, deadline)
                kept.append(drawn)
                return drawn

        async def open_it() -> EntropyDevice:
            return Keeping()

        source = Source(open_it)
        await source.start()
        drawn = await source.draw(16)
        assert drawn is not None
        assert len(drawn) == 16

    drive(run(body), device)

    assert len(kept) == START_DRAWS + 1
    assert not any(any(each) for each in kept)


class Buffers:
    """Every buffer of rngd's own that drawn bytes stood in. Each is kept, and so are the bytes that
    stood in it when it was met."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.met: dict[str, list[tuple[bytearray, bytes]]] = {}
        self.cut_off: list[bytes] = []  # what a buffer still held where it was made shorter
        noted, cut_off = self.noted, self.cut_off
        filled, draw, failure_of = Source._filled, Source.draw, Health.failure_of

        class Shortened(bytearray):
            def __delitem__(self, place: Any) -> None:
                cut_off.append(bytes(self[place]))
                super().__delitem__(place)

        async def noted_filled(source: Source, drawn: bytearray, span: Nanos) -> bool:
            done = await filled(source, drawn, span)
            noted("samples" if len(drawn) == START_SIZE else "drawn", drawn)
            return done

        async def noted_draw(source: Source, size: int) -> bytearray | None:
            drawn = await draw(source, size)
            if drawn is not None:
                noted("reply", drawn)
            return drawn

        def noted_failure(health: Health, delivery: bytearray) -> Failure | None:
            noted("delivery", delivery)
            return failure_of(health, delivery)

        monkeypatch.setattr(source_module, "bytearray", Shortened, raising=False)
        monkeypatch.setattr(Source, "_filled", noted_filled)
        monkeypatch.setattr(Source, "draw", noted_draw)
        monkeypatch.setattr(Health, "failure_of", noted_failure)

    def noted(self, name: str, buffer: bytearray) -> None:
        assert any(buffer), f"nothing stood in {name}"
        self.met.setdefault(name, []).append((buffer, bytes(buffer)))

    def count(self) -> dict[str, int]:
        return {name: len(met) for name, met in self.met.items()}

    def given(self) -> list[bytes]:
        """What stood in the buffers that replies were made of."""
        return [stood for _, stood in self.met.get("reply", [])]

    def unwiped(self) -> set[str]:
        """Where something is left."""
        left = {name for name, met in self.met.items() if any(any(each) for each, _ in met)}
        return left | {"cut off" for each in self.cut_off if any(each)}


def test_every_buffer_of_rngd_s_own_is_wiped_when_a_draw_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffers = Buffers(monkeypatch)
    system = System()
    assert buffers.count() == {"samples": 1, "delivery": START_DRAWS}
    assert buffers.unwiped() == set()

    given = [system.given(16), system.given(256)]

    assert buffers.count() == {"samples": 1, "delivery": START_DRAWS + 2, "drawn": 2, "reply": 2}
    assert buffers.given() == given
    assert [len(each) for each in buffers.cut_off] == [MATCH_SIZE - 16, 0]
    assert buffers.unwiped() == set()


def broken_off(data: bytes) -> bytes:
    """Some bytes, and then a fault."""
    if len(data) < 200:
        raise DeviceFault(Fault.IO)
    return data[:100]


@pytest.mark.parametrize("lie", [LIES["few values"], broken_off], ids=["unhealthy", "broken off"])
def test_what_was_drawn_and_is_given_to_nobody_is_wiped(
    lie: Lie, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = Buffers(monkeypatch)
    system = System()
    system.device.lie = lie

    outcomes = {system.draw(256) for _ in range(3)} - {*buffers.given()}

    assert outcomes == {RngdStatus.UNAVAILABLE}
    assert system.source.state is State.UNTESTED
    system.pause(2 * START_PAUSE)
    assert system.source.failed == 1
    assert buffers.count()["samples"] == 2, "those of a start-up test that failed"
    assert buffers.unwiped() == set()


def test_the_pauses_between_start_up_tests_that_fail_double_and_begin_anew() -> None:
    system = System()
    kernel = system.pair.kernel
    times: list[int] = []

    def zeros(data: bytes) -> bytes:
        if not times or times[-1] != kernel.now:
            times.append(kernel.now)
        return bytes(len(data))

    def gaps(count: int) -> list[int]:
        """Between the draw that failed and `count` start-up tests, in pauses."""
        times.clear()
        system.device.lie = zeros
        assert system.draw(16) is RngdStatus.UNAVAILABLE
        system.pause((START_PAUSE << count) - START_PAUSE // 2)
        system.device.lie = None
        return [(after - before) // START_PAUSE for before, after in pairwise(times)]

    assert gaps(4) == [1, 2, 4, 8]
    system.pause(START_PAUSE << 4)
    assert system.facts()["fit"] == 1
    assert gaps(2) == [1, 2], "a test that passed is the end of it"
    system.pause(START_PAUSE << 2)
    assert gaps(STARTS_MAX) == [1 << each for each in range(STARTS_MAX)]
    assert system.source.state is State.GIVEN_UP


@pytest.mark.parametrize("hardware", [(), (Slot(3), Slot(4))])
def test_rngd_runs_with_one_device_and_no_other_number(hardware: tuple[Slot, ...]) -> None:
    kernel = TinyKernel()
    boot = replace(kernel.boot(kernel.task("rngd")), hardware=hardware)
    config = ServiceConfig(uses=[], posts=[], settings={}, trace_seed=bytes(16))

    with pytest.raises(SettingsFault, match="one device"):
        _ = made(Context(boot, config))
