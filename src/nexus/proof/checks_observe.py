"""The evidence behind the rungs about logs, metrics and spans: what the client measured, what the
services told on another way, and what the runner decodes itself, of a page and on the disk."""

import binascii
import zlib
from base64 import b64decode
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from nexus.abi import EventKind, service_id
from nexus.proof.checks import healthy, hex_of, measured, of_init, rejection
from nexus.proof.checks_state import left_of
from nexus.proof.trace import Line, Trace
from nexus.proof.verdict import Case, Check, Mismatch, demand, demand_equal
from nexus.protocols.ladder import SELFTEST, rung
from nexus.protocols.metricsd import SPAN_SIZE
from nexus.protocols.statefsd import Batch, Get, ListKeys
from nexus.services.metricsd.config import Settings as MetricsdSettings
from nexus.services.metricsd.rollup import entry_of
from nexus.services.metricsd.wal import ROOT, meta_of, unpack
from nexus.telemetry import NoPage, PageReader

Evidence = Mapping[str, Any]
LOGD: Final = "logd"
METRICSD: Final = "metricsd"
ME: Final = f"{service_id(SELFTEST):016x}"
LOGD_WINDOW: Final = 24  # records of one sender in a second (ladder #113)
METRICSD_WINDOW: Final = 64  # events of one sender in a second (ladder #121)
SECOND: Final = 1_000_000_000  # ns
SERIES_CAP: Final = 16  # ladder #120
BUCKET_BOUNDS: Final = [1_000_000, 5_000_000, 20_000_000, 100_000_000]  # ns (services.md 3.5)
OBSERVED: Final = (500_000, 3_000_000, 15_000_000, 50_000_000, 500_000_000)  # ns; ladder #125
REPEATED: Final = 3_000_000  # ns; each further value of rung 125
SNAPSHOTS_MIN: Final = 1_000
SLEEP: Final = 5_000_000  # ns; ladder #126
PAGE_SIZE_MAX: Final = 1 << 20  # bytes of a page that came with the evidence
MAKER_SIZE: Final = 4  # bytes of a span id: the low half of its maker's service id
PROBED: Final = ("policyd", "statefsd", "timed")  # ladder #118
TOTAL: Final = 7  # 3 and 4; ladder #123
GAUGE_LAST: Final = -3  # ladder #124


def metricsd_ready(case: Case, trace: Trace, line: Line) -> None:
    """#31: the sink and the limits that it answers with are those of the system file."""
    facts = healthy(case, trace, line)
    service = case.plan.by_name[line.printer]
    settings = msgspec.convert(dict(service.settings), MetricsdSettings)
    wanted = {
        "series_max": settings.series,
        "series_per_service_max": settings.series_per_service,
        "series_per_metric_max": settings.series_per_metric,
        "rate_max": settings.rate,
        "spans_open_max": settings.spans_open,
        "spans_open_each_max": settings.spans_open_each,
        "spans_kept_max": settings.spans_kept,
        "windows_max": settings.windows,
        "segments_max": settings.segments,
        "bytes_per_day_max": settings.bytes_max,
    }
    demand_equal({name: facts.get(name) for name in wanted}, wanted, "limits")
    sinks = [link.server for link in case.plan.links if link.client == METRICSD]
    demand(LOGD in sinks, "the plan gives metricsd no link to logd")
    demand_equal([facts.get("log_sink_logd"), line.evidence["sink"]], [1, LOGD], "log sink")


# ---------------------------------------------------------------- streams


def hardening(_case: Case, trace: Trace, line: Line) -> None:
    """#114: three refusals held by the client, a good record behind them, and streams that are
    opened by the same three rules."""
    evidence = line.evidence
    held = {
        "INVALID_ARGS": [measured(trace, 111)["status"]],
        "OVER_LIMIT": measured(trace, 112)["statuses"][-1:],
        "RATE_LIMITED": measured(trace, 113)["statuses"][-1:],
    }
    demand_equal(held, {name: [name] for name in held}, "statuses the client holds")
    demand(evidence["record"] > 0, "no good record was taken")
    demand_equal(
        evidence["shapes"], {"no ring": "INVALID_ARGS", "too large": "OVER_LIMIT"}, "bad streams"
    )
    counted = {name: evidence["growth"][name] for name in ("invalid_args", "over_limit")}
    demand_equal(counted, {"invalid_args": 1, "over_limit": 1}, "growth of its row in STATS")
    opened = evidence["opened"]
    demand(opened["took_ns"] < SECOND, "the openings took longer than their window")
    wanted = ["OK"] * LOGD_WINDOW + ["RATE_LIMITED"]
    demand_equal(opened["statuses"], wanted, "one opening more than a window takes")
    demand_equal(opened["rate_limited"], 1, "openings that STATS counts as too many")
    before, after = evidence["streams"]
    demand_equal(after, before, "streams open afterwards")


def stats_probe(_case: Case, _trace: Trace, line: Line) -> None:
    """#115: of the burst every record is in one account, by STATS and by the stream's own."""
    evidence = line.evidence
    sent, growth = evidence["sent"], evidence["growth"]
    demand_equal(sum(growth.values()), sent, "accepted and dropped records")
    for reason in ("accepted", "invalid_args", "over_limit", "unread"):
        demand(growth[reason] > 0, f"nothing of the burst was {reason}")
    demand_equal(growth["damaged"], 0, "damaged records of a true writer")
    accounts = [new - old for new, old in zip(evidence["drained"], evidence["before"], strict=True)]
    refused = growth["invalid_args"] + growth["over_limit"] + growth["rate_limited"]
    wanted = [growth["accepted"], refused, growth["unread"], sent]
    demand_equal(accounts, wanted, "accepted, refused, overwritten and written, by the stream")
    total, dropped, used = evidence["totals"]
    demand(min(total, used) > 0, f"a reading is 0: {evidence['totals']}")
    demand_equal(total, dropped + used, "records of the journal")
    demand_equal(evidence["foreign"], 1, "foreign answers counted")
    number, sender, again, sender_again = evidence["older"]
    demand_equal([again, sender_again], [number, sender], "the older record")
    demand(sender != ME, "the older record is the client's own")


def core_services(_case: Case, trace: Trace, line: Line) -> None:
    """#118: three records under three ids, of tasks that the kernel started under these names."""
    probes = line.evidence["probes"]
    demand_equal(set(probes), set(PROBED), "services asked for a probe")
    for name, found in probes.items():
        demand_equal(found["service"], f"{service_id(name):016x}", f"sender of {name}'s record")
        demand_equal(found["growth"], 1, f"growth of {name}'s total")
        started = {
            (event.pid, event.fields["generation"])
            for at, event in trace.spawns(name)
            if at < line.place
        }
        stamped = (found["pid"], found["generation"])
        demand(stamped in started, f"{name}'s record is of {stamped}, which was never started")
    for what in ("token", "record"):
        demand_equal(len({found[what] for found in probes.values()}), len(PROBED), f"{what}s")


# ---------------------------------------------------------------- what metricsd refuses


def reject_invalid_args(_case: Case, trace: Trace, line: Line) -> None:
    """#119: a foreign span id and a secret-looking key: two statuses, two counted, nothing made."""
    rejection(line, "invalid_args")
    found = measured(trace, 119)
    maker, span = found["maker"]
    foreign = bytes.fromhex(span)[:MAKER_SIZE]
    demand_equal(len(bytes.fromhex(span)), SPAN_SIZE, "bytes of the span id")
    demand_equal(foreign[::-1].hex(), maker[8:], "the span id names another maker")
    demand(maker != ME, "the span id is the client's own")
    demand_equal(found["statuses"], ["INVALID_ARGS"] * 2, "statuses")
    demand_equal(found["growth"], _growth(invalid_args=2), "growth of its row")
    before, after, made = found["series"]
    demand_equal([after - before, made], [0, 0], "series made")
    before, after, made = found["spans"]
    demand(after <= before, f"{after - before} more spans are open")  # those of others may end
    demand_equal(made, 0, "spans made")


def reject_over_limit(_case: Case, trace: Trace, line: Line) -> None:
    """#120: sixteen series of a metric are there and work; the refused one is seen by everybody."""
    rejection(line, "over_limit")
    found = measured(trace, 120)
    demand_equal(found["statuses"], ["OK"] * SERIES_CAP + ["OVER_LIMIT"], "statuses")
    demand_equal(found["per_metric"], SERIES_CAP, "the cap, as metricsd tells it")
    demand_equal(len(found["values"]), SERIES_CAP, "series of the metric at metricsd")
    demand_equal(len(set(found["values"])), SERIES_CAP, "values, each series its own")
    labels = sorted(str(number) for number in range(SERIES_CAP))
    demand_equal(found["labels"], labels, "labels of these series")
    demand_equal(found["growth"], _growth(accepted=SERIES_CAP, over_limit=1), "growth of its row")
    before, after = found["refused"]
    demand_equal(after - before, 1, "growth of the visible overflow series")


def reject_rate_limited(_case: Case, trace: Trace, line: Line) -> None:
    """#121: creations, openings and messages fill one window together; nobody else's."""
    rejection(line, "rate_limited")
    found = measured(trace, 121)
    demand(found["took_ns"] < SECOND, "the burst took longer than its window")
    demand_equal(found["refused_from"], METRICSD_WINDOW, "events before the first refusal")
    for kind, statuses in found["statuses"].items():
        demand("OK" in statuses, f"no {kind} was taken")
        demand_equal(statuses[-1], "RATE_LIMITED", f"the last {kind}")
        demand_equal(statuses.count("RATE_LIMITED"), 1, f"refusals to {kind}")
    refused = sum(each.count("RATE_LIMITED") for each in found["statuses"].values())
    wanted = _growth(accepted=METRICSD_WINDOW, rate_limited=refused)
    demand_equal(found["growth"], wanted, "growth of its row")
    demand_equal(found["other"], 0, "status of another sender in that second")


def _growth(**grown: int) -> dict[str, int]:
    return {"accepted": 0, "invalid_args": 0, "over_limit": 0, "rate_limited": 0, **grown}


def security_rejects(_case: Case, trace: Trace, line: Line) -> None:
    """#122: all three refusals are held, the window opens again, and nobody sees the wild write."""
    evidence = line.evidence
    held = [
        measured(trace, 119)["statuses"][-1],
        measured(trace, 120)["statuses"][-1],
        *(each[-1] for each in measured(trace, 121)["statuses"].values()),
    ]
    wanted = ["INVALID_ARGS", "OVER_LIMIT", *["RATE_LIMITED"] * 3]
    demand_equal(held, wanted, "statuses the client holds")
    demand_equal(evidence["statuses"], ["OK", "OK"], "a span's start and end after the window")
    demand_equal(evidence["series"][1], 1, "the series after the window")
    demand_equal(evidence["span"][1], "OK", "the span after the window")
    before, after = evidence["stray"]
    demand(after > before, f"words that are nobody's: {before}, then {after}")
    demand(evidence["looked_at"] > SERIES_CAP, "hardly any series was looked at")
    demand_equal(evidence["seen"], [], "series in which the wild write is seen")


# ---------------------------------------------------------------- what metricsd reads


def counters(_case: Case, _trace: Trace, line: Line) -> None:
    """#123: the sum of what was added, by metricsd's answer and by its record in the journal."""
    evidence = line.evidence
    demand_equal(sum(evidence["added"]), TOTAL, "what was added")
    demand_equal(evidence["value"], TOTAL, "value in metricsd's answer")
    demand_equal(evidence["sender"], f"{service_id(METRICSD):016x}", "sender of the record")
    demand(evidence["record"] > 0, "the record has no id")
    fields = evidence["fields"]
    wanted = {
        "event": "metric.v1",
        "kind": "counter",
        "value": str(TOTAL),
        "series": str(evidence["series"]),
    }
    demand_equal({name: fields.get(name) for name in wanted}, wanted, "the record")
    demand_equal(hex_of(fields.get("owner", "")), ME, "whose series the record names")


def gauges(_case: Case, _trace: Trace, line: Line) -> None:
    """#124: the runner's own reading of the page's word is what metricsd answered."""
    evidence = line.evidence
    demand_equal(evidence["set"][-1], GAUGE_LAST, "what was set last")
    demand_equal(evidence["values"], evidence["set"], "values in metricsd's answers")
    demand_equal(_word_of(evidence["page"], evidence["word"]), GAUGE_LAST, "the word in the page")


def _word_of(packed: str, word: int) -> int:
    """A word of a page, signed, by the runner's own decoder."""
    try:
        page = zlib.decompressobj().decompress(b64decode(packed, validate=True), PAGE_SIZE_MAX)
        reader = PageReader(memoryview(page))
    except (binascii.Error, zlib.error, NoPage) as error:
        raise Mismatch(f"no page came with it: {error}") from error
    for _ in range(word + 1):
        demand(reader.allot() is not None, f"the page has no word {word}")
    reader.begin()
    reader.mark()
    reader.copy()
    _ = reader.settle()
    return reader.gauge(word)


def histograms(_case: Case, _trace: Trace, line: Line) -> None:
    """#125: a count in each bucket, and a thousand readings of which none is of no moment."""
    evidence = line.evidence
    demand_equal(evidence["bounds"], BUCKET_BOUNDS, "bounds")
    demand_equal(evidence["buckets"], [1] * (len(BUCKET_BOUNDS) + 1), "buckets")
    wanted = [len(OBSERVED), sum(OBSERVED)]
    demand_equal([evidence["count"], evidence["sum"]], wanted, "count and sum")
    demand(evidence["snapshots"] >= SNAPSHOTS_MIN, f"only {evidence['snapshots']} readings")
    demand(evidence["different"] > 1, "nothing was written while it was read")
    demand_equal(evidence["wrong"], 0, "readings of no moment")
    demand(evidence["halted"], "no update was halted")
    for count, buckets, total in (*evidence["halted"], evidence["last"]):
        demand_equal(buckets, count, "sum of the buckets, against the count")
        more = REPEATED * (count - len(OBSERVED))
        demand_equal(total, sum(OBSERVED) + more, f"sum of {count} values")
    demand_equal(evidence["last"][0], len(OBSERVED) + evidence["written"], "values in the end")
    halted = [count for count, _, _ in evidence["halted"]]
    before = list(range(len(OBSERVED), len(OBSERVED) + len(halted)))
    demand_equal(halted, before, "counts while an update was halted: those of before it")
    demand(evidence["torn"] > 0, "no torn reading was counted")


def spans(_case: Case, trace: Trace, line: Line) -> None:
    """#126: the span covers the sleep, by the kernel's clock; timed's is in it and in its trace."""
    evidence = line.evidence
    own, child = evidence["own"], evidence["child"]
    demand(own["end"] - own["start"] >= SLEEP, f"it lasted {own['end'] - own['start']} ns")
    start, until, end = evidence["asked"]
    demand(until - own["start"] >= SLEEP, f"the sleep: {until - own['start']} ns of the span")
    demand(start <= own["start"] and own["end"] <= end, "it is not within what the client did")
    demand(until <= evidence["woken"] <= own["end"], "timed woke it before its time, or after it")
    demand_equal(own["trace"], evidence["trace"], "trace of the client's span")
    demand_equal([child["trace"], child["parent"]], [own["trace"], own["span"]], "timed's span")
    demand(own["start"] <= child["start"] <= child["end"] <= own["end"], "timed's is not within")
    for name, span in ((SELFTEST, own), ("timed", child)):
        identity = f"{service_id(name):016x}"
        demand_equal(span["service"], identity, f"whose span {name}'s is")
        maker = bytes.fromhex(span["span"])[:MAKER_SIZE][::-1].hex()
        demand_equal(maker, identity[8:], f"maker in the id of {name}'s span")
        pids = {event.pid for at, event in trace.spawns(name) if at < line.place}
        demand(span["pid"] in pids, f"pid {span['pid']} is no task of {name}")
    demand_equal([own["status"], child["status"]], ["OK", "OK"], "how they ended")


# ---------------------------------------------------------------- what stays


def wal_active(_case: Case, trace: Trace, line: Line) -> None:
    """#127: the segment is in statefsd's list for metricsd, which statefsd heard write and read;
    and the runner reads segments on the disk."""
    evidence, found = line.evidence, measured(trace, 127)
    demand(str(evidence["key"]).startswith(f"{ROOT}wal/"), f"{evidence['key']} is no segment")
    segments = [each for each in found["keys"] if each.startswith("wal/")]
    demand(segments, "statefsd lists no segment")
    demand_equal(found["senders"], [f"{service_id(METRICSD):016x}"], "whom statefsd heard")
    heard = {Batch.INFO.op, Get.INFO.op, ListKeys.INFO.op} & set(found["ops"])
    demand(Batch.INFO.op in heard, f"statefsd heard metricsd only with {found['ops']}")
    left = left_of(trace)
    number = evidence["store_sequence"]
    demand(0 < number <= left.sequence, f"change {number} is none that statefsd has made")
    records = {
        key.decode(): kept
        for key, kept in left.records.items()
        if key.startswith(f"{ROOT}wal/".encode())
    }
    demand(records, "there is no segment on the disk")
    for key, kept in records.items():
        payloads, lost = unpack(kept.value)
        demand_equal(lost, 0, f"bad records in {key}")
        demand(len(payloads) > 1, f"{key} holds nothing")
        demand(meta_of(payloads[0]) is not None, f"the first record of {key} is no beginning")
        demand(entry_of(payloads[1]) is not None, f"the first entry of {key} is none")
    newest = max(kept.sequence for kept in records.values())
    demand(newest >= number, "the segments on the disk are older than the one acknowledged")


def retention(case: Case, trace: Trace, line: Line) -> None:
    """#128: metricsd was killed; the next one's windows add up to what was written before."""
    evidence = line.evidence
    _killed_between(trace, evidence["generations"])
    demand_equal(evidence["recovery_lost"], 0, "records that were not good")
    demand_equal(evidence["value"], TOTAL, "the counter at the new metricsd")
    before, after = evidence["before"], evidence["after"]
    for name, told in before.items():
        for resolution, rows in told.items():
            demand(rows, f"no {resolution} window of {name}")
            lost = [row for row in rows if row not in after[name][resolution]]
            demand_equal(lost, [], f"{resolution} windows of {name} that are no longer told")
    counter, gauge = before["selftest.counter"], before["selftest.level"]
    settings = msgspec.convert(dict(case.plan.by_name[METRICSD].settings), MetricsdSettings)
    demand_equal(evidence["lengths"], [settings.short_ns, settings.long_ns], "lengths of windows")
    first, *_ = evidence["added"]
    demand_equal(
        [row[1:] for row in counter["short"]],
        [
            [1, added, added, added, last]
            for added, last in zip(evidence["added"], (first, TOTAL), strict=True)
        ],
        "count, sum, min, max and last of the counter's short windows",
    )
    demand_equal(sum(row[2] for row in counter["long"]), TOTAL, "what its long windows hold")
    _folded(counter["short"], counter["long"], settings.long_ns)
    for row in gauge["short"] + gauge["long"]:
        _of_two(row, evidence["set"])
    demand_equal(gauge["short"][-1][5], evidence["set"][-1], "the gauge in its last window")
    least = min(row[3] for row in gauge["long"])
    demand_equal(least, min(evidence["set"]), "the least of the gauge")
    demand_equal(
        max(row[4] for row in gauge["long"]), max(evidence["set"]), "the most of the gauge"
    )
    _folded_gauge(gauge["short"], gauge["long"], settings.long_ns)
    for segments, segments_max, short, long, windows_max, written, written_max in evidence[
        "bounds"
    ]:
        demand_equal([segments_max, windows_max], [settings.segments, settings.windows], "bounds")
        demand(segments <= segments_max, f"{segments} segments")
        demand(max(short, long) <= windows_max, f"{short} and {long} windows")
        demand(written <= written_max == settings.bytes_max, f"{written} bytes were written")


def _killed_between(trace: Trace, generations: Sequence[int]) -> None:
    """init killed the old instance and started the new one, by the kernel's events."""
    old, new = generations
    demand_equal(new, old + 1, "generations")
    starts = {event.fields["generation"]: (at, event) for at, event in trace.spawns(METRICSD)}
    demand(old in starts and new in starts, f"the kernel started {list(starts)}")
    at, instance = starts[old]
    ends = [
        event
        for place, event in trace.of_kind(EventKind.EXIT)
        if at < place and event.pid == instance.pid
    ]
    demand(ends, "the old instance has not ended")
    demand_equal(ends[0].fields["signal"], KILLED, "how the old instance ended")
    demand(of_init(trace, f"init: restart {METRICSD}") is not None, "init did not restart it")


KILLED: Final = 9


def _folded(short: Sequence[list[int]], long: Sequence[list[int]], length: int) -> None:
    """Each long window of a counter is what its short ones are together."""
    for start, count, total, least, most, last in long:
        inside = _inside(short, start, length)
        found = [sum(row[1] for row in inside), sum(row[2] for row in inside), *_ends_of(inside)]
        wanted = [count, total, least, most, last]
        demand_equal(wanted, found, f"the long window of {start}")


def _folded_gauge(short: Sequence[list[int]], long: Sequence[list[int]], length: int) -> None:
    """The same of a gauge. A short window in which it was read and did not change is not told, and
    its readings are in the long one: they are of a value that was there anyway."""
    for start, count, _total, least, most, last in long:
        inside = _inside(short, start, length)
        demand_equal([least, most, last], _ends_of(inside), f"the long window of {start}")
        read = sum(row[1] for row in inside)
        demand(read <= count, f"the long window of {start} has {count} readings, of {read}")


def _inside(short: Sequence[list[int]], start: int, length: int) -> list[list[int]]:
    inside = [row for row in short if start <= row[0] < start + length]
    demand(inside, f"the long window of {start} has no short one")
    return inside


def _ends_of(rows: Sequence[list[int]]) -> list[int]:
    """The least, the most and the last value."""
    return [min(row[3] for row in rows), max(row[4] for row in rows), rows[-1][5]]


def _of_two(row: list[int], values: Sequence[int]) -> None:
    """A gauge's window in which only these two values were read adds up."""
    _, count, total, least, most, last = row
    low, high = min(values), max(values)
    demand(count > 0, "a window without a reading")
    demand(least in values and most in values and last in values, f"other values in {row}")
    highs, rest = divmod(total - low * count, high - low)
    demand_equal(rest, 0, f"what is left of the sum in {row}")
    demand(0 <= highs <= count, f"the sum in {row}")
    demand_equal(least, high if highs == count else low, f"the least in {row}")
    demand_equal(most, low if highs == 0 else high, f"the most in {row}")


CHECKS: Final[Mapping[int, Check]] = MappingProxyType(
    {
        31: metricsd_ready,
        114: hardening,
        115: stats_probe,
        118: core_services,
        119: reject_invalid_args,
        120: reject_over_limit,
        121: reject_rate_limited,
        122: security_rejects,
        123: counters,
        124: gauges,
        125: histograms,
        126: spans,
        127: wal_active,
        128: retention,
    }
)

assert rung(127).marker == "[INFO metricsd] retention wal active"
