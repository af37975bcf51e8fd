"""The rings logd drains: a bounded part of one, then the next, and what becomes of each record.

    open --its link is gone--> ending --drained to its end--> last words are kept, the memory is not
    quiet --doorbell--> pending --drained--> looked at again in LOOK_PAUSE --nothing there--> quiet

Every sequence number of a ring ends in one account of its sender: accepted, refused for a reason,
damaged, or unread because the ring was overwritten first. What exceeds a sender's rate waits in its
own ring, so that nobody's records are younger than those that were lost for them. A task's end and
a question for its last words know no rate: the ring bounds them.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nexus.abi import LinkId, Nanos, Sender
from nexus.log.payload import NO_PAYLOAD, unpack
from nexus.protocols.logd import (
    PAGE_MAX,
    STREAMS_MAX,
    STREAMS_OF_ONE_MAX,
    Drained,
    LogdStatus,
    Record,
)
from nexus.services.logd.checks import SURE_SIZE, Looker
from nexus.services.logd.journal import PAYLOAD_SIZE_MAX, Journal
from nexus.services.logd.senders import Row
from nexus.telemetry.ring import RECORD_SIZE, RingReader

DRAIN_COUNT: Final = 64  # records of one ring in one turn; 0.1 ms
LOOK_PAUSE: Final = Nanos(20_000_000)  # ns after a drain that found something; twice a writer's own
TURNS_MAX: Final = 16384  # of one ring to its end: as many as it can hold records, and jumps
LAST_WORDS_MAX: Final = 64  # instances that have ended and whose last records are kept
SenderKey = tuple[int, int, int]  # service, pid, generation


def _nobody(_status: LogdStatus, _stream: "Stream") -> None:
    """Hears of no refusal."""


def _nothing(_stream: "Stream", _payloads: list[bytes], _now: Nanos) -> None:
    """Hears of no record."""


@dataclass(eq=False)
class Stream:
    """One ring, its sender and what became of its records."""

    link: LinkId
    sender: Sender
    view: memoryview
    reader: RingReader
    row: Row
    looker: Looker
    accepted: int = 0
    refused: int = 0
    unread: int = 0  # of the reader's account, what the row knows of
    damaged: int = 0
    not_before: int = 0  # ns; its sender's rate is used up until then

    @property
    def key(self) -> SenderKey:
        """The instance it is of."""
        return (self.sender.service, self.sender.pid, self.sender.generation)

    def drained(self) -> Drained:
        """Its account, as it travels."""
        reader = self.reader
        return Drained(
            taken=reader.taken,
            sequence=reader.sequence,
            accepted=self.accepted,
            refused=self.refused + self.damaged,
            overwritten=self.unread,
        )


class Streams:
    """All streams: at most STREAMS_MAX, and STREAMS_OF_ONE_MAX of one service."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._streams: OrderedDict[LinkId, Stream] = OrderedDict()  # next to be drained first
        self._core: set[LinkId] = set()
        self._last_words: OrderedDict[SenderKey, list[Record]] = OrderedDict()
        self._look_at: Nanos | None = None
        self._pending: set[LinkId] = set()  # with something left by the last turn, or rung for
        self.on_refused: Callable[[LogdStatus, Stream], None] = _nobody
        self.on_taken: Callable[[Stream, list[bytes], Nanos], None] = _nothing

    def __len__(self) -> int:
        return len(self._streams)

    def has_room(self, sender: Sender, link: LinkId) -> bool:
        """Whether a stream of this sender may be opened; over its own link one always replaces."""
        if link in self._streams:
            return True
        of_one = sum(each.sender.service == sender.service for each in self._streams.values())
        return len(self._streams) < STREAMS_MAX and of_one < STREAMS_OF_ONE_MAX

    def open(
        self,
        link: LinkId,
        sender: Sender,
        view: memoryview,
        reader: RingReader,
        row: Row,
        *,
        is_core: bool,
    ) -> Stream:
        """Drain this ring from now on. The caller has let go of an earlier one of this link."""
        assert link not in self._streams, "an earlier one was ended"
        stream = Stream(link, sender, view, reader, row, Looker(is_core=is_core))
        self._streams[link] = stream
        if is_core:
            self._core.add(link)
        row.on_opened()
        self._pending.add(link)
        return stream

    def of(self, link: LinkId) -> Stream | None:
        """The stream of a link."""
        return self._streams.get(link)

    # ------------------------------------------------------------------ draining

    @property
    def busy(self) -> bool:
        """Whether a ring is to be drained now, as far as is known."""
        return bool(self._pending)

    @property
    def look_at(self) -> Nanos | None:
        """When all rings are to be looked at, for what came without a doorbell."""
        return self._look_at

    def on_time(self, now: Nanos) -> None:
        """It may be time to look at all rings."""
        if self._look_at is None or now < self._look_at:
            return
        self._look_at = None
        for stream in self._streams.values():
            if stream.reader.pending:
                self._note(stream, now)

    def on_bell(self, stream: Stream, now: Nanos, wall: int) -> Drained:
        """A doorbell: a turn for this ring, and its account."""
        self._turn(stream, now, wall)
        return stream.drained()

    def step(self, now: Nanos, wall: int) -> None:
        """A turn for one ring: core senders' first, then who waits longest."""
        link = next(
            (each for each in self._core if each in self._pending),
            next((each for each in self._streams if each in self._pending), None),
        )
        if link is None:
            self._pending.clear()
            return
        stream = self._streams[link]
        self._streams.move_to_end(link)
        self._turn(stream, now, wall)

    def _note(self, stream: Stream, now: Nanos) -> None:
        """There is something in this ring: now, or when its sender's next window begins."""
        if stream.not_before <= now:
            self._pending.add(stream.link)
        else:
            self._look_by(Nanos(stream.not_before))

    def _look_by(self, when: Nanos) -> None:
        self._look_at = when if self._look_at is None else min(self._look_at, when)

    def _turn(self, stream: Stream, now: Nanos, wall: int) -> None:
        self._pending.discard(stream.link)
        room = stream.row.stream_room(now)
        if not room:
            stream.not_before = stream.row.stream_window_end
            self._look_by(Nanos(stream.not_before))
            return
        before = stream.reader.taken
        self._drain(stream, min(room, DRAIN_COUNT), now, wall)
        if stream.reader.taken != before:
            self._look_by(Nanos(now + LOOK_PAUSE))
            if stream.reader.pending:
                self._note(stream, now)
        elif stream.reader.pending:  # not all visible yet
            self._look_by(Nanos(now + LOOK_PAUSE))

    def drain_to_end(self, stream: Stream, now: Nanos, wall: int) -> None:
        """Everything that is in this ring now, whatever the sender's rate; and no more than it
        holds: its writer may live and go on writing."""
        most = stream.reader.accepted + len(stream.view) // RECORD_SIZE
        for _ in range(TURNS_MAX):
            room = most - stream.reader.accepted
            if not stream.reader.pending or room <= 0:
                return
            self._drain(stream, min(room, DRAIN_COUNT), now, wall)

    def _drain(self, stream: Stream, count: int, now: Nanos, wall: int) -> None:
        payloads = stream.reader.drain(count)
        row = stream.row = stream.row.current
        if payloads:
            good = self._good(stream, payloads)
            row.stream_count += len(payloads)
            if good:
                row.accepted += len(good)
                stream.accepted += len(good)
                _ = self._journal.append(stream.sender, good, row, now, wall)
                self.on_taken(stream, good, now)
        self._account(stream, row)

    def _good(self, stream: Stream, payloads: list[bytes]) -> list[bytes]:
        """Those that are records; the others are refused and counted."""
        if max(map(len, payloads)) <= SURE_SIZE and stream.looker.knows(payloads):
            return payloads
        return [data for data in payloads if self._takes(stream, data)]

    def _takes(self, stream: Stream, data: bytes) -> bool:
        try:
            payload = unpack(data)
        except NO_PAYLOAD:
            stream.refused += 1
            stream.row.current.damaged += 1
            return False
        refusal = stream.looker.refusal_of(payload)
        if refusal is None and len(data) > PAYLOAD_SIZE_MAX:
            refusal = LogdStatus.OVER_LIMIT
        if refusal is None:
            stream.looker.learn(data, payload)
            return True
        stream.refused += 1
        stream.row.current.on_refused(refusal)
        self.on_refused(refusal, stream)
        return False

    def _account(self, stream: Stream, row: Row) -> None:
        """What the reader has found missing since it was asked last."""
        reader = stream.reader
        row.on_missing(reader.overwritten - stream.unread, reader.damaged - stream.damaged)
        stream.unread, stream.damaged = reader.overwritten, reader.damaged

    def drain_all(self, now: Nanos, wall: int) -> None:
        """Everything that is in the rings now: logd is about to end."""
        for stream in self._streams.values():
            self.drain_to_end(stream, now, wall)

    # ------------------------------------------------------------------ the end

    def end(self, link: LinkId, now: Nanos, wall: int) -> None:
        """The holder of a link is gone: what it had written is read, and its memory given back."""
        stream = self._streams.get(link)
        if stream is None:
            return
        self.drain_to_end(stream, now, wall)
        stream.reader.settle()
        self._account(stream, stream.row.current)
        stream.row.current.streams = max(0, stream.row.current.streams - 1)
        self._keep_last_words(stream)
        del self._streams[link]
        self._core.discard(link)
        self._pending.discard(link)
        stream.view.release()

    def last_records(self, key: SenderKey, count: int, now: Nanos, wall: int) -> list[Record]:
        """The last records of an instance; its ring, if it is there, is drained first."""
        for stream in self._streams.values():
            if stream.key == key:
                self.drain_to_end(stream, now, wall)
        found = self._journal.last_of(*key, count)
        kept = self._last_words.get(key, [])
        # The journal may have pushed them out since; it has all of them or the latest of them.
        return (kept if len(kept) > len(found) else found)[-count:]

    def _keep_last_words(self, stream: Stream) -> None:
        words = self._journal.last_of(*stream.key, PAGE_MAX)
        if not words:
            return
        self._last_words[stream.key] = words
        self._last_words.move_to_end(stream.key)
        if len(self._last_words) > LAST_WORDS_MAX:
            _ = self._last_words.popitem(last=False)
