"""A command from outside is a span of operator's, around what it sets off, over restarts too."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus.abi import ServiceId, service_id
from nexus.kernel.sim import SimPeer
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import Restart
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.protocols.metricsd import SPAN_ROWS_MAX, GetSpans, Span, SpanPage, SpanStatus
from nexus.protocols.operator import PROTOCOL, Relay, Relayed
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Cancel, Register, Timer, Wait
from nexus.testing.device import Device, simulate
from nexus.wire import HEADER, HEADER_SIZE, Protocol, Request, encode, status_of
from tests.fakes.exportsystem import OPERATED, system_text

TRACE = bytes(range(1, 17))
ABOVE = bytes(range(21, 29))  # the command's own span, which nobody records
LOOK = bytes(range(2, 18))  # the trace of the looks
SECOND = 1_000_000_000


class Commands:
    """A process outside, with one connection."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._nonces = itertools.count(1)
        self.peer: SimPeer = device.kernel.port("operator").connect(77, device.kernel.uid)

    async def frame(
        self, protocol: Protocol, request: Request[Any], trace: bytes, wait: int
    ) -> bytes:
        fields = HEADER.unpack(protocol.codecs[type(request)].prefix.ljust(HEADER_SIZE, b"\0"))[:6]
        until = int(await self._device.now()) + wait
        return HEADER.pack(*fields, next(self._nonces), until, trace, ABOVE) + encode(request)

    async def send(
        self,
        service: str,
        protocol: Protocol,
        request: Request[Any],
        trace: bytes = TRACE,
        wait: int = SECOND,
    ) -> None:
        inner = await self.frame(protocol, request, trace, wait)
        assert self.peer.send(await self.frame(PROTOCOL, Relay(service, inner), trace, wait))

    async def ask(
        self, service: str, protocol: Protocol, request: Request[Any], trace: bytes = TRACE
    ) -> Any:
        """The service's reply, or a number: its status, or operator's."""
        await self.send(service, protocol, request, trace)
        data = await self.answer()
        if status_of(data):
            return status_of(data)
        relayed = PROTOCOL.codecs[Relay].decode_reply(data[HEADER_SIZE:])
        assert isinstance(relayed, Relayed)
        if status_of(relayed.frame):
            return status_of(relayed.frame)
        return protocol.codecs[type(request)].decode_reply(relayed.frame[HEADER_SIZE:])

    async def answer(self) -> bytes:
        for _ in range(1_000):
            if found := self.peer.take():
                return found[0]
            await self._device.sleep("5ms")
        raise AssertionError("no answer")

    async def spans(self, trace: bytes = TRACE) -> list[Span]:
        """What metricsd has of a trace, as `nexus trace` asks for it."""
        request = GetSpans(1, SPAN_ROWS_MAX, trace, 0, 0, "")
        page = await self.ask("metricsd", METRICSD, request, LOOK)
        assert isinstance(page, SpanPage), page
        return page.spans


def told(span: Span) -> Mapping[str, str]:
    return {each.key: each.value for each in span.attributes}


def of(spans: list[Span], name: str) -> list[Span]:
    own: ServiceId = service_id(name)
    return [each for each in spans if each.service == own]


def run(tmp_path: Path, scenario: Any) -> None:
    file = tmp_path / "operated.toml"
    file.write_text(system_text() + OPERATED)
    _ = simulate(file, scenario, seed=4)


def test_a_command_is_the_root_of_what_it_sets_off_also_behind_a_restart(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.sleep("5s")
        commands = Commands(device)

        timer = await commands.ask("timed", TIMED, Register(int(await device.now()) + 9 * SECOND))
        _ = await commands.ask("init-lite", INIT, Restart("timed"))
        await device.sleep("3s")
        refused = await commands.ask("timed", TIMED, Cancel(99))
        await device.sleep("1s")
        spans = await commands.spans()

        assert isinstance(timer, Timer)
        assert refused
        roots, below = of(spans, "operator"), of(spans, "timed")
        assert [each.name for each in roots] == ["operator.Relay"] * 3
        assert [each.parent for each in roots] == [ABOVE] * 3
        assert [told(each)["target"] for each in roots] == ["timed", "init-lite", "timed"]
        assert told(roots[1])["request"] == "Restart"
        ok, error = SpanStatus.OK, SpanStatus.ERROR
        assert [each.status for each in roots] == [ok, ok, error]
        assert [each.name for each in below] == ["timed.Register", "timed.Cancel"]
        assert [each.generation for each in below] == [1, 2]
        assert [each.parent for each in below] == [roots[0].span, roots[2].span]
        for outer, inner in ((roots[0], below[0]), (roots[2], below[1])):
            assert outer.start <= inner.start <= inner.end <= outer.end

    run(tmp_path, scenario)


def test_a_command_without_an_answer_is_a_span_that_says_why(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.sleep("5s")
        commands, impatient = Commands(device), Commands(device)
        until = int(await device.now()) + 60 * SECOND
        timers = [await commands.ask("timed", TIMED, Register(until), LOOK) for _ in range(2)]

        one, other = (Wait(timer.timer_id) for timer in timers)
        await commands.send("timed", TIMED, one)
        await impatient.send("timed", TIMED, other, wait=30 * SECOND)
        await device.sleep("100ms")
        impatient.peer.close()
        _ = await commands.answer()
        await device.sleep("1s")
        gone, late = of(await commands.spans(), "operator")  # as they ended

        assert (gone.status, told(gone).get("refused")) == (SpanStatus.ERROR, None)
        assert (late.status, told(late)["refused"]) == (SpanStatus.ERROR, "TIMED_OUT")
        assert gone.end - gone.start < SECOND // 2 < late.end - late.start

    run(tmp_path, scenario)


def test_a_look_leaves_no_span_of_operator(tmp_path: Path) -> None:
    """Else the latest trace would always be that of `nexus trace`."""

    async def scenario(device: Device) -> None:
        await device.sleep("5s")
        commands = Commands(device)
        for _ in range(2):
            _ = await commands.spans()

        assert of(await commands.spans(LOOK), "operator") == []

    run(tmp_path, scenario)
