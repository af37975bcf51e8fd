"""A small protocol and its service, with every kind of answer a service can give."""

from enum import IntEnum
from typing import Annotated, Final, assert_never

from nexus.abi import LinkId, Nanos, Slot
from nexus.runtime import Call, Deferred
from nexus.wire import I64, U16, U32, Blob, Message, Protocol, Request

SUM_MAX: Final = 1000


class AdderStatus(IntEnum):
    """Why the adder refuses."""

    TOO_LARGE = 16
    NO_CAPABILITY = 17


class Sum(Message):
    """The sum."""

    value: Annotated[int, I64()]


class Add(Request[Sum], op=1, idempotent=True, refuses=AdderStatus):
    """Add two numbers."""

    a: Annotated[int, U32()]
    b: Annotated[int, U32()]


class Later(Request[Sum], op=2, idempotent=False):
    """Answered by the next Now of anybody, or `delay` ns later."""

    value: Annotated[int, U32()]
    delay: Annotated[int, U32()]


class Keep(Request[Sum], op=3, idempotent=False, refuses=AdderStatus, moves=True):
    """Brings a capability; the answer tells its slot."""

    take: Annotated[int, U16()]


class Give(Request[Sum], op=4, idempotent=False, gives=True):
    """The kept capability moves with the answer."""


class Bytes(Message):
    """Bytes."""

    data: Annotated[bytes, Blob(size_max=4096)]


class Large(Request[Bytes], op=5, idempotent=True):
    """As many bytes as asked for."""

    size: Annotated[int, U16(maximum=4096)]


AdderRequest = Add | Later | Keep | Give | Large
ADDER: Final = Protocol("adder", number=900, version=1, requests=(Add, Later, Keep, Give, Large))


class Adder:
    """Serves ADDER."""

    def __init__(self) -> None:
        self.seen: list[Call] = []
        self.deadlines: list[Nanos] = []
        self.spans: list[bytes] = []
        self.later: list[tuple[Nanos, Deferred, int]] = []
        self.kept: Slot | None = None
        self.gone: list[LinkId] = []
        self.is_ready = True

    def handle(self, call: Call, request: AdderRequest) -> Sum | Bytes | Deferred:
        self.deadlines.append(call.deadline)
        match request:
            case Add():
                return self._add(call, request)
            case Later():
                deferred = call.defer()
                self.later.append((Nanos(call.now + request.delay), deferred, request.value))
                return deferred
            case Keep():
                return self._keep(call, request)
            case Give():
                assert self.kept is not None
                call.give_cap(self.kept)
                return Sum(int(self.kept))
            case Large():
                return Bytes(bytes(request.size))
            case _:
                assert_never(request)

    def _add(self, call: Call, request: Add) -> Sum:
        value = request.a + request.b
        if value > SUM_MAX:
            call.note("value", value)
            raise call.refuse(AdderStatus.TOO_LARGE)
        return Sum(value)

    def _keep(self, call: Call, request: Keep) -> Sum:
        if not request.take:
            raise call.refuse(AdderStatus.NO_CAPABILITY)
        self.kept = call.take_cap()
        return Sum(-1 if self.kept is None else int(self.kept))

    def next_time(self) -> Nanos | None:
        return min((due for due, _, _ in self.later), default=None)

    def on_time(self, now: Nanos) -> None:
        for entry in [entry for entry in self.later if entry[0] <= now]:
            self.later.remove(entry)
            entry[1].reply(Sum(entry[2]))

    def on_gone(self, link: LinkId) -> None:
        self.gone.append(link)
        self.later = [entry for entry in self.later if entry[1].link != link]

    def facts(self) -> dict[str, int]:
        return {"later": len(self.later)}

    def ready(self) -> bool:
        return self.is_ready
