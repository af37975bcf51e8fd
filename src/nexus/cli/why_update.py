"""`nexus why`: what became of the last update, the evidence, and what was done about it.

The boot device says why a set was left, in words that were written before each risky step and by
the slot that was good; updated's history says what it refused. Whatever of these cannot be asked is
said.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nexus.bootctl.record import EVIDENCE, Cause
from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient, ServiceRefused
from nexus.cli.errors import CommandFailed
from nexus.cli.ota import CAUSES, STATES, ask, document, letter, refusal, titled
from nexus.cli.output import say, say_json, shown
from nexus.cli.telling import INDENT, clock, labelled
from nexus.protocols.updated import (
    SERVICE_NAME,
    Event,
    EventKind,
    GetHistory,
    GetReasons,
    GetUpdate,
    ReasonRow,
    Slot,
    Update,
)

HISTORY_PAGES_MAX: Final = 8  # pages of events: all that are kept
REASONS_MAX: Final = 16  # reasons of a device; it keeps fewer
LEFT: Final = frozenset({Cause.ROLLED_BACK, Cause.GIVEN_UP, Cause.DAMAGED})
"""Causes that end a trial without success."""


@dataclass(frozen=True, slots=True)
class UpdateStory:
    """What is known of updates, latest first."""

    title: str
    update: Update
    reasons: tuple[ReasonRow, ...] = ()
    events: tuple[Event, ...] = ()
    unknown: tuple[str, ...] = ()  # what could not be asked, and why

    @property
    def end(self) -> ReasonRow | None:
        """How the last trial ended, if one was ever asked for; as far as it has."""
        ends = (each for each in self.reasons if each.cause in LEFT or each.cause in ENDS)
        return next(ends, None)

    @property
    def refused(self) -> Event | None:
        """The refusal of an update, if nothing about updates has come after it."""
        first = next((each for each in self.events if each.kind in TELLING), None)
        return first if first is not None and first.kind is EventKind.REFUSED else None

    @property
    def restored(self) -> Event | None:
        """What became of the data since a set was last to be tried, if they had to go back."""
        kinds = (EventKind.RESTORED, EventKind.SWITCHED)
        first = next((each for each in self.events if each.kind in kinds), None)
        return first if first is not None and first.kind is EventKind.RESTORED else None

    def evidence(self, end: ReasonRow) -> tuple[ReasonRow, ...]:
        """How the boots of that trial ended, the last one first."""
        return tuple(each for each in self.reasons if each.cause in EVIDENCE and is_of(each, end))

    def asked_for(self, end: ReasonRow) -> ReasonRow | None:
        """Who had the set tried, and when."""
        return next(
            (each for each in self.reasons if each.cause == Cause.SWITCHED and is_of(each, end)),
            None,
        )


ENDS: Final = frozenset({Cause.COMMITTED, Cause.PROVISIONED, Cause.SWITCHED})
TELLING: Final = frozenset(
    {
        EventKind.STAGED,
        EventKind.REFUSED,
        EventKind.SWITCHED,
        EventKind.COMMITTED,
        EventKind.ROLLED_BACK,
        EventKind.FAILED,
    }
)
"""Events of which the last one is what an operator asks about."""


def is_of(reason: ReasonRow, end: ReasonRow) -> bool:
    """Whether a reason is about the same set in the same slot."""
    return (reason.slot, reason.version) == (end.slot, end.version)


def why(asked: Asked, *, as_json: bool) -> None:
    """Print the story. Raises CommandFailed."""
    with asked.client() as client:
        story = story_of(client, asked.running.title)
    if as_json:
        say_json(story_document(story))
        return
    for line in lines(story):
        say(line)


def story_of(client: OperatorClient, title: str) -> UpdateStory:
    """Everything updated can be asked. Raises CommandFailed when it says nothing at all."""
    update = ask(client, GetUpdate())
    reasons: list[ReasonRow] = []
    events: list[Event] = []
    unknown: list[str] = []
    try:
        reasons = reasons_of(client)
    except (ServiceRefused, CommandFailed) as error:
        unknown.append(f"reasons: {error}")
    try:
        for _ in range(HISTORY_PAGES_MAX):
            found = ask(client, GetHistory(events[-1].number if events else 0))
            events += found.events
            if not found.more or not found.events:
                break
    except (ServiceRefused, CommandFailed) as error:
        unknown.append(f"history: {error}")
    return UpdateStory(title, update, tuple(reasons), tuple(events), tuple(unknown))


def reasons_of(client: OperatorClient) -> list[ReasonRow]:
    """All that the boot device keeps, latest first. Raises CommandFailed."""
    reasons: list[ReasonRow] = []
    while len(reasons) < REASONS_MAX:
        page = ask(client, GetReasons(len(reasons)))
        reasons += page.reasons
        if not page.reasons or len(reasons) >= page.total:
            break
    return reasons


# ---------------------------------------------------------------- for people


def lines(story: UpdateStory) -> Iterator[str]:
    """The story, line by line."""
    yield _head(story)
    if story.refused is not None:
        yield ""
        yield from _refused_lines(story.refused)
    end = story.end
    if end is not None and end.cause != Cause.PROVISIONED:
        yield ""
        yield from _end_lines(story, end)
    for each in story.unknown:
        yield f"{INDENT}not known: {each}"


def _head(story: UpdateStory) -> str:
    update = story.update
    row = next((each for each in update.slots if each.slot == update.running), None)
    if row is None:
        return f"{story.title}: not booted out of a slot"
    state = STATES[row.state]
    return (
        f"{story.title}: {titled(row.name, row.version)} runs in slot {letter(row.slot)}, {state}"
    )


def _refused_lines(event: Event) -> Iterator[str]:
    about = titled(event.name, event.version) if event.version or event.name else "an update"
    yield f"{clock(event.wall)}  {about} was refused"
    yield labelled("cause", refusal(event.status, event.detail))
    yield labelled("boot", str(event.boot))
    yield from _trace_lines(event.trace)
    yield labelled("then", "nothing was changed: what runs went on, and nothing is tried")


def _end_lines(story: UpdateStory, end: ReasonRow) -> Iterator[str]:
    name = next((row.name for row in story.update.slots if _holds(row, end)), "")
    what = titled(name, end.version)
    slot = letter(end.slot)
    evidence = story.evidence(end)
    yield f"{clock(end.wall)}  {what} in slot {slot} {_outcome(end)}"
    for each in evidence or ((end,) if end.cause in LEFT else ()):
        yield from _evidence_lines(each)
    asked_for = story.asked_for(end)
    if asked_for is not None:
        text = f"{clock(asked_for.wall)}, written down before the first boot"
        yield labelled("asked for", f"{text}, {asked_for.detail}" if asked_for.detail else text)
        yield from _trace_lines(asked_for.trace)
    yield from _then_lines(story, end)


def _holds(row: Any, end: ReasonRow) -> bool:
    return bool((row.slot, row.version) == (end.slot, end.version))


def _outcome(end: ReasonRow) -> str:
    match end.cause:
        case Cause.ROLLED_BACK:
            return "was rolled back"
        case Cause.GIVEN_UP:
            return "was taken back"
        case Cause.DAMAGED:
            return "was damaged"
        case Cause.COMMITTED:
            return "was committed"
        case _:
            return "is to be tried, or is being tried"


def _evidence_lines(reason: ReasonRow) -> Iterator[str]:
    words = CAUSES.get(reason.cause, f"cause {reason.cause}")
    who = f"{reason.service}: " if reason.service else ""
    yield labelled("cause", f"{who}{words}")
    if reason.detail:
        yield labelled("", shown(reason.detail))
    yield labelled(
        "boot", f"{reason.boot}, {clock(reason.wall)}" if reason.wall else str(reason.boot)
    )
    for index, line in enumerate(tail_of(reason)):
        yield labelled("console" if index == 0 else "", shown(line))
    yield from _trace_lines(reason.trace)


def tail_of(reason: ReasonRow) -> list[str]:
    """The last lines that the boot showed; the first of them may lack its beginning."""
    return reason.tail.decode("utf-8", "replace").splitlines()


def _trace_lines(trace: bytes) -> Iterator[str]:
    if any(trace):
        yield labelled("trace", f"{trace.hex()}  (`nexus trace {trace.hex()}`)")


def _then_lines(story: UpdateStory, end: ReasonRow) -> Iterator[str]:
    update = story.update
    row = next((each for each in update.slots if each.slot == update.active), None)
    if end.cause in LEFT and row is not None:
        then = f"{titled(row.name, row.version)} in slot {letter(row.slot)} was booted again"
        if update.restoring:
            then += ", and its data are being put back"
        elif story.restored is not None and story.restored.status:
            detail = shown(story.restored.detail)
            then += f", and its data could not be put back: {detail}"
        elif story.restored is not None:
            then += ", with its data as they were before the switch"
        yield labelled("then", then)
    elif end.cause == Cause.COMMITTED:
        yield labelled("then", f"slot {letter(end.slot)} is what is booted")


# ---------------------------------------------------------------- as JSON


def story_document(story: UpdateStory) -> dict[str, Any]:
    """The story as JSON; times are ns since 1970."""
    end = story.end
    return {
        "system": story.title,
        "update": document(story.update),
        "refused": None if story.refused is None else event_document(story.refused),
        "end": None if end is None else reason_document(end),
        "evidence": [] if end is None else [reason_document(each) for each in story.evidence(end)],
        "reasons": [reason_document(each) for each in story.reasons],
        "events": [event_document(each) for each in story.events],
        "unknown": list(story.unknown),
    }


def reason_document(reason: ReasonRow) -> dict[str, Any]:
    """A reason as JSON."""
    known = {int(each): each.name.lower() for each in Cause}
    return {
        "cause": known.get(reason.cause, str(reason.cause)),
        "slot": letter(reason.slot),
        "version": reason.version,
        "boot": reason.boot,
        "time": reason.wall,
        "trace": reason.trace.hex() if any(reason.trace) else None,
        "service": reason.service or None,
        "detail": reason.detail,
        "console": tail_of(reason),
    }


def event_document(event: Event) -> dict[str, Any]:
    """An event of the history as JSON."""
    return {
        "number": event.number,
        "kind": EventKind(event.kind).name.lower(),
        "refused": refusal(event.status, event.detail) if event.status else None,
        "slot": letter(event.slot) if event.slot is not Slot.NONE else None,
        "version": event.version,
        "name": event.name,
        "boot": event.boot,
        "time": event.wall,
        "subject": f"{event.subject:016x}" if event.subject else SERVICE_NAME,
        "trace": event.trace.hex() if any(event.trace) else None,
        "detail": event.detail,
    }


def left_for(reasons: Sequence[ReasonRow], service: str) -> Iterator[str]:
    """What `nexus why SERVICE` says besides: which sets boot control left for its sake."""
    for reason in reasons:
        if reason.service == service and reason.cause in LEFT:
            yield (
                f"version {reason.version} was left in slot {letter(reason.slot)} for its sake: "
                "`nexus why` tells more"
            )
