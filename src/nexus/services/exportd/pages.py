"""The HTTP that is spoken on a stream port: one page, GET /metrics, to whoever asks.

One `Visit` per connection, without I/O: bytes in, bytes out, and what is asked for. h11 knows the
grammar; the bounds are here.

    idle --first byte--> asking --request complete--> asked --answer given--> answering
    answering --all sent, kept alive--> idle
    anything but a request, too much of it, or too late --> an error, once, and the end

*Source*: RFC 9110, RFC 9112.
"""

from typing import Final

import h11

from nexus.abi import MESSAGE_SIZE_MAX, LinkId, Nanos, Slot
from nexus.ipc import deadline_after

REQUEST_SIZE_MAX: Final = 8192  # bytes of request line and fields; a scraper sends a few hundred
CONTENT_SIZE_MAX: Final = 1024  # bytes; a request for the page has none
ASK_TIME_MAX: Final = Nanos(5_000_000_000)  # ns from the first byte of a request to its last
IDLE_TIME_MAX: Final = Nanos(75_000_000_000)  # ns between two; Prometheus asks once in 60 s or less
READ_TIME_MAX: Final = Nanos(10_000_000_000)  # ns for reading an answer, however slowly
PAGE_PATH: Final = b"/metrics"
METHODS: Final = (b"GET", b"HEAD")
PLAIN: Final = "text/plain; charset=utf-8"
REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class Asked:
    """The page is asked for."""

    def __init__(self, accept: str | None) -> None:
        self.accept = accept


class Visit:
    """One connection: how far its request is, and what it has not read of the answer."""

    def __init__(self, port: Slot, link: LinkId, now: Nanos) -> None:
        self.port = port
        self.link = link
        self.waits = False  # its port has no room for more of the answer
        self.waits_for_answer = False
        self.due = deadline_after(now, ASK_TIME_MAX)
        self.heard = now  # when something came from it last
        self.refused = 0  # requests answered with an error
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_SIZE_MAX)
        self._request: h11.Request | None = None
        self._content = 0
        self._outgoing = bytearray()
        self._sent = 0
        self._ends = False  # when everything is sent

    @property
    def pending(self) -> int:
        """Bytes of answers that are not sent."""
        return len(self._outgoing) - self._sent

    @property
    def is_answered(self) -> bool:
        """Whether there is nothing that it asked for and has not been sent."""
        return not self.pending and not self.waits_for_answer

    @property
    def answered(self) -> bool:
        """Whether an answer has been given since the last `go_on`."""
        return self._http.our_state is h11.DONE

    @property
    def over(self) -> bool:
        """Whether there is nothing more to be said."""
        return self._ends and not self.pending

    def take(self, data: bytes, now: Nanos) -> Asked | None:
        """Bytes have come: what is asked for, if a request is complete."""
        self.heard = now
        if self._ends:
            return None  # whatever follows an error
        if self._http.their_state is h11.IDLE and not self._http.trailing_data[0]:
            self.due = deadline_after(now, ASK_TIME_MAX)
        try:
            self._http.receive_data(data)
        except h11.RemoteProtocolError:
            return None
        if self.pending or self.waits_for_answer:
            self._ends |= len(self._http.trailing_data[0]) > REQUEST_SIZE_MAX
            return None
        return self._next(now)

    def answer(
        self,
        status: int,
        content: bytes,
        now: Nanos,
        *,
        kind: str = PLAIN,
        fields: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Answer the request at hand."""
        head = self._request is not None and self._request.method == b"HEAD"
        sized = ("Content-Length", str(len(content)))
        headers = [("Content-Type", kind), sized, *fields]
        if self._ends:
            headers.append(("Connection", "close"))
        response = h11.Response(
            status_code=status, headers=headers, reason=REASONS.get(status, "").encode()
        )
        self._write(self._http.send(response))
        if not head:
            self._write(self._http.send(h11.Data(data=content)))
        self._write(self._http.send(h11.EndOfMessage()))
        self.refused += status >= 400
        self.due = deadline_after(now, READ_TIME_MAX)
        self.waits_for_answer = False
        self._request = None
        if (self._http.our_state, self._http.their_state) != (h11.DONE, h11.DONE):
            self._ends = True

    def part(self) -> bytes:
        """What to send next, b"" if nothing."""
        return bytes(self._outgoing[self._sent : self._sent + MESSAGE_SIZE_MAX])

    def on_sent(self, size: int) -> None:
        """So many bytes were taken."""
        self._sent += size

    def go_on(self, now: Nanos) -> Asked | None:
        """Everything is sent: what is asked for next, if that is there already."""
        assert not self.pending, "one answer at a time"
        self._outgoing = bytearray()
        self._sent = 0
        if self._ends:
            return None
        self.due = deadline_after(now, IDLE_TIME_MAX)
        self._http.start_next_cycle()
        self._content = 0
        return self._next(now)

    def is_late(self, now: Nanos) -> bool:
        """Whether its time is over; one that was asking is told so."""
        if now < self.due:
            return False
        if self._request is None and self._has_begun() and not self._ends:
            self._fail(408, now)
        return True

    def _has_begun(self) -> bool:
        return self._http.their_state is h11.SEND_BODY or bool(self._http.trailing_data[0])

    def _next(self, now: Nanos) -> Asked | None:
        """Go on with what has come. Each round takes an event out of h11, which holds few."""
        while not self._ends:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                self._fail(error.error_status_hint, now)
                return None
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return None
            if isinstance(event, h11.Request):
                self._request = event
            elif isinstance(event, h11.Data):
                self._content += len(event.data)
                if self._content > CONTENT_SIZE_MAX:
                    self._fail(413, now)
            elif isinstance(event, h11.EndOfMessage):
                return self._judge(now)
            else:  # the peer's own end
                self._ends = True
        return None

    def _judge(self, now: Nanos) -> Asked | None:
        request = self._request
        assert request is not None, "the end of a request comes after its beginning"
        path = request.target.partition(b"?")[0]
        if path != PAGE_PATH:
            self.answer(404, b"the page is /metrics\n", now)
            return None
        if request.method not in METHODS:
            self.answer(405, b"GET or HEAD\n", now, fields=(("Allow", "GET, HEAD"),))
            return None
        accepts = [value for name, value in request.headers if name == b"accept"]
        text = b",".join(accepts).decode("ascii", "replace")
        self.waits_for_answer = True
        return Asked(text if accepts else None)

    def _fail(self, status: int, now: Nanos) -> None:
        """Answer what is no request, if that can be, and end."""
        self._ends = True
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.answer(status, f"{REASONS.get(status, 'error')}\n".encode(), now)

    def _write(self, data: bytes | None) -> None:
        self._outgoing += data or b""
