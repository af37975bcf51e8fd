"""Spans of a task: open ones are seen in the page's slots, ended ones come into its ring."""

from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Final, Protocol, Self

from nexus.abi import Clock
from nexus.ipc import Caller, Context, Parent, Spans
from nexus.ipc.context import NO_SPAN, TRACE_SIZE
from nexus.protocols.metricsd import SpanStatus
from nexus.telemetry import PageWriter, begin_span, end_span
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
    """Where the spans of a task go. Without a page they go nowhere, and traces go on all the same."""

    __slots__ = ("caller", "clock", "page", "root")

    def __init__(self, caller: Tracing) -> None:
        self.caller = caller
        self.root = caller.trail  # of calls that are made outside of any span
        self.page: PageWriter | None = None
        self.clock: Clock | None = None


class Span:
    """A piece of work, from `with` on to its end; what it calls meanwhile belongs to it.

    Its parent is the span around it, or the request being served; otherwise it begins a trace. An
    exception that leaves it makes its status ERROR. `context` is there inside.
    """

    __slots__ = (
        "_attributes",
        "_before",
        "_begun",
        "_more",
        "_name",
        "_parent",
        "_recorder",
        "_slot",
        "context",
    )

    context: Context

    def __init__(self, recorder: Recorder, name: bytes, attributes: Mapping[str, str]) -> None:
        self._recorder = recorder
        self._name = name
        self._attributes = attributes
        self._more: dict[str, str] | None = None

    def __enter__(self) -> Self:
        recorder = self._recorder
        caller = recorder.caller
        self._parent: Parent | None = caller.parent
        if self._parent is None:
            self._before: bytes | Context = caller.trail
            if caller.trail is recorder.root:
                trace, parent = caller.spans.next_trace(), NO_SPAN
            else:
                trace, parent = caller.trail[:TRACE_SIZE], caller.trail[TRACE_SIZE:]
            self.context = Context(trace, caller.spans.next_span())
            caller.trail = trace + self.context.span
        else:
            self._before = before = self._parent.context
            trace, parent = before
            self.context = Context(trace, caller.spans.next_span())
            self._parent.context = self.context
        page, clock = recorder.page, recorder.clock
        if page is not None and clock is not None:
            self._begun = begin_span(
                trace, self.context.span, parent, clock.monotonic(), self._name, self._attributes
            )
            self._slot = page.open_span(self._begun)
        else:
            self._begun = b""
        return self

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
        recorder = self._recorder
        if self._parent is None:
            assert isinstance(self._before, bytes)
            recorder.caller.trail = self._before
        else:
            assert isinstance(self._before, Context)
            self._parent.context = self._before
        page, clock = recorder.page, recorder.clock
        if self._begun and page is not None and clock is not None:
            status = OK if kind is None else ERROR
            now = clock.monotonic()
            if self._more is None:
                ended = end_span(self._begun, now, status)
            else:
                ended = end_span(self._begun, now, status, self._more)
            page.close_span(self._slot, ended)


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
