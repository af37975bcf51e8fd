"""The peers: one function per variant, each starts a server process and times echo calls.

Each peer gets its fastest fair form: blocking calls where it has them, the low-level interface
where there is a choice, 64 bytes each way. They check nothing that ours checks.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from bench.measure import (
    PAYLOAD_SIZE,
    WARMUP_NS,
    Placement,
    Sample,
    UnavailableError,
    cpu_time_ns,
    pin,
    summarise,
    time_calls,
)

PAYLOAD: Final = bytes(PAYLOAD_SIZE)
RECEIVE_SIZE: Final = 8304  # bytes; what our own kernel receives into
BUS_NAME: Final = "org.nexus.Echo"
BUS_PATH: Final = "/org/nexus/Echo"
DBUS_FAST_ABSENT: Final = "dbus-fast is absent: pip install dbus-fast"
BUS_START_SECONDS_MAX: Final = 5.0
BUS_CONFIG: Final = """<!DOCTYPE busconfig PUBLIC
 "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen>
<policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
"""


@contextlib.contextmanager
def server_process(main: Callable[[], None], cpu: int) -> Iterator[int]:
    """Fork a child that runs `main` on `cpu`; it is killed at the end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            pin(cpu)
            main()
            code = 0
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def python_sockets(placement: Placement, seconds: float) -> Sample:
    """The floor of Python: send and recv on the same kind of socket, nothing else."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        ours.close()
        while data := theirs.recv(RECEIVE_SIZE):
            theirs.send(data)

    with server_process(serve, placement.server) as pid:
        theirs.close()
        pin(placement.client)

        def call() -> None:
            ours.send(PAYLOAD)
            ours.recv(RECEIVE_SIZE)

        return time_calls(call, seconds, (os.getpid(), pid))


def connection_bytes(placement: Placement, seconds: float) -> Sample:
    """multiprocessing.Connection, bytes both ways."""
    ours, theirs = multiprocessing.Pipe()

    def serve() -> None:
        ours.close()
        while True:
            theirs.send_bytes(theirs.recv_bytes())

    def call(connection: Connection = ours) -> None:
        connection.send_bytes(PAYLOAD)
        connection.recv_bytes()

    with server_process(serve, placement.server) as pid:
        theirs.close()
        pin(placement.client)
        return time_calls(call, seconds, (os.getpid(), pid))


def connection_objects(placement: Placement, seconds: float) -> Sample:
    """multiprocessing.Connection with objects (pickle), the fields of our typed call."""
    ours, theirs = multiprocessing.Pipe()
    request = ("k" * 16, 7, 9)
    reply = (True, b"d" * 24)

    def serve() -> None:
        ours.close()
        while True:
            theirs.recv()
            theirs.send(reply)

    def call(connection: Connection = ours) -> None:
        connection.send(request)
        connection.recv()

    with server_process(serve, placement.server) as pid:
        theirs.close()
        pin(placement.client)
        return time_calls(call, seconds, (os.getpid(), pid))


def pyzmq(placement: Placement, seconds: float) -> Sample:
    """pyzmq REQ and REP over ipc://, blocking."""
    try:
        import zmq
    except ImportError:
        raise UnavailableError("pyzmq is absent: pip install pyzmq") from None

    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        address = f"ipc://{folder}/echo"

        def serve() -> None:
            answering = zmq.Context().socket(zmq.REP)
            answering.bind(address)
            while True:
                answering.send(answering.recv())

        with server_process(serve, placement.server) as pid:
            pin(placement.client)
            context = zmq.Context()
            asking = context.socket(zmq.REQ)
            asking.connect(address)

            def call() -> None:
                asking.send(PAYLOAD)
                asking.recv()

            try:
                return time_calls(call, seconds, (os.getpid(), pid))
            finally:
                asking.close(linger=0)
                context.term()


@contextlib.contextmanager
def _private_bus(cpu: int) -> Iterator[tuple[str, int]]:
    """A dbus-daemon of our own on `cpu`: its address and pid."""
    program = shutil.which("dbus-daemon")
    if program is None:
        raise UnavailableError("dbus-daemon is absent: apt-get install dbus-daemon (or dbus)")
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        path = Path(folder, "bus")
        config = Path(folder, "bus.conf")
        config.write_text(BUS_CONFIG.format(path=path), encoding="utf-8")
        daemon = subprocess.Popen(
            (program, f"--config-file={config}", "--nofork", "--nopidfile"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            os.sched_setaffinity(daemon.pid, {cpu})
            end = time.perf_counter() + BUS_START_SECONDS_MAX
            while not path.exists():
                if daemon.poll() is not None or time.perf_counter() > end:
                    raise UnavailableError("dbus-daemon did not start")
                time.sleep(0.01)
            yield f"unix:path={path}", daemon.pid
        finally:
            daemon.kill()
            daemon.wait()


async def _time_async_calls(
    call: Callable[[], Awaitable[bool]], seconds: float, pids: tuple[int, ...]
) -> Sample:
    """As measure.time_calls, for a call that is awaited. `call` says whether it was answered."""
    while not await call():  # noqa: ASYNC110 (what is awaited is a foreign process)
        await asyncio.sleep(0.01)  # until the server owns its name
    gc.collect()
    gc.freeze()
    clock = time.perf_counter_ns
    end = clock() + WARMUP_NS
    while clock() < end:
        await call()
    samples: list[int] = []
    cpu = cpu_time_ns(pids)
    start = last = clock()
    end = start + int(seconds * 1e9)
    while last < end:
        answered = await call()
        assert answered
        now = clock()
        samples.append(now - last)
        last = now
    return summarise(samples, last - start, cpu_time_ns(pids) - cpu, 1)


def dbus_fast(placement: Placement, seconds: float) -> Sample:
    """dbus-fast at both ends of a private dbus-daemon, which shares the server's CPU.

    The typed form, as ours is: a ServiceInterface method and a proxy made from its description.
    """
    try:
        from dbus_fast import DBusError
        from dbus_fast.aio import MessageBus

        from bench.dbus_echo import EchoInterface
    except ImportError:
        raise UnavailableError(DBUS_FAST_ABSENT) from None

    async def serve(address: str) -> None:
        bus = await MessageBus(bus_address=address).connect()
        bus.export(BUS_PATH, EchoInterface(BUS_NAME))
        await bus.request_name(BUS_NAME)
        await bus.wait_for_disconnect()

    async def ask(address: str, pids: tuple[int, ...]) -> Sample:
        bus = await MessageBus(bus_address=address).connect()
        description: Any = None
        while description is None:
            try:
                description = await bus.introspect(BUS_NAME, BUS_PATH)
            except DBusError:
                await asyncio.sleep(0.01)  # until the server owns its name
        proxy: Any = bus.get_proxy_object(BUS_NAME, BUS_PATH, description)
        read = proxy.get_interface(BUS_NAME).call_read

        async def call() -> bool:
            reply = await read("k" * 16, 7, 9)
            return bool(reply[0])

        try:
            return await _time_async_calls(call, seconds, pids)
        finally:
            bus.disconnect()

    return _over_bus(serve, ask, placement)


def dbus_fast_messages(placement: Placement, seconds: float) -> Sample:
    """dbus-fast without its typed layer: hand-made messages and a message handler."""
    try:
        from dbus_fast import Message, MessageType
        from dbus_fast.aio import MessageBus
    except ImportError:
        raise UnavailableError(DBUS_FAST_ABSENT) from None

    def answer(message: Message) -> Message | None:
        if message.message_type is MessageType.METHOD_CALL and message.member == "Echo":
            return Message.new_method_return(message, "ay", message.body)
        return None

    async def serve(address: str) -> None:
        bus = await MessageBus(bus_address=address).connect()
        bus.add_message_handler(answer)
        await bus.request_name(BUS_NAME)
        await bus.wait_for_disconnect()

    async def ask(address: str, pids: tuple[int, ...]) -> Sample:
        bus = await MessageBus(bus_address=address).connect()

        async def call() -> bool:
            reply = await bus.call(
                Message(
                    destination=BUS_NAME,
                    path=BUS_PATH,
                    interface=BUS_NAME,
                    member="Echo",
                    signature="ay",
                    body=[PAYLOAD],
                )
            )
            return reply is not None and reply.message_type is MessageType.METHOD_RETURN

        try:
            return await _time_async_calls(call, seconds, pids)
        finally:
            bus.disconnect()

    return _over_bus(serve, ask, placement)


def _over_bus(
    serve: Callable[[str], Coroutine[None, None, None]],
    ask: Callable[[str, tuple[int, ...]], Coroutine[None, None, Sample]],
    placement: Placement,
) -> Sample:
    with (
        _private_bus(placement.server) as (address, daemon),
        server_process(lambda: asyncio.run(serve(address)), placement.server) as pid,
    ):
        pin(placement.client)
        return asyncio.run(ask(address, (os.getpid(), pid, daemon)))


PEERS: Final[dict[str, Callable[[Placement, float], Sample]]] = {
    "python_sockets": python_sockets,
    "connection_bytes": connection_bytes,
    "connection_objects": connection_objects,
    "pyzmq": pyzmq,
    "dbus_fast": dbus_fast,
    "dbus_fast_messages": dbus_fast_messages,
}
