"""The page of a run says what the run was, needs nothing else, and runs nothing."""

from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from nexus.abi import Event, EventKind, Nanos, Pid
from nexus.proof.notes import NOTE, NOTE_STAGE, NOTE_UP
from nexus.proof.page import _step, as_page
from nexus.proof.prove import Outcome
from nexus.proof.request import Request
from nexus.proof.timeline import Mark, heard_after, marks_of, notes_of, waited_of
from nexus.proof.trace import Ending, Trace
from nexus.proof.verdict import RungResult, State, Verdict
from nexus.protocols.ladder import RUNGS, Ground, Phase

NOTES: Final = (
    {"at": 2.5, NOTE: NOTE_UP, "t": 1_500_000_000, "kernel": "6.12.1", "python": "3.11.2"},
    {"host": "cpus", "answer": 2},
    {"at": 2.7, NOTE: NOTE_STAGE, "t": 1_700_000_000, "name": "devices"},
    {"at": 9.0, NOTE: "off", "t": 8_000_000_000, "code": 0},
)


def line(at: int, name: str, text: str, kind: EventKind = EventKind.CONSOLE) -> Event:
    return Event(Nanos(at), kind, Pid(1), {"name": name, "generation": 1, "line": text})


EVENTS: Final = (
    line(2_000_000_000, "", "KSELFTEST: spawn reasons ok", EventKind.KERNEL),
    line(3_000_000_000, "init-lite", "init: start"),
    line(4_000_000_000, "timed", "timed: ready"),
    line(5_000_000_000, "timed", "timed: ready"),  # of a later instance
    line(6_000_000_000, "init-lite", "init: ready"),
    line(7_000_000_000, "selftest-client", "SELFTEST: end"),
)


def outcome(trace: Trace, *, reason: str = "", finding: str = "") -> Outcome:
    """A run of which all rungs passed, but the first where there is a reason."""
    results = [RungResult(number=row.number, state=State.PASSED) for row in RUNGS]
    if reason:
        results[0] = RungResult(number=1, state=State.RED, reason=reason, evidence={"<b>": reason})
    results[48] = RungResult(number=49, state=State.NOT_RUN, reason="not on ground vm")
    plan: Any = SimpleNamespace(name="selftest", digest="0123456789abcdef" * 4)
    return Outcome(
        request=Request(ground=Ground.VM, system=Path("x.toml"), smp=None, seed=7),
        smp=2,
        plan=plan,
        traces=(trace,),
        verdict=Verdict(
            results=tuple(results),
            findings=(finding,) if finding else (),
            last_phase=Phase.END,
        ),
        record=Path("record.jsonl"),
    )


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_timeline_of_a_machine_begins_with_its_kernel() -> None:
    marks = marks_of(Trace(EVENTS, notes=NOTES))

    assert marks == (
        Mark("kernel", Nanos(0)),
        Mark("process 1", Nanos(1_500_000_000)),
        Mark("process 1: devices", Nanos(1_700_000_000)),
        Mark("KSELFTEST: spawn reasons ok", Nanos(2_000_000_000)),
        Mark("init: start", Nanos(3_000_000_000)),
        Mark("timed: ready", Nanos(4_000_000_000)),
        Mark("init: ready", Nanos(6_000_000_000)),
        Mark("ladder: SELFTEST: end", Nanos(7_000_000_000)),
        Mark("power off", Nanos(8_000_000_000)),
    )
    assert heard_after(NOTES) == 2.5


def test_what_a_machine_waited_for_the_one_before_it_is_no_part_of_its_boot() -> None:
    waits = {"at": 0.0, "guest": "stage", "t": 1_600_000_000, "name": "waits"}
    goes_on = {"at": 0.1, "guest": "stage", "t": 21_600_000_000, "name": "goes on"}
    devices = {"at": 0.2, "guest": "stage", "t": 21_700_000_000, "name": "devices"}
    notes = (*(note for note in NOTES if note.get("guest") == "up"), waits, goes_on, devices)

    marks = marks_of(Trace((), notes=notes))

    assert marks == (
        Mark("kernel", Nanos(0)),
        Mark("process 1", Nanos(1_500_000_000)),
        Mark("process 1: waits", Nanos(1_600_000_000)),
        Mark("process 1: goes on", Nanos(1_600_000_000)),
        Mark("process 1: devices", Nanos(1_700_000_000)),
    )
    assert waited_of(notes).length == 20_000_000_000
    assert heard_after(notes) is None  # nobody listened


def test_elsewhere_it_begins_with_the_first_event() -> None:
    marks = marks_of(Trace(EVENTS))

    assert marks[0] == Mark("KSELFTEST: spawn reasons ok", Nanos(0))
    assert marks[-1] == Mark("ladder: SELFTEST: end", Nanos(5_000_000_000))
    assert marks_of(Trace(())) == ()
    assert heard_after(()) is None


def test_notes_are_read_where_a_machine_left_them(tmp_path: Path) -> None:
    (tmp_path / "guest-1.jsonl").write_text('{"at": 1.0, "guest": "up", "t": 5}\n{"host": "x"}\n')
    (tmp_path / "guest-2.jsonl").write_text("no note\n")

    assert [len(notes_of(tmp_path, boot)) for boot in (0, 1, 2)] == [0, 2, 0]


def test_the_page_has_the_verdict_the_ladder_and_the_timeline() -> None:
    page = as_page(outcome(Trace(EVENTS, ending=Ending(wall=9_000_000_000), notes=NOTES)))

    seen = Tags(page)
    assert 'exit_code=0 first_failed_phase="" missing_marker=""' in seen.text
    assert "143 of 143 passed" in seen.text
    assert all(row.marker in seen.text for row in RUNGS if row.number != 49)
    assert "not on ground vm: 49" in seen.text
    assert "timed: ready" in seen.text
    assert "6.12.1" in seen.text


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    seen = Tags(as_page(outcome(Trace(EVENTS, notes=NOTES))))

    assert not {tag for tag, _ in seen.tags} & {"script", "link", "img", "iframe", "object"}
    named = {name for _, attributes in seen.tags for name in attributes}
    assert not {name for name in named if name.startswith("on")} | named & {"src", "href"}


def test_what_came_out_of_a_run_is_text_on_the_page() -> None:
    evil = "<script>alert(1)</script>"
    events = (*EVENTS, line(8_000_000_000, evil, f"{evil}: ready"))

    page = as_page(outcome(Trace(events, notes=NOTES), reason=evil, finding=evil))

    assert "<script" not in page
    assert "exit_code=1" in Tags(page).text
    assert evil in Tags(page).text


@pytest.mark.parametrize("end", [1, 9, 10, 11, 99, 376_000_000, 12_200_000_000, 3_600_000_000_000])
def test_a_scale_has_at_most_ten_steps(end: int) -> None:
    assert 1 <= end / _step(end) <= 10
