"""The Trace Event Format, as far as a file of ours uses it, checked event by event."""

from typing import Any


def check_trace_events(document: Any) -> None:
    """What the Trace Event Format asks of an object with traceEvents (Google, 2016), and of
    complete events on one thread: they nest, or do not touch."""
    assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    open_ends: dict[tuple[int, int], list[float]] = {}
    named = set()
    complete = [each for each in document["traceEvents"] if each["ph"] == "X"]
    for event in document["traceEvents"]:
        assert event["ph"] in ("X", "M", "i")
        assert isinstance(event["name"], str)
        assert event["name"]
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            named.add(event["pid"])
        else:
            assert isinstance(event["ts"], int | float)
            assert event["ts"] >= 0
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
    for event in sorted(complete, key=lambda each: (each["ts"], -each["dur"])):
        assert event["dur"] >= 0
        ends = open_ends.setdefault((event["pid"], event["tid"]), [])
        while ends and ends[-1] <= event["ts"]:
            _ = ends.pop()
        assert not ends or event["ts"] + event["dur"] <= ends[-1]
        ends.append(event["ts"] + event["dur"])
    assert named >= {event["pid"] for event in document["traceEvents"]}
