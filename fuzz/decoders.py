"""Mutated frames against every decoder and every server loop.

Any bytes give an answer or RemoteProtocolError, never another exception. One line per decoder
with the counts of accepted and refused; a decoder that accepted or refused nothing was not tested
and is a fault.

    python -m fuzz.decoders --frames 5000 --seed 1
"""

import argparse
import random  # noqa: TID251 (a fuzzer has a seeded generator of its own)
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from nexus.abi import (
    AbiError,
    AuditLines,
    AuditLog,
    BootImage,
    CapClose,
    ConsoleWrite,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    NewLink,
    Now,
    Pid,
    QosClass,
    Recv,
    ReplyRecv,
    Send,
    Sender,
    Slot,
    Status,
    TaskCounters,
    TaskStats,
    TaskTable,
    service_id,
)
from nexus.init.desk import Desk
from nexus.init.plan import Plan, make_plan
from nexus.init.record import Record
from nexus.init.supervisor import Supervisor
from nexus.init.system import parse
from nexus.ipc import Caller, CallFailure, Exchange, Peer, Refused, Spans
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import (
    GetResources,
    GetRouteCounts,
    GetService,
    Restart,
    Route,
    TaskState,
)
from nexus.protocols.meta import PROTOCOL as META
from nexus.runtime import Call, Server
from nexus.testing.golden import LEAST, MOST, NONCE, TYPICAL, frame, protocols, sample
from nexus.wire import (
    HEADER_SIZE,
    PREFIX_SIZE,
    REPLY_BIT,
    Codec,
    Protocol,
    RemoteProtocolError,
    encode,
    nonce_of,
)

FRAMES_DEFAULT: Final = 5_000  # per decoder, in `make test`; the campaign takes 200 000
UNCHANGED_SHARE: Final = 16  # one in so many inputs is left as it is
CUTS_MAX: Final = 4  # mutations of one input
INTERESTING: Final = (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xFF)
BIG: Final = Nanos(1 << 60)

Decoder = Callable[[bytes], object]
"""Takes bytes; returns if they are accepted, raises RemoteProtocolError if they are refused."""


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, changed in a few places."""
    data = bytearray(rng.choice(seeds))
    if rng.randrange(UNCHANGED_SHARE) == 0:
        return bytes(data)
    for _ in range(rng.randint(1, CUTS_MAX)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice(INTERESTING)
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 4))
            case 4:
                del data[at : at + rng.randint(1, 4)]
            case 5:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
            case _:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)


def bodies(declared: Any) -> list[bytes]:
    """Encoded samples of a message."""
    return [encode(sample(declared, which)) for which in (LEAST, TYPICAL, MOST)]


def batches(declared: Any) -> list[bytes]:
    """Encoded lists of one and two samples."""
    values = [sample(declared, which) for which in (LEAST, MOST)]
    return [encode(values[:1]), encode(values)]


def targets(protocol: Protocol) -> Iterator[tuple[str, Decoder, list[bytes]]]:
    """Every decoder of a protocol: its name, how to feed it, and correct inputs."""
    for codec in protocol.codecs.values():
        name = f"{protocol.name}.{codec.request_type.__name__}"
        yield f"{name} request", codec.decode_request, bodies(codec.request_type)
        yield f"{name} reply", codec.decode_reply, bodies(codec.reply_type)
        yield f"{name} request batch", codec.decode_requests, batches(codec.request_type)
        yield f"{name} reply batch", _items(codec), [*batches(codec.reply_type), encode([4, 5])]
    yield f"{protocol.name} server", ServerLoop(protocol), _frames(protocol)
    yield f"{protocol.name} client", ClientCalls(protocol), _replies(protocol)
    if protocol.number == INIT.number:
        yield f"{protocol.name} desk", InitDesk(), [*_known_names(), *_frames(INIT), *_frames(META)]


def _replies(protocol: Protocol) -> list[bytes]:
    return [
        frame(codec, which, reply=True)
        for codec in protocol.codecs.values()
        for which in (LEAST, TYPICAL, MOST)
    ]


def _items(codec: Codec) -> Decoder:
    return lambda body: codec.decode_items(body, 2 if len(body) > 1 and body[0] == 0x92 else 1)


def _frames(protocol: Protocol) -> list[bytes]:
    found = []
    for codec in protocol.codecs.values():
        for which in (LEAST, TYPICAL, MOST):
            single = bytearray(frame(codec, which, reply=False))
            single[16:24] = BIG.to_bytes(8, "little")
            found.append(bytes(single))
            found.append(bytes(single[:3] + b"\1" + single[4:HEADER_SIZE]) + _batch(codec, which))
    return found


def _batch(codec: Codec, which: str) -> bytes:
    return encode([sample(codec.request_type, which)])


class Typical:
    """A service that gives each request a typical reply of its declared type."""

    def handle(self, call: Call, _request: Any) -> Any:
        """The typical reply."""
        return sample(call.codec.reply_type, TYPICAL)


class ServerLoop:
    """The runtime's loop, fed with messages; accepts if it answered with OK.

    It stands for the kernel: each trap of the server gets the result that a healthy one has.
    """

    def __init__(self, protocol: Protocol) -> None:
        boot = BootImage(
            name="fuzzed",
            service=service_id("fuzzed"),
            pid=Pid(2),
            generation=1,
            control=None,
            endpoint=Slot(1),
            now=Nanos(1),
            argument=b"",
        )
        self._server = Server(Typical(), protocol, boot)
        self._program = self._server.run()
        self._sender = Sender(service_id("fuzzer"), Pid(3), 1, QosClass.NORMAL)
        self._trap: Any = self._program.send(None)
        bind = bytearray(frame(_bind_codec(), LEAST, reply=False))
        bind[16:24] = BIG.to_bytes(8, "little")
        _ = self._give(bytes(bind), Slot(5))

    def __call__(self, data: bytes) -> None:
        if not data:
            raise RemoteProtocolError("no kernel delivers an empty message")
        replies = self._give(data, None)
        if len(data) > 2 and data[2] & REPLY_BIT and not replies:
            raise RemoteProtocolError("not answered: a reply")
        assert len(replies) == 1, f"{len(replies)} answers to one message"
        if replies[0][6:8] != b"\0\0":
            raise RemoteProtocolError("refused with a status")

    def _give(self, data: bytes, cap: Slot | None) -> list[bytes]:
        """Deliver one message; what the server sends before it waits for the next."""
        replies: list[bytes] = []
        message = Message(data, self._sender, LinkId(7), cap, Nanos(2), Slot(1))
        self._trap = _resume(self._program, message)
        while True:
            match self._trap:
                case Send(data=frame_sent):
                    replies.append(bytes(frame_sent))
                    result: Any = None
                case ReplyRecv(slot=slot, data=frame_sent):
                    if slot is not None:
                        replies.append(bytes(frame_sent))
                    return replies
                case TaskStats():
                    result = TaskCounters(*[0] * len(TaskCounters._fields))
                case ConsoleWrite():
                    result = None
                case _:
                    raise AssertionError(f"the server awaits {self._trap!r}")
            self._trap = _resume(self._program, result)


_SYSTEM: Final = b"""
[system]
name = "fuzzed"

[service.timed]
program = "timed"

[service.fuzzer]
program = "timed"
capabilities = ["proof.control"]
uses = [{ name = "timed" }]
"""


class InitDesk:
    """init's own server, fed with messages of a service that may ask for everything.

    Each input finds a fresh init, so that no input depends on an earlier one. It accepts if it
    answered with OK, or holds the answer back; only a Bind brings its capability along.
    """

    def __init__(self) -> None:
        self._plan = make_plan(parse(_SYSTEM, Path("fuzzed.toml")))
        self._binds = {prefix for prefix, codec in META.dispatch.items() if codec is _bind_codec()}

    def __call__(self, data: bytes) -> None:
        if not data:
            raise RemoteProtocolError("no kernel delivers an empty message")
        desk, record = _desk(self._plan)
        sender = Sender(record.planned.service, record.pid, record.generation, QosClass.NORMAL)
        cap = Slot(8) if data[:PREFIX_SIZE] in self._binds else None
        message = Message(data, sender, LinkId(7), cap, Nanos(2), Slot(1))
        replies = _served(desk.on_message(record, message))
        if not replies and not desk.unanswerable:
            return  # held back, until there is something to tell
        if not replies or replies[0][6:8] != b"\0\0":
            raise RemoteProtocolError("not answered, or refused with a status")


def _known_names() -> list[bytes]:
    """Requests about a service that the desk's system has."""
    found = []
    for named in (Route, GetRouteCounts, GetService, GetResources, Restart):
        header = bytearray(frame(INIT.codecs[named], LEAST, reply=False)[:HEADER_SIZE])
        header[16:24] = BIG.to_bytes(8, "little")
        found.append(bytes(header) + encode(named(name="timed")))
    return found


def _desk(plan: Plan) -> tuple[Desk, Record]:
    """A desk of a system whose services are up, and the service that asks."""
    boot = BootImage(
        name="init-lite",
        service=service_id("init-lite"),
        pid=Pid(1),
        generation=1,
        control=None,
        endpoint=Slot(1),
        now=Nanos(1),
        argument=b"",
    )
    init = Supervisor(boot, plan, 1)
    for number, record in enumerate(init.records.values(), start=2):
        record.state = TaskState.UP
        record.pid, record.generation = Pid(number), 1
        record.slot, record.replies = Slot(number), Slot(10 + number)
    return Desk(init), init.records["fuzzer"]


def _served(handling: Any) -> list[bytes]:
    """Run what init does with one message; what it sends to the asker."""
    replies: list[bytes] = []
    result: Any = None
    while True:
        try:
            trap = _resume(handling, result)
        except StopIteration:
            return replies
        match trap:
            case Send(slot=slot, data=frame_sent):
                if slot >= 8:  # below are the links to services
                    replies.append(bytes(frame_sent))
                result = None
            case LinkCreate():
                result = NewLink(Slot(9), None)
            case TaskTable():
                result = ()
            case AuditLog():
                result = AuditLines((), 0)
            case TaskStats():
                result = TaskCounters(*[0] * len(TaskCounters._fields))
            case Now():
                result = Nanos(2)
            case CapClose() | Kill() | ConsoleWrite():
                result = None
            case _:
                raise AssertionError(f"init awaits {trap!r}")


def _resume(program: Any, result: Any) -> Any:
    """The next trap of a server or a client. A malformed message is not its end."""
    try:
        return program.send(result)
    except RemoteProtocolError as error:
        raise AssertionError("a malformed message ends the program") from error


class ClientCalls:
    """One call per input, which is the answer; accepts if it is taken for the reply.

    An input that still has the golden nonce gets the call's own header bytes, so that mutations
    of the rest are looked at too; after the input there is silence until the deadline.
    """

    def __init__(self, protocol: Protocol) -> None:
        self._codecs = {codec.op: codec for codec in protocol.codecs.values()}
        self._default = next(iter(self._codecs.values()))
        terms = LinkTerms()
        peer = Peer(
            "fuzzed",
            slot=Slot(3),
            inbox=Slot(2),
            link=LinkId(7),
            service=service_id("fuzzed"),
            generation=1,
            terms=terms,
            reply_terms=terms,
        )
        self._exchange = Exchange(Caller(Spans(b"", "fuzzer", 1)), protocol, peer)
        self._sender = Sender(service_id("fuzzed"), Pid(3), 1, QosClass.NORMAL)

    def __call__(self, data: bytes) -> None:
        if not data:
            raise RemoteProtocolError("no kernel delivers an empty message")
        op = data[2] & ~REPLY_BIT if len(data) > 2 else 0
        codec = self._codecs.get(op, self._default)
        outcome = self._call(sample(codec.request_type, LEAST), data)
        if isinstance(outcome, CallFailure | Refused):
            raise RemoteProtocolError(repr(outcome))
        assert type(outcome) is codec.reply_type

    def _call(self, request: Any, data: bytes) -> Any:
        program: Any = self._exchange.call(request, BIG)
        trap = program.send(None)
        if nonce_of(data) == NONCE:
            data = data[:8] + bytes(trap.data[8:HEADER_SIZE]) + data[HEADER_SIZE:]
        trap.sent = True
        message = Message(data, self._sender, LinkId(7), None, Nanos(2), Slot(2))
        try:
            trap = _resume(program, message)
            while isinstance(trap, Recv):
                trap = program.throw(AbiError(Status.TIMED_OUT))
        except StopIteration as stop:
            return stop.value
        raise AssertionError(f"the client awaits {trap!r}")


def _bind_codec() -> Codec:
    meta = next(protocol for protocol in protocols() if protocol.number == 0)
    return next(codec for codec in meta.codecs.values() if codec.op == 1)


def fuzz(decoder: Decoder, seeds: Sequence[bytes], rng: random.Random, count: int) -> list[int]:
    """Feed `count` mutated inputs; how many were accepted, and how many refused."""
    counts = [0, 0]
    for _ in range(count):
        data = mutate(rng, seeds)
        try:
            _ = decoder(data)
        except RemoteProtocolError:
            counts[1] += 1
        except BaseException:
            print(f"fuzz: the input was {data.hex()}", file=sys.stderr)
            raise
        else:
            counts[0] += 1
    return counts


def campaign(count: int, seed: int) -> dict[str, list[int]]:
    """Every decoder of every protocol; accepted and refused by name."""
    return {
        name: fuzz(decoder, seeds, random.Random(f"{seed} {name}"), count)
        for protocol in protocols()
        for name, decoder, seeds in targets(protocol)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if a decoder accepted or refused nothing."""
    parser = argparse.ArgumentParser(prog="fuzz.decoders", description=__doc__)
    parser.add_argument("--frames", type=int, default=FRAMES_DEFAULT, help="inputs per decoder")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    idle = 0
    for name, (accepted, refused) in campaign(options.frames, options.seed).items():
        fault = "" if accepted and refused else "  NOT TESTED"
        idle += bool(fault)
        print(f"{name:44s} accepted {accepted:7d}  refused {refused:7d}{fault}")
    return 1 if idle else 0


if __name__ == "__main__":
    sys.exit(main())
