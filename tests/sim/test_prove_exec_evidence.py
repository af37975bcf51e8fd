"""The checks of execd's and exportd's rungs, on what a real run of three boots left behind: true
evidence passes, and each way to lie in one place is found."""

import dataclasses
import re
from collections.abc import Callable

import pytest

from nexus.abi import Event, EventKind
from nexus.proof.checks_exec import values_of
from nexus.proof.checks_export import page_of, samples_of
from nexus.proof.prove import Outcome
from nexus.proof.verdict import Mismatch
from nexus.protocols.ladder import SELFTEST
from nexus.protocols.testsvc import LAST_LINE
from nexus.services.selftest.exec_rungs import COPY, EXIT0, EXIT42, HELLO
from tests.fakes.told import Change, Told

NUMBERS = (23, 24, 25, 26, 37, 38, 55, *range(84, 95), 129, 130)
MEASURED = f"{SELFTEST}: measured #"
EXITED = f"execd: child exited pid={{pid}} code=0 name={EXIT0} generation=1"

pytestmark = [pytest.mark.sim, pytest.mark.slow]


@pytest.mark.parametrize("number", NUMBERS)
def test_true_evidence_passes(outcome: Outcome, number: int) -> None:
    Told(outcome, number).check()


LIES: tuple[tuple[int, Change], ...] = (
    (37, lambda e: e["programs"].popitem()),
    (37, lambda e: e["programs"].update({HELLO: "00" * 32})),
    (37, lambda e: e["programs"].update({"demo.testsvc": "00" * 32})),
    (38, lambda e: e["streams"].clear()),
    (38, lambda e: e["streams"].update(metrics="tcp")),
    (38, lambda e: e["streams"].update(more="unix")),
    (55, lambda e: e.update(counters={"ok": 2})),
    (55, lambda e: e.update(generation=2)),
    (84, lambda e: e.update(program=EXIT0)),
    (84, lambda e: e.update(digest="00" * 32)),
    (86, lambda e: e.update(stamped=e["stamped"] + 1)),
    (86, lambda e: e.update(pid=e["pid"] + 1, stamped=e["stamped"] + 1)),
    (86, lambda e: e.update(generation=1, pid=e["pid"])),
    (86, lambda e: e.update(generation=99)),
    (89, lambda e: e.update(code=-1)),
    (89, lambda e: e.update(pid=e["pid"] + 1)),
    (89, lambda e: e.update(generation=2)),
    (89, lambda e: e.update(unknown="Ended")),
    (92, lambda e: e.update(service="00" * 8)),
    (92, lambda e: e["fields"].update(event="crash.v2")),
    (92, lambda e: e["fields"].update(pid="1")),
    (92, lambda e: e["fields"].update(code="0")),
    (92, lambda e: e["fields"].update(signal="9")),
    (92, lambda e: e["fields"].update(name=EXIT0)),
    (92, lambda e: e["fields"].update(build="")),
    (92, lambda e: e["fields"].update(build="00" * 32)),
    (92, lambda e: e["fields"].update(duration_ms="60000")),
    (92, lambda e: e.update(duration=60_000_000_000)),
    (92, lambda e: e.update(digest="00" * 32)),
    (92, lambda e: e.update(generation=2)),
    (92, lambda e: e.update(record=0)),
    (93, lambda e: e.update(reason=5)),
    (93, lambda e: e["live"].__setitem__(1, e["live"][0] + 1)),
    (93, lambda e: e["fields"].update(reason="policy")),
    (93, lambda e: e["fields"].update(decision="allow")),
    (93, lambda e: e["fields"].update(action="rng.entropy")),
    (93, lambda e: e.update(service="00" * 8)),
    (94, lambda e: e["next"].__setitem__(0, 1)),
    (94, lambda e: e["next"].__setitem__(1, 99)),
    (129, lambda e: e["copies"].clear()),
    (129, lambda e: e["copies"].append(e["copies"][0])),
    (129, lambda e: e["copies"][0].update(token="another")),
    (129, lambda e: e["copies"][1].update(pid=1)),
    (129, lambda e: e["copies"][1].update(generation=9)),
    (129, lambda e: e["copies"][2].update(service="00" * 8)),
    (129, lambda e: e["copies"][0]["report"].update(pid=1)),
    (129, lambda e: e["copies"][0]["report"].update(signal=0)),
    (129, lambda e: e["copies"][0]["report"].update(name=HELLO)),
    (129, lambda e: e["copies"][0]["report"].update(last="started")),
    (129, lambda e: e["copies"][0].update(written=0)),
    (129, lambda e: e["copies"][0].update(written=e["copies"][0]["taken"] + 10**9)),
    (129, lambda e: [each.update(taken=each["written"]) for each in e["copies"]]),
    (130, lambda e: e.update(value=4)),
    (130, lambda e: e.update(counter="selftest.gauge")),
    (130, lambda e: e["labels"].update(other="x")),
    (130, lambda e: e.update(scrapes=[0, 0])),
)


@pytest.mark.parametrize(("number", "lie"), LIES)
def test_each_lie_in_the_evidence_is_found(outcome: Outcome, number: int, lie: Change) -> None:
    told = Told(outcome, number)

    told.say(lie)

    with pytest.raises(Mismatch):
        told.check()


OTHERS: tuple[tuple[int, str, Change], ...] = (
    (37, f"{MEASURED}37", lambda e: e.update(programs=[], total=0)),
    (37, f"{MEASURED}37", lambda e: e["programs"][0].__setitem__(1, "00" * 32)),
    (37, f"{MEASURED}37", lambda e: e.update(total=9)),
    (38, "init: ready", lambda e: e["links"].append(["exportd", "statefsd", 8, 16384, 0, 1, 1])),
    (84, f"{MEASURED}84", lambda e: e.update(refused="Started")),
    (84, f"{MEASURED}84", lambda e: e.update(refused="FAILED")),
    (84, f"{MEASURED}84", lambda e: e.update(altered=EXIT0)),
    (84, f"{MEASURED}84", lambda e: e.update(pid=1)),
    (84, f"{MEASURED}84", lambda e: e.update(generation=9)),
    (85, f"{MEASURED}85", lambda e: e.update(pid=1)),
    (85, f"{MEASURED}85", lambda e: e.update(generation=2)),
    (85, f"{MEASURED}85", lambda e: e["row"].__setitem__(0, 0)),
    (87, f"{MEASURED}87", lambda e: e.update(pid=1)),
    (87, f"{MEASURED}87", lambda e: e.update(generation=2)),
    (88, f"{MEASURED}88", lambda e: e.update(served=5)),
    (88, f"{MEASURED}88", lambda e: e.update(code=1)),
    (88, f"{MEASURED}88", lambda e: e.update(pid=1)),
    (88, f"{MEASURED}88", lambda e: e["waited_for"].__setitem__(0, 0)),
    (88, f"{MEASURED}88", lambda e: e["waited_for"].__setitem__(2, 0)),
    (88, f"{MEASURED}88", lambda e: e["waited_for"].__setitem__(3, 1)),
    (89, f"{MEASURED}87", lambda e: e.update(pid=1)),
    (90, f"{MEASURED}90", lambda e: e.update(pid=1)),
    (91, f"{MEASURED}91", lambda e: e.update(pid=1)),
    (91, f"{MEASURED}91", lambda e: e.update(code=0)),
    (91, f"{MEASURED}91", lambda e: e.update(forged="Reported")),
    (91, f"{MEASURED}91", lambda e: e["reports"][1].append(99)),
    (91, f"{MEASURED}91", lambda e: e.update(report=99)),
    (92, f"{MEASURED}91", lambda e: e.update(pid=1)),
)


@pytest.mark.parametrize(("number", "text", "lie"), OTHERS)
def test_each_lie_of_the_other_side_is_found(
    outcome: Outcome, number: int, text: str, lie: Change
) -> None:
    told = Told(outcome, number)

    told.say(lie, text, boot=0)

    with pytest.raises(Mismatch):
        told.check()


def _of(kind: EventKind, name: str, **fields: object) -> Callable[[Event], bool]:
    def wanted(event: Event) -> bool:
        found = {key: event.fields.get(key) for key in fields}
        return event.kind is kind and event.fields.get("name") == name and found == fields

    return wanted


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (23, _of(EventKind.SPAWN, "execd")),
        (25, _of(EventKind.SPAWN, "exportd")),
        (84, _of(EventKind.SPAWN, HELLO, generation=1)),
        (85, _of(EventKind.SPAWN, HELLO, generation=1)),
        (86, _of(EventKind.SPAWN, HELLO, generation=2)),
        (86, _of(EventKind.EXIT, HELLO, generation=2)),
        (87, _of(EventKind.SPAWN, EXIT0)),
        (88, _of(EventKind.EXIT, EXIT0)),
        (88, _of(EventKind.EXIT, HELLO, generation=3)),
        (89, _of(EventKind.EXIT, EXIT0)),
        (90, _of(EventKind.SPAWN, EXIT42, generation=1)),
        (91, _of(EventKind.EXIT, EXIT42, generation=1)),
        (92, _of(EventKind.EXIT, EXIT42, generation=1)),
        (94, _of(EventKind.SPAWN, HELLO)),
        (129, _of(EventKind.EXIT, COPY, generation=1)),
        (129, _of(EventKind.CONSOLE, COPY, line=LAST_LINE)),
    ],
)
def test_what_the_kernel_did_not_record_is_found(
    outcome: Outcome, number: int, wanted: Callable[[Event], bool]
) -> None:
    told = Told(outcome, number)

    told.without(wanted)

    with pytest.raises(Mismatch):
        told.check()


Rewrite = Callable[[Event], Event]


def _rewritten(told: Told, wanted: Callable[[Event], bool], rewrite: Rewrite) -> None:
    """Have the kernel's record of the rung's boot say something else in one place."""
    trace = told.traces[told.boot]
    events = tuple(rewrite(event) if wanted(event) else event for event in trace.events)
    assert events != tuple(trace.events), "something is rewritten"
    told.put(told.boot, dataclasses.replace(trace, events=events))


def _with(**fields: object) -> Rewrite:
    return lambda event: event._replace(fields={**event.fields, **fields})


@pytest.mark.parametrize(
    ("number", "wanted", "rewrite"),
    [
        (38, _of(EventKind.SPAWN, "exportd"), _with(grants={"stream_ports": []})),
        (84, _of(EventKind.SPAWN, HELLO, generation=1), _with(digest="00" * 32)),
        (84, _of(EventKind.SPAWN, HELLO, generation=1), _with(program=EXIT0)),
        (88, _of(EventKind.EXIT, EXIT0), _with(code=1)),
        (88, _of(EventKind.EXIT, EXIT0), lambda event: event._replace(pid=event.pid + 1)),
        (89, _of(EventKind.EXIT, EXIT0), _with(signal=9)),
        (91, _of(EventKind.EXIT, EXIT42, generation=1), _with(code=41)),
        (92, _of(EventKind.EXIT, EXIT42, generation=1), _with(code=41)),
        (129, _of(EventKind.EXIT, COPY), _with(signal=0)),
    ],
)
def test_a_kernel_that_says_otherwise_is_believed(
    outcome: Outcome, number: int, wanted: Callable[[Event], bool], rewrite: Rewrite
) -> None:
    told = Told(outcome, number)

    _rewritten(told, wanted, rewrite)

    with pytest.raises(Mismatch):
        told.check()


def test_a_line_before_the_end_that_it_tells_of_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 88)
    trace = told.traces[0]
    end = next(event for event in trace.events if _of(EventKind.EXIT, EXIT0)(event))
    line = EXITED.format(pid=end.pid)
    said = next(event for event in trace.events if event.fields.get("line") == line)
    others = [event for event in trace.events if event is not said]

    others.insert(others.index(end), said)
    told.put(0, dataclasses.replace(trace, events=tuple(others)))

    with pytest.raises(Mismatch, match="after the line"):
        told.check_line(line)


def test_a_start_between_the_denial_and_the_line_before_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 93)
    trace = told.traces[0]
    place = told.line().place
    started = next(event for event in trace.events if _of(EventKind.SPAWN, EXIT0)(event))

    events = (*trace.events[:place], started, *trace.events[place:])
    told.put(0, dataclasses.replace(trace, events=events))

    with pytest.raises(Mismatch, match="starts that the kernel was asked for"):
        told.check()


# ------------------------------------------------------------------ the page


PAGES: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("nothing came", lambda _page: b""),
    ("no HTTP", lambda _page: b"SSH-2.0-OpenSSH\r\n"),
    ("another status", lambda page: page.replace(b" 200 ", b" 503 ", 1)),
    ("another type", lambda page: page.replace(b"openmetrics-text", b"x-thing", 1)),
    ("an older value", lambda page: re.sub(rb"(selftest_counter_total\S*) 7", rb"\1 3", page)),
    ("no such counter", lambda page: page.replace(b"selftest_counter", b"selftest_another")),
    ("a gauge", lambda page: page.replace(b"TYPE selftest_counter counter", b"TYPE x gauge")),
    ("cut off", lambda page: page[: len(page) // 2]),
)


@pytest.mark.parametrize(("what", "change"), PAGES, ids=[what for what, _ in PAGES])
def test_a_page_that_says_otherwise_is_found(
    outcome: Outcome, what: str, change: Callable[[bytes], bytes]
) -> None:
    told = Told(outcome, 130)
    trace = told.traces[told.boot]
    page = change(trace.scraped)
    assert page != trace.scraped, what

    told.put(told.boot, dataclasses.replace(trace, scraped=page))

    with pytest.raises(Mismatch):
        told.check()


def test_the_page_is_read_by_a_parser_that_refuses_what_is_no_open_metrics() -> None:
    with pytest.raises(Mismatch, match="no OpenMetrics"):
        _ = list(samples_of("# TYPE a counter\na 1\n# EOF\n"))


def test_bytes_behind_the_declared_length_are_no_part_of_the_page() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: x\r\n\r\nab more"

    assert page_of(data).text == "ab"


def test_the_words_of_a_line_are_its_values() -> None:
    assert values_of("execd: child exited pid=3 code=-1") == {"pid": "3", "code": "-1"}
