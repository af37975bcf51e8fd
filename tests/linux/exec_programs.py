"""Programs that the tests have executed in an interpreter of their own: named by their entry."""

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from nexus.abi import (
    NEVER,
    AbiError,
    BootImage,
    CapClose,
    ClockMap,
    Exit,
    Fence,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Recv,
    Send,
    SleepUntil,
    Trap,
    VmoCreate,
    VmoShare,
)

PATIENCE: Final = 20_000_000_000  # nanoseconds
MS: Final = 1_000_000  # nanoseconds
TICKS: Final = 5  # of a loop that goes on while others wait

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]


async def tell(boot: BootImage, answer: object) -> None:
    """Send a report, as short as it is, to the root."""
    assert boot.control is not None, "only the root has no control link"
    await Send(boot.control, json.dumps(answer).encode())


async def who(boot: BootImage) -> None:
    """Tells what differs between interpreters, and what must not be there."""
    await tell(
        boot,
        {
            "hash": hash("nexus"),
            "layout": id(None),
            "argument": boot.argument.decode(),
            "environ": dict(os.environ),
            "argv": sys.argv,
            "service": boot.service,
            "ids": [os.getuid(), os.getgid()],
            "init_here": sorted(
                {"nexus.init", "pytest", "nexus.kernel.linux.kernel"} & set(sys.modules)
            ),
        },
    )


def made(word: str, other: str) -> Main:
    """A maker: what an entry of several words calls."""

    async def main(boot: BootImage) -> None:
        await tell(boot, [word, other])

    return main


async def threads(boot: BootImage) -> None:
    """Starts threads until one is refused; tells how many ran at a time."""
    await tell(boot, count_threads(int(boot.argument)))


def count_threads(most: int) -> int:
    """How many threads can be alive together, up to `most`."""
    end = threading.Event()
    alive = []
    for _ in range(most):
        thread = threading.Thread(target=end.wait)
        try:
            thread.start()
        except RuntimeError:
            break
        alive.append(thread)
    end.set()
    for thread in alive:
        thread.join()
    return len(alive)


# ---------------------------------------------------------------- makers that fail


def raises(_word: str) -> Main:
    """An import that raises, in code of its own."""
    raise LookupError("no such pump")


def hangs(_word: str) -> Main:
    """An import that does not end."""
    while True:
        signal.pause()


def sleeps(seconds: str) -> Main:
    """An import that takes its time; the program then gives back what was sent to it."""
    time.sleep(float(seconds))  # noqa: TID251 (an import of a user's, not a service)
    return gives_back


async def gives_back(boot: BootImage) -> None:
    """Answers each message with itself, until it is sent "end"."""
    assert boot.control is not None, "only the root has no control link"
    while True:
        try:
            message = await Recv((boot.endpoint,), Nanos(await Now() + PATIENCE))
        except PeerGone:
            continue
        if message.data == b"end":
            return
        await Send(boot.control if message.cap is None else message.cap, message.data)


async def shares(boot: BootImage) -> None:
    """Shares memory with the root, which says "write" and looks; tells the clock's steps."""
    assert boot.control is not None, "only the root has no control link"
    vmo = await VmoCreate(1)
    view = await VmoShare(vmo)
    await Send(boot.control, b"watch", move=vmo)
    _ = await Recv((boot.endpoint,), Nanos(await Now() + PATIENCE))
    clock = await ClockMap()
    before = await Now()
    view[:5] = b"words"
    await Fence()
    await tell(boot, [before, clock.monotonic(), await Now(), clock.wall()])
    view.release()


async def shares_beside(boot: BootImage, task: Any) -> int:
    """The same in an ordinary program."""
    await task.run(shares(boot))
    return 0


def dies(_word: str) -> Main:
    """A process that ends while it imports."""
    os._exit(3)


def pretends(_word: str) -> Main:
    """Says by itself that it is confined, as root, and then looks what it is given."""
    (channel,) = (fd for fd in range(3, 16) if _is_socket(fd))
    end = socket.socket(fileno=channel)
    _ = end.send(bytes((1,)) + json.dumps([0, 0, [], ""]).encode())
    _ = end.recv(1 << 16)
    os._exit(0)


def babbles(word: str) -> Main:
    """Says something else."""
    (channel,) = (fd for fd in range(3, 16) if _is_socket(fd))
    _ = socket.socket(fileno=channel).send(b"\x01[" * 2000)
    return hangs(word)


def breaks(word: str) -> Main:
    """Says that it is prepared, in words that are none, and lives on."""
    (channel,) = (fd for fd in range(3, 16) if _is_socket(fd))
    _ = socket.socket(fileno=channel).send(b"\x01" + word.encode())
    return hangs(word)


def speaks(word: str) -> Main:
    """Says that it is prepared, but in a frame of another kind."""
    (channel,) = (fd for fd in range(3, 16) if _is_socket(fd))
    _ = socket.socket(fileno=channel).send(b"\x02" + json.dumps([0, 0, [], ""]).encode())
    return hangs(word)


def _is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False


# ---------------------------------------------------------------- under asyncio


async def _ask(boot: BootImage, text: str, asked: list[str]) -> str:
    """One call over the control link, answered at a fresh inbox link that moves along. It is noted
    when it only waits any more."""
    deadline = Nanos(await Now() + PATIENCE)
    inbox = await LinkCreate(boot.endpoint, LinkTerms())
    assert boot.control is not None
    assert inbox.link is not None
    await Send(boot.control, text.encode(), move=inbox.slot, deadline=deadline)
    asked.append(text)
    return (await Recv((boot.endpoint,), deadline, link=inbox.link)).data.decode()


async def _late(span: int) -> int:
    until = Nanos(await Now() + span)
    return await SleepUntil(until) - until


async def _timed_out(boot: BootImage, span: int) -> list[object]:
    until = Nanos(await Now() + span)
    try:
        _ = await Recv((boot.endpoint,), until, link=None)
    except AbiError as error:
        return [error.status.name, await Now() - until]
    return ["message", 0]


async def many_at_once(boot: BootImage, task: Any) -> int:
    """Several waits at the same time, beside asyncio's own; the root answers the last first."""
    asked: list[str] = []

    async def ticking() -> None:
        ticks = 0
        while True:
            await asyncio.sleep(0.001)
            ticks += len(asked) == 4
            if ticks == TICKS:
                await task.run(tell(boot, "ticked"))

    ticker = asyncio.create_task(ticking())
    answers = await asyncio.gather(
        *(task.run(_ask(boot, f"q{index}", asked)) for index in range(4))
    )
    late = await asyncio.gather(*(task.run(_late(span * MS)) for span in (20, 5, 10)))
    nothing = await task.run(_timed_out(boot, 15 * MS))
    ticker.cancel()
    await task.run(tell(boot, {"answers": answers, "late": late, "nothing": nothing}))
    return 7


async def closes_under_a_wait(boot: BootImage, task: Any) -> int:
    """A link is closed by one coroutine while another waits on it."""
    inbox = await task.trap(LinkCreate(boot.endpoint, LinkTerms()))

    async def wait() -> str:
        try:
            _ = await Recv((boot.endpoint,), Nanos(await Now() + PATIENCE), link=inbox.link)
        except PeerGone:
            return "gone"
        except AbiError as error:
            return error.status.name
        return "message"

    waiting = asyncio.create_task(task.run(wait()))
    await asyncio.sleep(0.01)
    start = asyncio.get_running_loop().time()
    await task.trap(CapClose(inbox.slot))
    outcome = await waiting
    took = asyncio.get_running_loop().time() - start
    await task.run(tell(boot, [outcome, took]))
    return 0


async def waits_for_room(boot: BootImage, task: Any) -> int:
    """Fills its control link, waits in vain for room, gives up a wait, and goes on."""
    assert boot.control is not None, "only the root has no control link"
    await task.run(tell(boot, "runs"))
    aside = (await task.trap(Recv((boot.endpoint,), NEVER))).cap
    assert aside is not None
    sent = late = 0
    refusal = ""
    while not refusal:
        until = Nanos(await task.trap(Now()) + 5 * MS)
        try:
            await task.trap(Send(boot.control, b"fill", deadline=until))
        except AbiError as error:
            late = await task.trap(Now()) - until
            refusal = error.status.name
        else:
            sent += 1
    cancelled = asyncio.create_task(task.run(_late(10_000 * MS)))
    listening = asyncio.create_task(task.run(_timed_out(boot, 10_000 * MS)))
    await asyncio.sleep(0.01)
    for waiting in (cancelled, listening):
        _ = waiting.cancel()
    _ = await asyncio.gather(cancelled, listening, return_exceptions=True)
    until = Nanos(await task.trap(Now()) + PATIENCE)
    answer = json.dumps([sent, refusal, late, cancelled.cancelled() and listening.cancelled()])
    answering = asyncio.create_task(task.trap(Send(boot.control, answer.encode(), deadline=until)))
    await asyncio.sleep(0.01)
    assert not answering.done(), "the link is full"
    await task.trap(Send(aside, b"waiting"))
    await answering
    return 0


async def serves_tcp(boot: BootImage, task: Any) -> int:
    """Echoes one line on a granted listening socket, with an ordinary library's server."""
    ((name, descriptor),) = boot.descriptors
    listening = socket.socket(fileno=descriptor)
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name.encode() + b":" + await reader.readline())
        await writer.drain()
        writer.close()
        done.set()

    server = await asyncio.start_server(handle, sock=listening)
    await task.run(tell(boot, "ready"))
    async with asyncio.timeout(PATIENCE / 1e9):
        await done.wait()
    server.close()
    return 0


async def connects_tcp(boot: BootImage, task: Any) -> int:
    """Talks to the granted port, and tries the ports it is told."""
    granted, other = json.loads(boot.argument)
    reader, writer = await asyncio.open_connection("127.0.0.1", granted)
    writer.write(b"hello\n")
    line = await reader.readline()
    writer.close()
    try:
        _ = await asyncio.open_connection("127.0.0.1", other)
        refused = 0
    except OSError as error:
        refused = error.errno or -1
    await task.run(tell(boot, [line.decode(), refused]))
    return 0


async def reads_device(boot: BootImage) -> None:
    """Reads a granted device and sees whether it may write to it."""
    found = {}
    for name, descriptor in boot.descriptors:
        data = os.read(descriptor, 4)
        try:
            written = os.write(descriptor, b"x")
        except OSError as error:
            written = -(error.errno or 0)
        found[name] = [data.hex(), written]
    await tell(boot, found)


async def stops(boot: BootImage, task: Any) -> int:
    """Says that it runs, until it is told to end, by an Exit trap from one of two coroutines."""

    async def leave() -> None:
        _ = await Recv((boot.endpoint,), Nanos(await Now() + PATIENCE))
        await Exit(5)

    await task.run(tell(boot, "runs"))
    _ = asyncio.create_task(task.run(leave()))  # noqa: RUF006 (the program outlives it)
    await asyncio.sleep(PATIENCE / 1e9)
    return 1
