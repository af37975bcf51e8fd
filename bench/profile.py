"""Why a call costs what it costs: layers from the paired runs, steps from loops of one thing.

A sampling or tracing profiler moves the numbers it shows at this scale. So the layers above the
kernel are driven by hand, with messages made beforehand in place of a kernel, and single steps
are timed in loops. Both keep caches warm, which a call that switches processes twice does not;
what that costs is the remainder in the table of layers.
"""

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final

from bench.echo import BENCH_DATA, BENCH_KEY, PROTOCOL, Data, Read
from bench.measure import PAYLOAD_SIZE
from bench.pairing import Variant
from bench.programs import CLIENT, SERVER, TRACE_SEED, EchoService
from bench.report import Step
from nexus.abi import (
    NEVER,
    BootImage,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    Pid,
    QosClass,
    ReplyRecv,
    Sender,
    Slot,
    Trap,
    service_id,
)
from nexus.ipc import Client, Peer, Peers, RetryTokens
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Bind
from nexus.runtime import Server
from nexus.wire import HEADER, HEADER_SIZE, PREFIX_SIZE, encode

LOOP_COUNT: Final = 1_000  # short enough to fit between two interruptions now and then
LOOPS: Final = 60  # the fastest counts: whatever else runs only adds time
OFFSET_MASK: Final = 0xFFFF
RECEIVE_SIZE: Final = 8304  # bytes; as the kernel backend
CONTROL_SIZE: Final = socket.CMSG_SPACE(12) + socket.CMSG_LEN(4)
FAR: Final = Nanos(1 << 60)
NOW: Final = Nanos(1)


def _loop_ns(work: Callable[[int], None]) -> float:
    """Nanoseconds of one turn of `work(count)`, less those of an empty loop."""

    def nothing(count: int) -> None:
        for _ in range(count):
            pass

    def fastest(body: Callable[[int], None]) -> int:
        times = []
        for _ in range(LOOPS):
            start = time.perf_counter_ns()
            body(LOOP_COUNT)
            times.append(time.perf_counter_ns() - start)
        return min(times)

    return max(0.0, (fastest(work) - fastest(nothing)) / LOOP_COUNT)


def _boot(name: str) -> BootImage:
    return BootImage(
        name=name,
        service=service_id(name),
        pid=Pid(7),
        generation=1,
        control=Slot(0),
        endpoint=Slot(1),
        now=NOW,
        argument=b"",
    )


def _sender(name: str) -> Sender:
    return Sender(service_id(name), Pid(7), 1, QosClass.NORMAL)


def client_layer_ns() -> float:
    """client.call without a kernel: everything from the request object to the reply object."""
    peer = Peer(
        SERVER,
        slot=Slot(2),
        inbox=Slot(3),
        link=LinkId(1),
        service=service_id(SERVER),
        generation=1,
        terms=LinkTerms(),
        reply_terms=LinkTerms(),
    )
    client = Client(Peers(_boot(CLIENT), TRACE_SEED), PROTOCOL, peer, RetryTokens())
    sender = _sender(SERVER)
    prefix = PROTOCOL.codecs[Read].reply_prefix
    body = encode(Data(ok=True, data=BENCH_DATA))

    def answer(data: bytes | bytearray) -> Message:
        frame = prefix + bytes(data[PREFIX_SIZE:HEADER_SIZE]) + body
        return Message(frame, sender, LinkId(1), None, NOW, Slot(3))

    async def caller() -> None:
        offset = 0
        while True:
            offset = (offset + 1) & OFFSET_MASK
            reply = await client.call(Read(BENCH_KEY, offset, 9), FAR)
            assert type(reply) is Data

    running: Any = caller()
    trap = running.send(None)

    def call(count: int) -> None:
        for _ in range(count):
            running.send(answer(trap.data))

    request = bytes(HEADER_SIZE)

    def only_answer(count: int) -> None:
        for _ in range(count):
            answer(request)

    return _loop_ns(call) - _loop_ns(only_answer)


def server_layer_ns() -> float:
    """The runtime's server without a kernel: from a message to the next ReplyRecv."""
    running: Any = Server(EchoService(), PROTOCOL, _boot(SERVER)).run()
    sender = _sender(CLIENT)
    trap = running.send(None)
    meta = META.codecs[Bind].prefix
    tail = HEADER.pack(0, 0, 0, 0, 0, 0, 1, FAR, b"t" * 16, b"s" * 8)[PREFIX_SIZE:]
    bind = Message(meta + tail + encode(Bind()), sender, LinkId(1), Slot(4), NOW, Slot(1))
    trap = running.send(bind)
    while type(trap) is not ReplyRecv:
        trap = running.send(None)
    frame = PROTOCOL.codecs[Read].prefix + tail + encode(Read(BENCH_KEY, 7, 9))
    message = Message(frame, sender, LinkId(1), None, NOW, Slot(1))
    resume = running.send

    def serve(count: int) -> None:
        for _ in range(count):
            assert resume(message).slot == 4

    return _loop_ns(serve)


class _Kept(Trap[None]):
    __slots__ = ()


def kernel_steps() -> list[Step]:
    """What the Linux backend does for one round trip, one thing at a time."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    payload = bytes(PAYLOAD_SIZE)

    def plain(count: int) -> None:
        send, recv = near.send, far.recv
        for _ in range(count):
            send(payload)
            recv(RECEIVE_SIZE)

    plain_ns = _loop_ns(plain)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def credentials(count: int) -> None:
        send, recvmsg = near.send, far.recvmsg
        for _ in range(count):
            send(payload)
            recvmsg(RECEIVE_SIZE, CONTROL_SIZE)

    credentials_ns = _loop_ns(credentials)
    waiting = select.epoll()
    waiting.register(far.fileno(), select.EPOLLIN)
    near.send(payload)

    def poll(count: int) -> None:
        wait = waiting.poll
        for _ in range(count):
            wait(-1, 16)

    poll_ns = _loop_ns(poll)
    waiting.close()
    near.close()
    far.close()
    stamp = struct.pack("=iII", os.getpid(), 0, 0)
    known = {stamp: _sender(CLIENT)}
    cells = memoryview(bytearray(64)).cast("Q")
    queue: deque[int] = deque(maxlen=8)

    def identity(count: int) -> None:
        for _ in range(count):
            if cells[0] != 0 or known.get(stamp) is None:
                raise AssertionError

    def account(count: int) -> None:
        size = sent_size = 0
        for _ in range(count):
            if len(queue) > 8 or size < 0:
                raise AssertionError
            queue.append(PAYLOAD_SIZE)
            size += PAYLOAD_SIZE
            sent_size += PAYLOAD_SIZE

    def message(count: int) -> None:
        make, clock = tuple.__new__, time.monotonic_ns
        for _ in range(count):
            make(Message, (payload, None, 1, None, clock(), 1))

    def seam() -> Generator[object, None, None]:
        kept = _Kept()
        while True:
            yield from kept.__await__()

    switch = seam()
    next(switch)

    def resume(count: int) -> None:
        send = switch.send
        for _ in range(count):
            send(None)

    return [
        Step("send and recv, no switch of process", plain_ns, 2),
        Step("credentials: recvmsg and its list instead of recv", credentials_ns - plain_ns, 2),
        Step("epoll at the server", poll_ns),
        Step("identity: epoch cell, sender of these credentials", _loop_ns(identity), 2),
        Step("queue account and counters of a send", _loop_ns(account), 2),
        Step("message with its time stamp", _loop_ns(message), 2),
        Step("seam: resume a coroutine up to its next trap", _loop_ns(resume), 2),
    ]


def wire_steps() -> list[Step]:
    """What encoding and checking of one typed round trip costs, part of the layers above."""
    codec = PROTOCOL.codecs[Read]
    request, reply = Read(BENCH_KEY, 7, 9), Data(ok=True, data=BENCH_DATA)
    request_body, reply_body = encode(request), encode(reply)
    trail = b"t" * 16 + b"s" * 8
    pack = struct.Struct("<8sQQ24s").pack
    frame = pack(codec.prefix, 5, NEVER, trail) + request_body

    def encode_both(count: int) -> None:
        for _ in range(count):
            encode(request)
            encode(reply)

    def decode_both(count: int) -> None:
        for _ in range(count):
            codec.decode_request(request_body)
            codec.decode_reply(reply_body)

    def header(count: int) -> None:
        for _ in range(count):
            pack(codec.prefix, 5, NEVER, trail)

    def dispatch(count: int) -> None:
        table, deadline_of = PROTOCOL.dispatch, struct.Struct("<16xQ").unpack_from
        for _ in range(count):
            table.get(frame[:PREFIX_SIZE])
            deadline_of(frame)

    return [
        Step("encode request and reply", _loop_ns(encode_both)),
        Step("request header: nonce, deadline, trace", _loop_ns(header)),
        Step("dispatch by prefix, deadline of the frame", _loop_ns(dispatch)),
        Step("strict decode of request and reply", _loop_ns(decode_both)),
    ]


def steps(cpu: int) -> list[Step]:
    """All single steps, on `cpu`."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        return kernel_steps() + wire_steps()
    finally:
        os.sched_setaffinity(0, allowed)


def layers(variants: dict[str, Variant], cpu: int) -> list[Step]:
    """The typed call as a sum: medians of the runs on one CPU, and the layers driven by hand."""
    python, bare, typed = (variants[name] for name in ("python_sockets", "bare", "typed"))
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        client_ns, server_ns = client_layer_ns(), server_layer_ns()
    finally:
        os.sched_setaffinity(0, allowed)

    c_ns = typed.spread(lambda pair: pair.c_p50_ns).median

    def p50(variant: Variant) -> float:
        # By the paired ratio: the runs were not all made at the same speed of the machine.
        return variant.spread(lambda pair: pair.ratio).median * c_ns

    rest = p50(typed) - p50(bare) - client_ns - server_ns
    return [
        Step("C ping-pong: four socket calls, two switches", c_ns),
        Step("Python's socket calls instead of C's", p50(python) - c_ns),
        Step("kernel backend: credentials, epoll, accounts, seam", p50(bare) - p50(python)),
        Step("ipc: client.call, driven by hand", client_ns),
        Step("runtime: server and handler, driven by hand", server_ns),
        Step("the rest: colder caches, more bytes", rest),
    ]
