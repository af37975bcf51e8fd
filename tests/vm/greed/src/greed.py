"""Services that take more than they may, one that crashes, and one that calls another all the
while and says how long it waited."""

import threading
import time
from typing import Annotated, Final

from nexus.abi import ConsoleWrite, Nanos
from nexus.ipc import deadline_after
from nexus.runtime import Call
from nexus.runtime.program import Context
from nexus.wire import U32, Message, Protocol, Request

AFTER: Final = Nanos(1_000_000_000)  # ns; everybody is up by then, and is found healthy
SPIN: Final = 1_000_000_000  # ns that one computes without end: ten periods
THREADS: Final = 64  # that another one tries to start
PIECE_SIZE: Final = 256 * 1024  # bytes that a third takes at a time
PIECES: Final = 1024
PAUSE: Final = Nanos(20_000_000)
CALL_MAX: Final = Nanos(2_000_000_000)
CALLS: Final = 10  # that one line tells of


class Pong(Message):
    """How many there were."""

    count: Annotated[int, U32()]


class Ping(Request[Pong], op=1, idempotent=True):
    """Are you there?"""


PROTOCOL: Final = Protocol("greed", number=1004, version=1, requests=(Ping,))


class Answers:
    """Serves this protocol, and does nothing else until its time comes."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._count = 0
        self._at: Nanos | None = None

    def handle(self, _call: Call, _request: Ping) -> Pong:
        self._count += 1
        return Pong(self._count)

    def next_time(self) -> Nanos | None:
        return self._at

    async def start(self) -> None:
        """Nothing to begin with."""

    async def on_time(self, _now: Nanos) -> None:
        """Nothing to do."""


class Calls(Answers):
    """Calls `answers` all the while."""

    async def start(self) -> None:
        self._slowest = 0
        self._at = await self._context.after(PAUSE)

    async def on_time(self, now: Nanos) -> None:
        peer = await self._context.client("answers", PROTOCOL)
        outcome = await peer.call(Ping(), deadline_after(now, CALL_MAX))
        took = await self._context.now() - now
        if not isinstance(outcome, Pong):
            await ConsoleWrite(f"calls: failed {outcome!r}")
        self._slowest = max(self._slowest, took)
        self._count += 1
        if self._count % CALLS == 0:
            await ConsoleWrite(f"calls: slowest {self._slowest}")
            self._slowest = 0
        self._at = await self._context.after(PAUSE)


class Greedy(Answers):
    """Waits until it was found healthy."""

    async def start(self) -> None:
        if self._context.boot.generation == 1:
            self._at = await self._context.after(AFTER)


class Hoards(Greedy):
    """Takes memory without end."""

    async def on_time(self, _now: Nanos) -> None:
        self._at = None
        hoard = [b"\1" * PIECE_SIZE for _ in range(PIECES)]  # zeros have no memory behind them
        await ConsoleWrite(f"hoards: has {len(hoard)} pieces")


class Spins(Greedy):
    """Computes without end."""

    async def on_time(self, now: Nanos) -> None:
        self._at = None
        spent = time.process_time_ns()
        while await self._context.now() < now + SPIN:
            pass
        took = await self._context.now() - now
        await ConsoleWrite(f"spins: had {100 * (time.process_time_ns() - spent) // took} percent")


class Multiplies(Greedy):
    """Starts threads without end."""

    async def on_time(self, _now: Nanos) -> None:
        self._at = None
        end = threading.Event()
        count = 0
        try:
            for _ in range(THREADS):
                threading.Thread(target=end.wait).start()
                count += 1
        except RuntimeError as error:
            await ConsoleWrite(f"multiplies: has {count} threads, then {error}")
        end.set()


class Crashes(Greedy):
    """Makes a mistake."""

    async def on_time(self, _now: Nanos) -> None:
        raise KeyError("calibration")
