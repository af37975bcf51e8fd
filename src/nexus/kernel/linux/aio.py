"""The trap loop for programs with an event loop of their own: traps inside asyncio.

The driver does each trap as ever, but never waits: a trap that would is done without waiting, its
task waits in asyncio for the descriptor or the time, and it is done again. So many coroutines
may wait at the same time, and other work of the event loop goes on.

A descriptor may be closed while it is watched: by a trap of another coroutine, or because its
peer died. Before a trap that closes, and after a receive that did, everybody who waits looks
again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from time import monotonic_ns
from typing import Any, Final, TypeVar

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NEVER,
    NO_WAIT,
    AbiError,
    Call,
    CapClose,
    EndpointClose,
    LinkId,
    Message,
    Nanos,
    PeerGone,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    SleepUntil,
    Slot,
    Status,
    Trap,
)
from nexus.kernel.core import end_coroutine, exit_code
from nexus.kernel.linux.channel import InitIsGone, TaskPort
from nexus.kernel.linux.driver import SHORT_ERRORS, Driver, Exited
from nexus.kernel.linux.objects import Endpoint, HolderLink

T = TypeVar("T")
Trace = Callable[[type, int, int], None]
"""Takes a trap, its status (0: none) and the size of the message it gave."""

ROOM_STEP: Final = 0.001  # seconds between two looks for room in a full link, as in the driver
NANOSECONDS: Final = 1_000_000_000  # per second

CLOSING: Final = (CapClose, EndpointClose)
FULL: Final = (Status.QUEUE_FULL, Status.NO_SPACE)


class AioTask:
    """Runs coroutines that yield traps, as many at a time as its program likes.

    Not two that use the same ipc exchange: an exchange is one caller's.
    """

    def __init__(
        self,
        driver: Driver,
        port: TaskPort,
        loop: asyncio.AbstractEventLoop,
        trace: Trace | None = None,
    ) -> None:
        self.ended: asyncio.Future[int] = loop.create_future()  # by an Exit trap
        self._driver = driver
        self._port = port
        self._loop = loop
        self._trace = trace
        self._waiting: dict[int, set[asyncio.Future[None]]] = {}  # by watched descriptor
        loop.add_reader(port.fileno, self._serve)

    async def trap(self, trap: Trap[T]) -> T:
        """Do one trap."""
        return await self.run(_alone(trap))

    async def run(self, coroutine: Coroutine[Trap[Any], Any, T]) -> T:
        """Drive a coroutine to its end. Cancelling it ends it at the trap where it waits."""
        result: Any = None
        refusal: AbiError | None = None
        try:
            while True:
                trap = coroutine.send(result) if refusal is None else coroutine.throw(refusal)
                result, refusal = None, None
                try:
                    result = await self._do(trap)
                except AbiError as error:
                    refusal = error
                except OSError as error:
                    refusal = _closed_set(error)
                if self._trace is not None:
                    size = len(result.data) if isinstance(result, Message) else 0
                    self._trace(type(trap), 0 if refusal is None else int(refusal.status), size)
        except StopIteration as stop:
            value: T = stop.value
            return value
        except Exited as exited:
            if not self.ended.done():
                self.ended.set_result(exited.code)
            raise asyncio.CancelledError from None
        finally:
            end_coroutine(coroutine)

    def lock(self) -> AbstractAsyncContextManager[None]:
        """A fresh lock, by which coroutines take turns at what is one caller's."""
        return asyncio.Lock()

    def close(self) -> None:
        """Watch nothing any more."""
        _ = self._loop.remove_reader(self._port.fileno)
        self._look_again()

    async def _do(self, trap: Trap[Any]) -> Any:
        if isinstance(trap, Recv):
            return await self._receive(trap, trap.sources, trap.link, trap.deadline)
        if isinstance(trap, ReplyRecv):
            return await self._receive(trap, trap.sources, None, trap.deadline)
        if isinstance(trap, Call):
            return await self._receive(trap, (trap.inbox,), trap.link, trap.deadline)
        if isinstance(trap, Send) and trap.deadline != NO_WAIT:
            return await self._send(trap)
        if isinstance(trap, SleepUntil):
            while (now := monotonic_ns()) < trap.deadline:
                await self._readable([], trap.deadline)
            return Nanos(now)
        if isinstance(trap, CLOSING):
            self._look_again()
        return self._now(trap)

    def _now(self, trap: Trap[Any]) -> Any:
        self._port.flush()
        return self._driver.handlers[type(trap)](trap)

    async def _receive(
        self,
        trap: Recv | ReplyRecv | Call,
        sources: tuple[Slot, ...],
        link: LinkId | None,
        deadline: Nanos,
    ) -> Message:
        """Send what the trap sends, once, and take a message, at the deadline at the latest."""
        first: Trap[Message] = trap
        trap.deadline = NO_WAIT
        try:
            while True:
                try:
                    message: Message = self._now(first)
                except PeerGone:
                    self._look_again()
                    raise
                except AbiError as refusal:
                    sent = not isinstance(first, Call) or first.sent
                    if refusal.status is not Status.QUEUE_EMPTY or not sent:
                        raise
                else:
                    return message
                if deadline == NO_WAIT:
                    raise AbiError(Status.QUEUE_EMPTY, "nothing is queued")
                if monotonic_ns() >= deadline:
                    raise self._driver.timed_out()
                first = Recv(sources, NO_WAIT, link=link, size_max=_size_max(trap))
                await self._readable(self._descriptors(sources, link), deadline)
        finally:
            trap.deadline = deadline

    def _descriptors(self, sources: tuple[Slot, ...], link: LinkId | None) -> list[int]:
        """What becomes readable with a message: the link's own descriptor, for its endpoint's
        also tells of messages that this trap does not take."""
        if link is not None:
            return [self._driver.links[link].fileno]
        return [self._source(slot).epoll.fileno() for slot in sources]

    async def _send(self, trap: Send) -> None:
        deadline = trap.deadline
        trap.deadline = NO_WAIT
        try:
            while True:
                try:
                    self._now(trap)
                except AbiError as refusal:
                    if refusal.status not in FULL or self._never_fits(trap):
                        raise
                    if monotonic_ns() >= deadline:
                        raise self._driver.timed_out() from None
                else:
                    return
                await asyncio.sleep(ROOM_STEP)
        finally:
            trap.deadline = deadline

    def _never_fits(self, trap: Send) -> bool:
        """Whether waiting would not help: more bytes than the link may ever hold."""
        link = self._driver.table.require(trap.slot, Rights.SEND).object
        return isinstance(link, HolderLink) and len(trap.data) > link.size

    def _source(self, slot: Slot) -> Endpoint:
        source = self._driver.table.require(slot, Rights.RECV).object
        assert isinstance(source, Endpoint), "only endpoints and ports have RECV"
        return source

    async def _readable(self, descriptors: list[int], deadline: int) -> None:
        """Wait until one of the descriptors is readable, a deadline passes, or something closed."""
        ready: asyncio.Future[None] = self._loop.create_future()
        timer = None
        if deadline != NEVER:
            # The loop's clock is ours, CLOCK_MONOTONIC, but it may wake a tick of it early.
            timer = self._loop.call_at(deadline / NANOSECONDS, _wake, ready)
        for descriptor in descriptors:
            waiting = self._waiting.setdefault(descriptor, set())
            if not waiting:
                self._loop.add_reader(descriptor, self._on_readable, descriptor)
            waiting.add(ready)
        try:
            await ready
        finally:
            if timer is not None:
                timer.cancel()
            for descriptor in descriptors:
                self._forget(descriptor, ready)

    def _on_readable(self, descriptor: int) -> None:
        for ready in list(self._waiting.get(descriptor, ())):
            _wake(ready)

    def _forget(self, descriptor: int, ready: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(descriptor)
        if waiting is None:
            return
        waiting.discard(ready)
        if not waiting:
            del self._waiting[descriptor]
            _ = self._loop.remove_reader(descriptor)

    def _look_again(self) -> None:
        """Wake everybody who waits, and watch none of their descriptors: one is closed, or will
        be, and its number may be another's soon."""
        watched, self._waiting = self._waiting, {}
        for descriptor, waiting in watched.items():
            _ = self._loop.remove_reader(descriptor)
            for ready in waiting:
                _wake(ready)

    def _serve(self) -> None:
        try:
            self._port.serve()
        except InitIsGone as gone:
            _ = self._loop.remove_reader(self._port.fileno)
            if not self.ended.done():
                self.ended.set_exception(gone)


def run(
    driver: Driver,
    port: TaskPort,
    main: Callable[[AioTask], Awaitable[int | None]],
    trace: Trace | None = None,
) -> int:
    """Run an ordinary program to its end, or to the first Exit: its exit code."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        loop = runner.get_loop()
        task = AioTask(driver, port, loop, trace)
        try:
            return runner.run(_main(task, main))
        finally:
            task.close()


async def _main(task: AioTask, main: Callable[[AioTask], Awaitable[int | None]]) -> int:
    program = asyncio.ensure_future(main(task))
    _ = await asyncio.wait((program, task.ended), return_when=asyncio.FIRST_COMPLETED)
    if task.ended.done():
        _ = program.cancel()
        return exit_code(task.ended.result())
    _ = task.ended.cancel()
    return exit_code(program.result())


async def _alone(trap: Trap[T]) -> T:
    return await trap


def _closed_set(error: OSError) -> AbiError:
    """A program sees the ABI's statuses alone: what Linux has run out of is NoSpace."""
    status = Status.NO_SPACE if error.errno in SHORT_ERRORS else Status.UNSUPPORTED
    return AbiError(status, str(error))


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _size_max(trap: Recv | ReplyRecv | Call) -> int:
    return trap.size_max if isinstance(trap, Recv) else MESSAGE_SIZE_MAX
