"""What each client has asked for: counts, and its latest calls. Bounded; safe to lose."""

from collections import deque
from typing import Final, NamedTuple

from nexus.abi import ServiceId
from nexus.protocols.statefsd import Seen
from nexus.wire import HEADER_SIZE, unpack_header

CLIENTS_MAX: Final = 64  # the client heard longest ago gives way
CALLS_KEPT: Final = 32  # of each client; a page of GetCalls


class Heard(NamedTuple):
    """A call: its number in this instance's life, and the header it came with."""

    number: int
    header: bytes


class Client:
    """One client's account."""

    __slots__ = ("calls", "reads", "total", "writes")

    def __init__(self) -> None:
        self.total = 0
        self.reads = 0  # answered with a value, keys or the use of an area
        self.writes = 0  # changes that were made, a batch as one
        self.calls: deque[Heard] = deque(maxlen=CALLS_KEPT)


class Clients:
    """The accounts, the one heard longest ago first."""

    def __init__(self) -> None:
        self._clients: dict[ServiceId, Client] = {}
        self._total = 0

    def __len__(self) -> int:
        return len(self._clients)

    def heard(self, service: ServiceId, frame: bytes) -> Client:
        """The account of who has sent `frame`, which is noted."""
        client = self._clients.pop(service, None)
        if client is None:
            if len(self._clients) >= CLIENTS_MAX:
                del self._clients[next(iter(self._clients))]
            client = Client()
        self._clients[service] = client
        self._total += 1
        client.total += 1
        client.calls.append(Heard(self._total, frame[:HEADER_SIZE]))
        return client

    def find(self, service: ServiceId) -> Client:
        """The account of a client; an empty one if it was never heard, or gave way."""
        return self._clients.get(service) or Client()

    def latest(self, service: ServiceId, count: int) -> list[Seen]:
        """Its latest calls, oldest first."""
        calls = list(self.find(service).calls)[-count:]
        return [_seen(service, heard) for heard in calls]


def _seen(service: ServiceId, heard: Heard) -> Seen:
    header = unpack_header(heard.header)
    assert header is not None, "a frame has a header, or it was no request"
    return Seen(service, header.deadline, header.trace, header.span, header.op, heard.number)
