"""rngd: fresh entropy, a bounded amount per client per second.

Owns the entropy device, its health, and the clients' quotas, which are lost with it. Who may draw
is policyd's decision about the sender the kernel names. Never gives a byte twice, pads a short
delivery, or logs what was drawn; gives nothing while the source is not fit. Decision:
docs/adr/0016.

A drawn byte is wiped from every buffer of ours once it is answered. What CPython cannot wipe are
immutable copies: the reply's `data`, its encoding and its frame, which go with the next request.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Final, Protocol, assert_never

import msgspec

from nexus.abi import AbiError, ConsoleWrite, Nanos, ServiceId, service_id
from nexus.drivers import DRAW_SIZE_MAX as DEVICE_DRAW_SIZE_MAX
from nexus.drivers import VirtioEntropy, open_entropy
from nexus.protocols.rngd import (
    CLIENTS_MAX,
    DRAW_RIGHT,
    DRAW_SIZE_MAX,
    PROTOCOL,
    ClientRow,
    Entropy,
    GetEntropy,
    GetSource,
    RngdRequest,
    RngdStatus,
    Source,
)
from nexus.runtime import Call, Refusal
from nexus.runtime.program import Context, SettingsFault, program_of
from nexus.services.rngd.health import Failure
from nexus.services.rngd.quota import Quota
from nexus.services.rngd.source import Source as Device
from nexus.services.rngd.source import State, wipe

QUOTA_WINDOW: Final = Nanos(1_000_000_000)  # ns
QUOTA_SIZE_MAX: Final = 64 * DRAW_SIZE_MAX  # bytes per client per window

assert DRAW_SIZE_MAX <= DEVICE_DRAW_SIZE_MAX, "a request is one draw of the device"


class Gate(Protocol):
    """What rngd needs of runtime.authority.Authority."""

    hits: int

    async def require(self, call: Call, right: str, target: str = "") -> None:
        """Raises the refusal of a caller that may not."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The values of the entry in the system file.

    `told` is the service whose first draw is told on the console; empty for nobody's.
    """

    told: str = ""


class Rngd:
    """Serves nexus.protocols.rngd."""

    def __init__(self, device: Device, authority: Gate, settings: Settings) -> None:
        self._device = device
        self._authority = authority
        self._told_of = service_id(settings.told) if settings.told else None
        self._quota = Quota(QUOTA_WINDOW, QUOTA_SIZE_MAX, CLIENTS_MAX)
        self._clients: dict[ServiceId, int] = {}  # bytes given to each, the latest served last
        self._given = 0  # bytes, to all
        self._denied = 0
        self._window_told = False
        self._allow_told = False

    async def start(self) -> None:
        """The first start-up test; a failed one is made again later."""
        await self._device.start()

    async def on_ready(self) -> None:
        """Say through what the draws come."""
        await self._tell_window()

    async def handle(self, call: Call, request: RngdRequest) -> Entropy | Source:
        """The reply."""
        match request:
            case GetEntropy():
                return await self._get_entropy(call, request)
            case GetSource():
                return self._get_source(call)
            case _:
                assert_never(request)

    def next_time(self) -> Nanos | None:
        """When a start-up test is due."""
        return self._device.next_start

    async def on_time(self, now: Nanos) -> None:
        """Look whether the source works again."""
        del now
        await self._test()

    def ready(self) -> bool:
        """Once a start-up test has passed. A source that fails later is UNAVAILABLE, not a service
        to restart."""
        return self._device.passed > 0

    def evidence(self) -> dict[str, str | int]:
        """With the line that says it is ready."""
        return {"source": self._device.backing, "start_tests_passed": self._device.passed}

    def facts(self) -> dict[str, int]:
        """What was drawn, given and found wrong; all but `fit` and `clients` only grows."""
        device = self._device
        return {
            "fit": int(device.state is State.FIT),
            "clients": len(self._clients),
            "denied_total": self._denied,
            "delivered_bytes_total": device.delivered,
            "given_bytes_total": self._given,
            "start_tests_passed_total": device.passed,
            "start_tests_failed_total": device.failed,
            "device_faults_total": device.faults,
            "device_late_total": device.late,
            "alarms_repetition_total": device.alarms[Failure.REPETITION],
            "alarms_proportion_total": device.alarms[Failure.PROPORTION],
            "alarms_repeated_total": device.alarms[Failure.REPEATED],
        }

    async def _get_entropy(self, call: Call, request: GetEntropy) -> Entropy:
        if not self._is_in_bounds(request.size):
            raise call.refuse(RngdStatus.OVERSIZED)
        await self._authorise(call)
        if not self._quota.charge(call.sender.service, request.size, call.now):
            raise call.refuse(RngdStatus.RATE_LIMITED)
        drawn = await self._device.draw(request.size)
        if drawn is None:
            raise call.refuse(RngdStatus.UNAVAILABLE)  # charged: a broken source is asked less
        await self._tell_window()
        assert len(drawn) == request.size, "a draw is all or nothing"
        self._account(call.sender.service, request.size)
        reply = Entropy(bytes(drawn))
        wipe(drawn)
        return reply

    async def _authorise(self, call: Call) -> None:
        """Go on only with the right. The first decision that policyd was asked for is told."""
        hits = self._authority.hits
        try:
            await self._authority.require(call, DRAW_RIGHT)
        except Refusal:
            self._denied += 1
            raise
        if self._authority.hits == hits:
            await self._tell_allow(call)

    def _account(self, client: ServiceId, size: int) -> None:
        """Count what `client` is given; the row of who was served least recently gives way."""
        self._given += size
        self._clients[client] = self._clients.pop(client, 0) + size
        if len(self._clients) > CLIENTS_MAX:
            del self._clients[next(iter(self._clients))]

    def _get_source(self, call: Call) -> Source:
        device = self._device
        return Source(
            backing=device.backing,
            fit=device.state is State.FIT,
            start_tests_passed=device.passed,
            delivered=device.delivered,
            given=self._given,
            given_to_caller=self._clients.get(call.sender.service, 0),
            clients=[ClientRow(service, size) for service, size in self._clients.items()],
        )

    async def _test(self) -> None:
        await self._device.start()
        if self._device.state is State.FIT:
            await self._tell_window()

    async def _tell_window(self) -> None:
        """Say once that the registers of a device were mapped and a full draw came through them."""
        device = self._device.device
        if self._window_told or not isinstance(device, VirtioEntropy):
            return
        if not self._device.full_draws:
            return
        identity = device.identity
        evidence = {
            "magic": identity.magic,
            "version": identity.version,
            "device_id": identity.device_id,
            "asked": DEVICE_DRAW_SIZE_MAX,
            "delivered": self._device.delivered,
            "full_draws": self._device.full_draws,
        }
        self._window_told = await _told("rngd: mmio window mapped ok", evidence)

    async def _tell_allow(self, call: Call) -> None:
        """Say once that policyd, and not we, allowed a draw."""
        if self._allow_told or self._told_of != call.sender.service:
            return
        evidence = {
            "subject": f"0x{call.sender.service:016x}",
            "right": DRAW_RIGHT,
            "trace": call.parent.trace.hex(),
        }
        self._allow_told = await _told("rngd: policy allow", evidence)

    # What follows decides by what a ladder row breaks; it is small for that.

    def _is_in_bounds(self, size: int) -> bool:
        """Whether one request may have so many bytes."""
        return 1 <= size <= DRAW_SIZE_MAX


async def _told(line: str, evidence: Mapping[str, str | int]) -> bool:
    """Whether the console took the line; a full one is tried again with the next draw."""
    try:
        await ConsoleWrite(line, json.dumps(evidence).encode())
    except AbiError:
        return False
    return True


def made(context: Context) -> Rngd:
    """rngd as the system file wants it, with the one device it was granted."""
    hardware = context.boot.hardware
    if len(hardware) != 1:
        raise SettingsFault(f"expected one device under `hardware`, found {len(hardware)}")
    device = Device(partial(open_entropy, hardware[0]))
    return Rngd(device, context.authority, context.settings_as(Settings))


main: Final = program_of(made, PROTOCOL)
