"""The service of bench/stager.toml that stages an update as a client of updated does.

It reads the update from a device, moves it to updated in VMOs of 1 MiB, one ahead of the one that
is being written, has it verified, and says on the console how long that took.
"""

import time
from collections import deque
from typing import Final

import msgspec

from nexus.abi import BLOCK_SIZE, ConsoleWrite, Nanos
from nexus.drivers import BlockDevice, open_block
from nexus.ipc import Answer, Client, Started, deadline_after, offer_bulk
from nexus.protocols import updated
from nexus.protocols.updated import PIECE_SIZE_MAX, Begin, Begun, Chunk, Finish, Staged, Taken
from nexus.runtime import Call
from nexus.runtime.program import Context
from nexus.wire import Message, Protocol, ReplyStatus, Request

CALL_MAX: Final = Nanos(10_000_000_000)  # ns for one call; a flush of a loaded disk is within it
IN_FLIGHT: Final = 2  # pieces with updated: the one it writes, and the next
FINISH_MAX: Final = Nanos(300_000_000_000)  # ns for the whole verification
INDEX_BLOCKS: Final = 8  # 4 KiB at the beginning of the stick: the index as JSON, and zeros
BEGUN_LINE: Final = "bench.stager: begun"
STAGED_LINE: Final = "bench.stager: staged"


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is on the stick: block and size of an update's metadata, and of its set."""

    metadata: tuple[int, int]
    content: tuple[int, int]


class Sample(msgspec.Struct, frozen=True):
    """Times of one stage, s: until the last piece was taken, and until it was verified."""

    size: int
    received: float
    staged: float


class Nothing(Message):
    """It serves nothing."""


class Ask(Request[Nothing], op=1, idempotent=True):
    """It serves nothing."""


PROTOCOL: Final = Protocol("bench-stager", number=1003, version=1, requests=(Ask,))


class Stager:
    """Stages once, when it is ready; it answers nobody meanwhile."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._client: Client | None = None

    async def start(self) -> None:
        """Find updated."""
        self._client = await self._context.client("updated", updated.PROTOCOL)

    def handle(self, call: Call, _request: Ask) -> Nothing:
        """It serves nothing."""
        raise call.refuse(ReplyStatus.BUSY)

    def next_time(self) -> Nanos | None:
        """At once, and never again."""
        return None if self._client is None else self._context.boot.now

    async def on_time(self, _now: Nanos) -> None:
        """Stage what is on the stick."""
        client, self._client = self._client, None
        assert client is not None, "called when next_time said so"
        (slot,) = self._context.boot.hardware
        stick = await open_block(slot)
        text = await stick.read(0, INDEX_BLOCKS)
        index = msgspec.json.decode(text.rstrip(b"\0"), type=Index)
        await self._begin(client, await _bytes(stick, *index.metadata))
        await ConsoleWrite(BEGUN_LINE)
        started = time.perf_counter()
        await self._send(client, stick, *index.content)
        received = time.perf_counter()
        await self._finish(client)
        sample = Sample(
            size=index.content[1],
            received=received - started,
            staged=time.perf_counter() - started,
        )
        await ConsoleWrite(STAGED_LINE, msgspec.json.encode(sample))

    async def _begin(self, client: Client, metadata: bytes) -> None:
        cap = await offer_bulk(metadata)
        request = Begin(0, len(metadata))
        outcome = await client.ask(request, await self._until(CALL_MAX), move=cap)
        assert isinstance(outcome, Answer), outcome
        assert isinstance(outcome.reply, Begun), outcome
        assert outcome.reply.offset == 0, "a device that has staged nothing before"

    async def _send(self, client: Client, stick: BlockDevice, block: int, size: int) -> None:
        under_way: deque[Started[Taken]] = deque()
        for offset in range(0, size, PIECE_SIZE_MAX):
            length = min(PIECE_SIZE_MAX, size - offset)
            cap = await offer_bulk(await _bytes(stick, block + offset // BLOCK_SIZE, length))
            if len(under_way) == IN_FLIGHT:
                _ = await self._taken(client, under_way.popleft())
            request = Chunk(offset, 0, length)
            until = await self._until(CALL_MAX)
            under_way.append(await client.start(request, until, move=cap))
        ends = [await self._taken(client, each) for each in under_way]
        assert ends[-1] == size, "all of it was taken"

    async def _taken(self, client: Client, started: Started[Taken]) -> int:
        taken = await client.finish(started)
        assert isinstance(taken, Taken), taken
        return taken.offset

    async def _finish(self, client: Client) -> None:
        outcome = await client.call(Finish(), await self._until(FINISH_MAX))
        assert isinstance(outcome, Staged), outcome

    async def _until(self, span: Nanos) -> Nanos:
        return deadline_after(await self._context.now(), span)


async def _bytes(device: BlockDevice, block: int, size: int) -> bytes:
    data = await device.read(block, -(-size // BLOCK_SIZE))
    return data if len(data) == size else data[:size]
