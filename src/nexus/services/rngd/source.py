"""The entropy device and whether it is fit to be drawn from.

    UNTESTED --start-up test passed--> FIT
    FIT --health test failed | device fault | LATE_MAX draws in a row too late--> UNTESTED
    UNTESTED --STARTS_MAX start-up tests failed in a row--> GIVEN_UP

A start-up test is made when the service starts; after a failure when `next_start` has come, with
pauses that double. Until it has passed nothing is given to anybody, and what it drew is thrown
away.

Every buffer here is a bytearray and is wiped after use. What CPython leaves behind: the bytes of
a kernel-driven source come as `bytes` (see drivers.KernelEntropy).
"""

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Final

from nexus.abi import Nanos, Now
from nexus.drivers import DRAW_MAX, DRAW_SIZE_MAX, DeviceFault, EntropyDevice, Fault, fill
from nexus.services.rngd.health import MATCH_SIZE, START_SIZE, Failure, Health

START_MAX: Final = Nanos(500_000_000)  # ns for a start-up test; nobody is served meanwhile
LATE_MAX: Final = 4  # draws in a row; a source with a rate limit is late now and then, and fit
START_PAUSE: Final = Nanos(250_000_000)  # ns to the first new start-up test after a failure
STARTS_MAX: Final = 10  # failed in a row, with doubling pauses: four minutes, then for good

assert START_MAX >= DRAW_MAX
assert START_SIZE % DRAW_SIZE_MAX == 0, "a start-up test is made of full draws"
assert MATCH_SIZE <= DRAW_SIZE_MAX


class State(Enum):
    """Whether the source may be drawn from."""

    UNTESTED = "untested"
    FIT = "fit"
    GIVEN_UP = "given up"


class Source:
    """The device behind `opened`, and its health. Its counters only grow."""

    def __init__(self, opened: Callable[[], Awaitable[EntropyDevice]]) -> None:
        self._opened = opened
        self._health = Health()
        self._failed_in_a_row = 0  # start-up tests
        self._late_in_a_row = 0  # draws
        self._next_start: Nanos | None = None
        self.device: EntropyDevice | None = None  # once it was opened
        self.state = State.UNTESTED
        self.delivered = 0  # bytes the device delivered
        self.full_draws = 0  # of DRAW_SIZE_MAX bytes, delivered at once
        self.passed = 0  # start-up tests
        self.failed = 0
        self.faults = 0  # of the device
        self.late = 0  # draws and start-up tests that the device did not serve in time
        self.alarms = dict.fromkeys(Failure, 0)

    @property
    def backing(self) -> str:
        """What delivers; empty before the device was opened."""
        return "" if self.device is None else self.device.backing

    @property
    def next_start(self) -> Nanos | None:
        """When the next start-up test is due."""
        return self._next_start

    async def start(self) -> None:
        """Make a start-up test; how it went is the state."""
        assert self.state is State.UNTESTED
        samples = bytearray(START_SIZE)
        try:
            fit = await self._tested(samples)
        finally:
            wipe(samples)
        if fit:
            self.passed += 1
            self._failed_in_a_row = 0
            self._next_start = None
            self.state = State.FIT
            return
        self.failed += 1
        self._failed_in_a_row += 1
        await self._wait_for_start()

    async def draw(self, size: int) -> bytearray | None:
        """`size` fresh bytes, which the caller wipes; None if the source is not fit, or late.

        How long the device may take does not depend on the caller's deadline: a short one would
        reset the device under everybody else.
        """
        if self.state is not State.FIT:
            return None
        drawn = bytearray(max(size, MATCH_SIZE))
        if not await self._filled(drawn, DRAW_MAX):
            wipe(drawn)
            if not 0 < self._late_in_a_row < LATE_MAX:
                self.state = State.UNTESTED
                await self._wait_for_start()
            return None
        for index in range(size, len(drawn)):
            drawn[index] = 0
        del drawn[size:]
        return drawn

    async def _tested(self, samples: bytearray) -> bool:
        """Whether a start-up test passes."""
        self._health.restart()
        if self.device is None:
            try:
                self.device = await self._opened()
            except DeviceFault:
                self.faults += 1
                return False
        return await self._filled(samples, START_MAX)

    async def _filled(self, drawn: bytearray, span: Nanos) -> bool:
        """Whether `drawn` is full of bytes that passed the tests."""
        assert self.device is not None, "a start-up test comes first"
        try:
            deliveries = await fill(self.device, drawn, Nanos(await Now() + span))
        except DeviceFault as error:
            late = error.fault is Fault.TIMED_OUT
            self._late_in_a_row = self._late_in_a_row + 1 if late else 0
            self.late += late
            self.faults += not late
            return False
        self._late_in_a_row = 0
        self.delivered += len(drawn)
        if len(drawn) == deliveries * DRAW_SIZE_MAX:
            self.full_draws += deliveries
        for begin in range(0, len(drawn), DRAW_SIZE_MAX):
            delivery = drawn[begin : begin + DRAW_SIZE_MAX]
            failure = self._health.failure_of(delivery)
            wipe(delivery)
            if failure is not None:
                self.alarms[failure] += 1
                return False
        return True

    async def _wait_for_start(self) -> None:
        """Not fit: the next start-up test is later, or there is none."""
        if self._failed_in_a_row >= STARTS_MAX:
            self._next_start = None
            self.state = State.GIVEN_UP
            return
        pause = START_PAUSE << self._failed_in_a_row
        self._next_start = Nanos(await Now() + pause)


def wipe(buffer: bytearray) -> None:
    """Leave nothing of what was drawn."""
    buffer[:] = bytes(len(buffer))
