"""The queue of bodies for a collector, and the one connection over which they go to it.

A machine without I/O: events in, effects out; the service gives them to the port that dials.

    idle --a body, and its time--> dialling --it stands--> sending --the answer--> sending, idle
    dialling, sending --end, or too late--> resting --the retry's time--> dialling
    an answer 2xx: sent; 429, 502, 503, 504: again, later; any other: the body is dropped
    a retry given up: the longest pause, and a new one; too old, or a full queue: the oldest body
    is dropped

Everything dropped is counted. A collector that is away for longer than the queue lasts costs the
oldest bodies and nothing else.

*Source*: opentelemetry-proto, docs/specification.md ("OTLP/HTTP Response", "Retryable response").
"""

from collections import deque
from enum import Enum
from typing import Final, NamedTuple

import h11

from nexus.abi import MESSAGE_SIZE_MAX, LinkId, Nanos
from nexus.ipc import Retry, RetryBudget, RetryTokens, deadline_after
from nexus.protocols.exportd import CollectorState
from nexus.services.exportd.otlp import Body

DIAL_TIME_MAX: Final = Nanos(3_000_000_000)  # ns until a connection stands
ANSWER_TIME_MAX: Final = Nanos(5_000_000_000)  # ns from the first byte of a body to its answer
RETRY_FIRST: Final = Nanos(500_000_000)  # ns; doubles with each attempt
ATTEMPTS_MAX: Final = 8  # of one retry
BODY_LIFE: Final = Nanos(600_000_000_000)  # ns a body is tried for; older news are no news
RETRY_AFTER_MAX: Final = 60  # s; a collector that asks for more is asked earlier
ANSWER_SIZE_MAX: Final = 16 * 1024  # bytes of an answer, which says next to nothing
FAILURE_SIZE_MAX: Final = 96  # characters of the account's last failure
AGAIN: Final = frozenset((429, 502, 503, 504))
GOOD: Final = range(200, 300)
CONTENT_TYPE: Final = "application/json"


class Dial(NamedTuple):
    """Begin a connection."""


class Transmit(NamedTuple):
    """There is something to send: `part` says what, `on_part_sent` that it was taken."""


class HangUp(NamedTuple):
    """End the connection."""

    link: LinkId


Effect = Dial | Transmit | HangUp


class State(Enum):
    """Where the connection is."""

    IDLE = "idle"
    DIALLING = "dialling"
    SENDING = "sending"
    RESTING = "resting"


class Collector:
    """Bodies on their way to one collector."""

    def __init__(self, host: str, *, count_max: int, size_max: int, pause_max: Nanos) -> None:
        self._host = host
        self._pause_max = pause_max
        self._count_max = count_max
        self._size_max = size_max  # bytes
        self._queue: deque[tuple[Body, Nanos]] = deque()  # and when each was made
        self._retry: Retry | None = None  # since the last body that was sent
        self._state = State.IDLE
        self._due: Nanos | None = None  # when resting is over, or the peer is too late
        self._http: h11.Connection | None = None
        self._outgoing = bytearray()
        self._status = 0
        self._answered = 0  # bytes of the answer
        self._after = 0  # s that the answer asks us to wait
        self._asked = False  # the oldest body is on its way
        self.link: LinkId | None = None
        self.there = CollectorState.AWAY
        self.size = 0  # bytes queued
        self.sent = 0
        self.dropped = 0
        self.failed = 0
        self.last_failure = ""

    @property
    def count(self) -> int:
        """Bodies queued."""
        return len(self._queue)

    # ------------------------------------------------------------------ what comes in

    def on_body(self, body: Body, now: Nanos) -> list[Effect]:
        """A body is to be sent."""
        size = len(body.data)
        if size > self._size_max:
            self.dropped += 1
            return []
        while len(self._queue) >= self._count_max or self.size + size > self._size_max:
            if not self._drop_oldest_waiting():
                self.dropped += 1
                return []
        self._queue.append((body, now))
        self.size += size
        return self.on_time(now) if self._state is State.IDLE else []

    def next_time(self) -> Nanos | None:
        """When `on_time` has something to do."""
        return self._due

    def on_time(self, now: Nanos) -> list[Effect]:
        """The time has come, or it is a good moment."""
        if self._state in (State.DIALLING, State.SENDING):
            if self._due is None or now < self._due:
                return []
            what = "no connection" if self._state is State.DIALLING else "no answer"
            return self._fail(f"{what} in time", now)
        if self._state is State.RESTING and (self._due is None or now < self._due):
            return []
        if not self._queue:
            self._state, self._due = State.IDLE, None
            return []
        if self.link is not None:
            return self._send_oldest(now)
        self._state = State.DIALLING
        self._due = deadline_after(now, DIAL_TIME_MAX)
        return [Dial()]

    def on_dialled(self, link: LinkId) -> None:
        """The connection that was asked for has this number; it does not stand yet."""
        self.link = link

    def on_no_dial(self, why: str, now: Nanos) -> list[Effect]:
        """No connection could be begun."""
        return self._fail(why, now)

    def on_room(self, now: Nanos) -> list[Effect]:
        """The connection stands, or has room again."""
        if self._state is State.DIALLING:
            self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=ANSWER_SIZE_MAX)
            return self._send_oldest(now)
        return [Transmit()] if self._outgoing else []

    def on_data(self, data: bytes, now: Nanos) -> list[Effect]:
        """Bytes of an answer."""
        http = self._http
        if http is None or not self._asked:
            return self._fail("an answer that nobody asked for", now)
        try:
            http.receive_data(data)
            return self._take(http, now)
        except h11.RemoteProtocolError as error:
            return self._fail(f"no HTTP: {error}", now)

    def on_gone(self, now: Nanos) -> list[Effect]:
        """The connection has ended. Between two bodies that is nobody's failure."""
        self.link = None
        idle = self._state is State.IDLE and not self._asked
        self._hung_up()
        if idle:
            return self.on_time(now)
        if self._state is State.RESTING:
            return []
        return self._fail("no connection" if self._state is State.DIALLING else "cut off", now)

    # ------------------------------------------------------------------ what goes out

    def part(self) -> bytes:
        """What to send next, b"" if nothing."""
        return bytes(self._outgoing[:MESSAGE_SIZE_MAX])

    def on_part_sent(self, size: int) -> None:
        """So many bytes were taken."""
        del self._outgoing[:size]

    def _send_oldest(self, now: Nanos) -> list[Effect]:
        http = self._http
        assert http is not None, "it stands"
        body, _ = self._queue[0]
        headers = [
            ("Host", self._host),
            ("Content-Type", CONTENT_TYPE),
            ("Content-Length", str(len(body.data))),
            ("User-Agent", "nexus-exportd"),
        ]
        request = h11.Request(method="POST", target=body.path, headers=headers)
        for event in (request, h11.Data(data=body.data), h11.EndOfMessage()):
            self._outgoing += http.send(event) or b""
        self._state = State.SENDING
        self._due = deadline_after(now, ANSWER_TIME_MAX)
        self._asked = True
        self._status = self._answered = self._after = 0
        return [Transmit()]

    # ------------------------------------------------------------------ answers

    def _take(self, http: h11.Connection, now: Nanos) -> list[Effect]:
        while True:  # each round takes an event out of h11, which holds few
            event = http.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return []
            if isinstance(event, h11.Response):
                self._status = event.status_code
                self._after = _seconds(dict(event.headers).get(b"retry-after", b""))
            elif isinstance(event, h11.Data):
                self._answered += len(event.data)
                if self._answered > ANSWER_SIZE_MAX:
                    return self._fail("an answer without end", now)
            elif isinstance(event, h11.EndOfMessage):
                return self._judge(http, now)
            elif isinstance(event, h11.ConnectionClosed):
                return self._fail("cut off", now)

    def _judge(self, http: h11.Connection, now: Nanos) -> list[Effect]:
        """The answer is complete."""
        self._asked = False
        if self._status in AGAIN:
            return self._fail(f"status {self._status}", now, after=self._after)
        if self._status in GOOD:
            self.there = CollectorState.THERE
            self._retry = None
            self.sent += 1
        else:
            self._note(f"status {self._status}, for good")
            self.dropped += 1
        self._forget_oldest()
        self._state, self._due = State.IDLE, None
        effects: list[Effect] = []
        done = (http.our_state, http.their_state) == (h11.DONE, h11.DONE)
        if self._outgoing or not done or http.trailing_data[0]:
            effects += self._hang_up()
        else:
            http.start_next_cycle()
        return effects + self.on_time(now)

    def _fail(self, why: str, now: Nanos, after: int = 0) -> list[Effect]:
        """An attempt has failed: rest, then again; or give the oldest body up."""
        self._note(why)
        self.there = CollectorState.AWAY
        effects = self._hang_up()
        while self._queue and now >= self._queue[0][1] + BODY_LIFE:
            self.dropped += 1
            self._forget_oldest()
        if not self._queue:
            self._state, self._due = State.IDLE, None
            return effects
        pause = self._pause(now)
        asked = Nanos(min(after, RETRY_AFTER_MAX) * 1_000_000_000)
        self._state = State.RESTING
        self._due = deadline_after(now, max(pause, asked))
        return effects

    def _pause(self, now: Nanos) -> Nanos:
        """How long to rest after a failure."""
        if self._retry is None:
            until = deadline_after(now, BODY_LIFE)
            budget = RetryBudget(attempts_max=ATTEMPTS_MAX, backoff=RETRY_FIRST, deadline=until)
            self._retry = Retry(budget, RetryTokens())
        again = self._retry.on_failed(now)
        if again is None:
            self._retry = None
            return self._pause_max
        return Nanos(min(again - now, self._pause_max))

    def _note(self, why: str) -> None:
        self.failed += 1
        self.last_failure = why[:FAILURE_SIZE_MAX]

    def _hang_up(self) -> list[Effect]:
        link, self.link = self.link, None
        self._hung_up()
        return [] if link is None else [HangUp(link)]

    def _hung_up(self) -> None:
        self._http = None
        self._outgoing = bytearray()
        self._asked = False

    def _forget_oldest(self) -> None:
        body, _ = self._queue.popleft()
        self.size -= len(body.data)

    def _drop_oldest_waiting(self) -> bool:
        """Make room: the oldest body goes, but not from under a connection that is sending it.
        False if there is no other."""
        if not self._asked:
            self._forget_oldest()
        elif len(self._queue) > 1:
            body, _ = self._queue[1]
            del self._queue[1]
            self.size -= len(body.data)
        else:
            return False
        self.dropped += 1
        return True


def _seconds(text: bytes) -> int:
    """Retry-After as a number of seconds; a date is not looked at (there may be no clock)."""
    return int(text) if text.isdigit() and len(text) <= 6 else 0
