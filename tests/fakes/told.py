"""What a real run told about a rung, to be changed in one place and judged again."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from nexus.abi import Event, EventKind
from nexus.proof.every_check import EVERY_CHECK
from nexus.proof.expected import boots_of, scope_of
from nexus.proof.prove import Outcome
from nexus.proof.remains import Remains
from nexus.proof.trace import Line, Trace
from nexus.proof.verdict import Case
from nexus.protocols.ladder import Ground, rung

Change = Callable[[dict[str, Any]], object]
ChangeLeft = Callable[[Remains], Remains]


class Told:
    """A rung as the run told it: its case, boot and line, each of which can be changed."""

    def __init__(self, outcome: Outcome, number: int) -> None:
        scope = scope_of(outcome.plan, Ground.SIM, outcome.smp)
        self.number = number
        self.traces = list(outcome.traces)
        written = (outcome.record,)
        self.case = Case(scope=scope, plan=outcome.plan, checks=EVERY_CHECK, written=written)
        self.boot = boots_of(scope)[number]

    def say(self, change: Change, text: str = "", boot: int | None = None) -> None:
        """Change the evidence of a line, of the rung's own if it is not said which."""
        text = text or rung(self.number).marker
        at = self.boot if boot is None else boot
        trace = self.traces[at]
        events = tuple(_changed(event, text, change) for event in trace.events)
        assert events != tuple(trace.events), "the change changes something"
        self.put(at, dataclasses.replace(trace, events=events))

    def leave(self, change: ChangeLeft, boot: int) -> None:
        """Change what the runner found on the disk after a boot."""
        trace = self.traces[boot]
        self.put(boot, dataclasses.replace(trace, left=change(trace.left)))

    def without(self, wanted: Callable[[Event], bool]) -> None:
        """Take events away from the rung's own boot."""
        trace = self.traces[self.boot]
        events = tuple(event for event in trace.events if not wanted(event))
        assert len(events) < len(trace.events), "something is taken away"
        self.put(self.boot, dataclasses.replace(trace, events=events))

    def put(self, at: int, trace: Trace) -> None:
        """Another boot in the place of one; the later ones know it."""
        self.traces[at] = trace
        for later in range(at + 1, len(self.traces)):
            earlier = tuple(self.traces[:later])
            self.traces[later] = dataclasses.replace(self.traces[later], earlier=earlier)

    def check(self) -> None:
        """Compare, as the verdict does: of a prefix every line."""
        row, trace = rung(self.number), self.traces[self.boot]
        texts = [line.text for line in trace.lines if row.matches(line.text)]
        assert texts, "the rung was met"
        for text in texts if row.prefix else texts[:1]:
            self.check_line(text)

    def check_line(self, text: str) -> None:
        """Compare what is said in this line of the rung."""
        case = dataclasses.replace(self.case, boots=tuple(self.traces))
        trace = self.traces[self.boot]
        line = next(line for line in trace.lines if line.text == text)
        EVERY_CHECK[self.number](case, trace, line)

    def line(self) -> Line:
        """The rung's own line, in its own boot; the first that fits a prefix."""
        row = rung(self.number)
        return next(line for line in self.traces[self.boot].lines if row.matches(line.text))


def _changed(event: Event, text: str, change: Change) -> Event:
    if event.kind is not EventKind.CONSOLE or event.fields.get("line") != text:
        return event
    fields = copy.deepcopy(dict(event.fields))
    evidence = fields["evidence"]
    assert isinstance(evidence, dict)
    _ = change(evidence)
    return event._replace(fields=fields)
