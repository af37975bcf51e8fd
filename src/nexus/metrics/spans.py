"""Spans of a task: open ones are seen in the page's slots, ended ones come into its ring."""

from collections.abc import Callable
from contextvars import ContextVar
from enum import IntEnum
from types import TracebackType
from typing import Final, Protocol, Self

from nexus.abi import Clock
from nexus.ipc import Caller, Context, Parent, Spans
from nexus.ipc.context import COUNT_STEP, NO_TRACE, SPAN_MASK, TRACE_SIZE, first_trail, next_trail
from nexus.protocols.metricsd import SpanStatus
from nexus.telemetry import Called, PageWriter, SpanWriter
from nexus.telemetry.span import ATTRIBUTES_MAX

OK: Final = int(SpanStatus.OK)
ERROR: Final = int(SpanStatus.ERROR)


class Tracing(Protocol):
    """Where a span finds what it is part of, and says so to what is part of it: ipc.Caller."""

    trail: bytes

    @property
    def parent(self) -> Parent | None: ...

    @property
    def spans(self) -> Spans: ...


class Recorder:
    """Where the spans of a task go. Without a page they go nowhere; traces go on all the same."""

    __slots__ = ("caller", "now", "page", "root", "spans")

    now: Callable[[], int]
    """The clock; comes with the page."""

    def __init__(self, caller: Tracing) -> None:
        self.caller = caller
        self.root = caller.trail  # of calls that are made outside of any span
        self.page: PageWriter | None = None
        self.spans: SpanWriter | None = None

    def begin(self, page: PageWriter, clock: Clock) -> None:
        """From now on they go into this page."""
        self.page = page
        self.spans = page.spans
        self.now = clock.monotonic

    def open(self, around: bytes, start: int, called: Called) -> tuple[bytes, int]:
        """A span that began at `start` inside of `around`, a trail from elsewhere, and that ends
        whenever it does: the trail of what it sets off, and its unit of the page."""
        assert self.spans is not None, "there is a page"
        ids = self.caller.spans
        number = ids.next_number()
        if around.startswith(NO_TRACE):
            around = first_trail(ids.trace, number, number)
        return next_trail(around[:TRACE_SIZE], number), self.spans.open(
            around, number, start, called
        )

    def close(self, unit: int, status: int, refused: IntEnum | None = None) -> None:
        """The span in this unit of the page has ended now; there is none in unit -1."""
        if unit < 0:
            return
        assert self.spans is not None, "it gave the unit"
        if refused is None:
            self.spans.close(unit, self.now(), status)
        else:
            self.spans.close(unit, self.now(), status, {"refused": refused.name})


class Span:
    """A piece of work, from `with` on to its end; what it calls meanwhile belongs to it.

    Its parent is the span around it, or the request being served; otherwise it begins a trace. An
    exception that leaves it makes its status ERROR. Behind the `with` it is somebody else's:
    one that has ended goes back to where the next of its name is taken from.
    """

    __slots__ = ("_before", "_called", "_holder", "_home", "_more", "_recorder", "_unit", "trail")

    trail: bytes  # its trace and its own id, from `with` on

    def __init__(self, recorder: Recorder, called: Called, home: "list[Span]") -> None:
        self._recorder = recorder
        self._called = called
        self._home = home
        self._more: dict[str, str] | None = None

    def __enter__(self) -> Self:
        recorder = self._recorder
        caller = recorder.caller
        holder: Tracing | Parent = caller.parent or caller
        self._holder = holder
        self._before = before = holder.trail
        ids = caller.spans
        ids.last = number = ids.last + COUNT_STEP  # as Spans.next_number, without its call
        if number > SPAN_MASK:
            number = ids.begin_again()
        if before is recorder.root:
            around = trail = first_trail(ids.trace, number, number)
        else:
            around, trail = before, next_trail(before, number)
        self.trail = holder.trail = trail
        spans = recorder.spans
        if spans is None:
            self._unit = -1
        else:
            now = recorder.now  # recorder.now() would be sought as a method, which it is not
            self._unit = spans.open(around, number, now(), self._called)
        return self

    @property
    def context(self) -> Context:
        """Its trace and its own id, for calls that are told what they belong to."""
        return Context(self.trail[:TRACE_SIZE], self.trail[TRACE_SIZE:])

    def set(self, key: str, value: str | int) -> None:
        """A further attribute, told at the end; more than ATTRIBUTES_MAX are left out."""
        if self._more is None:
            self._more = {}
        if len(self._more) < ATTRIBUTES_MAX:
            self._more[key] = str(value)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._holder.trail = self._before
        unit = self._unit
        if unit >= 0:
            recorder = self._recorder
            now = recorder.now
            spans = recorder.spans
            status = OK if kind is None else ERROR
            if self._more is None:
                spans.close(unit, now(), status)  # type: ignore[union-attr] # it gave the unit
            else:
                spans.close(unit, now(), status, self._more)  # type: ignore[union-attr]
                self._more = None
        self._home.append(self)


class TaskTrail:
    """A caller's trail for a program whose work interleaves: each of its tasks has its own."""

    parent = None

    def __init__(self, caller: Caller) -> None:
        self.spans = caller.spans
        self._trail = ContextVar(f"nexus.trail.{id(self)}", default=caller.trail)

    @property
    def trail(self) -> bytes:
        """Trace and span of the task that asks."""
        return self._trail.get()

    @trail.setter
    def trail(self, trail: bytes) -> None:
        _ = self._trail.set(trail)
