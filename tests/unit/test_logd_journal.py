"""logd's machines without a kernel: escaping, the ring, the senders' table, what a record is."""

import unicodedata
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nexus.abi import CONTROL_LINK_SIZE, Nanos, Pid, QosClass, Sender, ServiceId, service_id
from nexus.log.payload import packed
from nexus.protocols.logd import (
    ESCAPE_GROWTH_MAX,
    EVERY_RECORD,
    FIELDS_SIZE_MAX,
    PAGE_MAX,
    RATE_MAX,
    RATE_WINDOW_NS,
    SCOPE_SIZE_MAX,
    SENDER_ROWS_MAX,
    TEXT_SIZE_MAX,
    Append,
    Field,
    Level,
    LogdStatus,
    Records,
)
from nexus.services.logd.checks import claims_identity, is_over_limit
from nexus.services.logd.config import SIZE_DEFAULT, SIZE_MIN, Settings
from nexus.services.logd.escape import escaped
from nexus.services.logd.journal import RECORD_OVERHEAD, RECORD_SIZE_MAX, Journal
from nexus.services.logd.reading import PAGE_SIZE_MAX, Page, Wanted
from nexus.services.logd.senders import OTHERS, Row, Senders
from nexus.wire import HEADER_SIZE, encode

SECOND = 1_000_000_000
PEER = ServiceId(7)
BIDI_CLASSES = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def sender(service: int = PEER) -> Sender:
    return Sender(ServiceId(service), Pid(100 + service), 1, QosClass.NORMAL)


def line(text: str = "", fields: tuple[Field, ...] = (), level: Level = Level.INFO) -> Append:
    return Append(level, "test", text, list(fields))


def page(journal: Journal, since: int = 0, /, count: int = PAGE_MAX, **values: Any) -> Page:
    return journal.page(since, count, Wanted(msgspec.structs.replace(EVERY_RECORD, **values)))


def put(journal: Journal, who: Sender, request: Append, row: Row, now: int) -> int:
    return journal.append(who, [packed(request)], row, Nanos(now), 10 * SECOND + now)


def add(journal: Journal, text: str = "", *, now: int = 0, row: Row | None = None) -> int:
    return put(journal, sender(), line(text), Row(PEER, 1) if row is None else row, now)


def size_of(request: Append) -> int:
    """What a record counts for."""
    return RECORD_OVERHEAD + len(packed(request))


def paged(journal: Journal, **values: Any) -> list[int]:
    """The ids found by paging as the protocol says."""
    found: list[int] = []
    at = 1
    while at <= journal.last:
        some = page(journal, at, **values)
        assert some.next > at
        found += [record.record for record in some.records]
        at = some.next
    return found


# ------------------------------------------------------------------ escaping


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain text, 3 °C", "plain text, 3 °C"),
        ("a\nb", "a\\x0ab"),
        ("\r\x1b[2J\x7f", "\\x0d\\x1b[2J\\x7f"),
        ("\x85\u2028\u2029", "\\x85\\u2028\\u2029"),
        ("ok \u202egnihton", "ok \\u202egnihton"),
        ("a\\x0ab", "a\\\\x0ab"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(raw: str, shown: str) -> None:
    assert escaped(raw) == shown


@given(st.text())
def test_escaped_text_has_one_line_no_controls_and_one_source(text: str) -> None:
    shown = escaped(text)

    assert len(shown.splitlines()) <= 1
    for char in shown:
        assert unicodedata.category(char) != "Cc"
        assert unicodedata.bidirectional(char) not in BIDI_CLASSES
    assert len(shown.encode()) <= ESCAPE_GROWTH_MAX * len(text.encode())
    assert unescaped(shown) == text


def unescaped(shown: str) -> str:
    """The text that `shown` stands for, read by the rules and not by the code."""
    out = ""
    at = 0
    while at < len(shown):
        if shown[at] != "\\":
            out, at = out + shown[at], at + 1
        elif shown[at + 1] == "\\":
            out, at = out + "\\", at + 2
        else:
            digits = 2 if shown[at + 1] == "x" else 4
            out += chr(int(shown[at + 2 : at + 2 + digits], 16))
            at += 2 + digits
    return out


def test_a_line_break_in_a_record_cannot_forge_a_second_one() -> None:
    journal = Journal(8, SIZE_MIN)
    forged = "harmless\n[ERROR policyd] allow everything"

    _ = put(journal, sender(), line(forged, (Field("k", "a\nsender=policyd"),)), Row(PEER, 1), 1)

    (record,) = page(journal).records
    assert record.text == "harmless\\x0a[ERROR policyd] allow everything"
    assert record.fields == [Field("k", "a\\x0asender=policyd")]
    assert record.service == PEER
    assert page(journal, key="k", value="a\nsender=policyd").records == [record]


# ------------------------------------------------------------------ what a record is


@pytest.mark.parametrize(
    "key",
    [
        "sender_service_id",
        "sender-service-id",
        "senderserviceid",
        "sender.service.id",
        "service_id",
        "s.e.r.v.i.c.e",
        "requester_id",
        "service",
        "sender",
        "sender_pid",
        "sender.generation",
        "service-name",
        "pid",
        "Sender",
        "SERVICE_ID",
        "service id",
        "sérvice",
        "k\n",
    ],
)
def test_a_claim_of_identity_in_any_spelling_is_seen(key: str) -> None:
    assert claims_identity(line(fields=(Field("ok", "1"), Field(key, "0x1"))), is_core=False)


@pytest.mark.parametrize("key", ["subject", "target", "generation", "peer", "services", "p", "a.b"])
def test_what_tells_of_others_is_no_claim(key: str) -> None:
    assert not claims_identity(line(fields=(Field(key, "service=x"),)), is_core=False)


def test_only_core_senders_tell_the_pid_of_another_and_they_claim_nothing_else() -> None:
    assert not claims_identity(line(fields=(Field("pid", "4"),)), is_core=True)
    assert claims_identity(line(fields=(Field("sender_pid", "4"),)), is_core=True)


@pytest.mark.parametrize(
    ("request_", "over"),
    [
        (Append(Level.INFO, "s" * SCOPE_SIZE_MAX, "", []), False),
        (Append(Level.INFO, "s" * (SCOPE_SIZE_MAX + 1), "", []), True),
        (Append(Level.INFO, "", "ü" * (TEXT_SIZE_MAX // 2), []), False),
        (Append(Level.INFO, "", "ü" * (TEXT_SIZE_MAX // 2) + "x", []), True),
        (line(fields=(Field("fill", "x" * (FIELDS_SIZE_MAX - 6)),)), False),
        (line(fields=(Field("fill", "x" * (FIELDS_SIZE_MAX - 5)),)), True),
        (line(fields=(Field("a", "x" * 253), Field("b", "x" * 253))), False),
        (line(fields=(Field("a", "x" * 253), Field("b", "x" * 254))), True),
    ],
)
def test_the_limits_are_bytes_and_their_last_byte_is_allowed(request_: Append, over: bool) -> None:
    assert is_over_limit(request_) is over


# ------------------------------------------------------------------ the ring


def test_a_journal_never_fills_up_for_good() -> None:
    journal = Journal(16, 2 * SIZE_MIN)

    ids = [add(journal, "x" * 100) for _ in range(10_000)]

    assert ids == list(range(1, 10_001))
    assert (len(journal), journal.dropped) == (16, 9_984)
    assert journal.size == 16 * size_of(line("x" * 100)) <= 2 * SIZE_MIN


def test_large_records_push_out_as_many_as_their_bytes_need() -> None:
    journal = Journal(1000, SIZE_MIN)
    small = size_of(line())
    for _ in range(SIZE_MIN // small):
        _ = add(journal)
    before = journal.oldest

    _ = add(journal, "x" * TEXT_SIZE_MAX)

    large = size_of(line("x" * TEXT_SIZE_MAX))
    needed = -(-(large - (SIZE_MIN - SIZE_MIN // small * small)) // small)
    assert journal.oldest - before == needed
    assert journal.size <= SIZE_MIN


@pytest.mark.parametrize("text", ["", "x" * TEXT_SIZE_MAX], ids=["by number", "by bytes"])
def test_a_sender_that_never_stops_does_not_push_out_what_others_said(text: str) -> None:
    journal = Journal(100, SIZE_MIN * 4)
    others = [_said(journal, service, "x") for service in range(1, 6) for _ in range(2)]

    for _ in range(1000):
        _ = _said(journal, 9, text)

    assert [each for each in paged(journal) if each <= len(others)] == others
    assert journal.oldest == 1
    assert len(journal) + journal.dropped == journal.total == 1000 + len(others)


def test_two_that_never_stop_and_hold_no_more_than_they_may_push_out_the_oldest() -> None:
    journal = Journal(100, SIZE_DEFAULT)

    for number in range(1000):
        _ = _said(journal, number % 2, "")

    assert paged(journal) == list(range(901, 1001))


def test_paging_leads_over_ids_that_are_missing_and_each_page_is_full() -> None:
    journal = Journal(40, SIZE_DEFAULT)
    first = [_said(journal, 1, "") for _ in range(5)]
    for _ in range(10_000):
        _ = _said(journal, 9, "")

    found = page(journal)

    assert [record.record for record in found.records[:5]] == first
    assert len(found.records) == PAGE_MAX
    assert found.next == found.records[-1].record + 1
    assert page(journal, count=5).next == found.records[5].record
    assert paged(journal) == [*first, *range(journal.total - 34, journal.total + 1)]
    assert page(journal, journal.total + 7).next == journal.total + 7


def _said(journal: Journal, service: int, text: str) -> int:
    return put(journal, sender(service), line(text), Row(ServiceId(service), 1), 0)


def test_the_largest_record_fits_the_smallest_ring_and_one_page() -> None:
    journal = Journal(1, SIZE_MIN)
    worst = Append(
        Level.INFO, "\n" * SCOPE_SIZE_MAX, "\n" * TEXT_SIZE_MAX, [Field("k", "\n" * 509)]
    )
    assert not is_over_limit(worst)

    _ = put(journal, sender(), worst, Row(PEER, 1), 1)

    assert journal.size <= RECORD_SIZE_MAX
    found = page(journal)
    body = encode(Records(found.next, 1, 1, 0, found.records))
    assert len(body) + HEADER_SIZE <= CONTROL_LINK_SIZE
    assert msgspec.msgpack.decode(body, type=Records).records == found.records


def test_times_strictly_increase_and_come_from_the_message() -> None:
    journal = Journal(8, SIZE_MIN)

    for now in (50, 50, 40, 90):
        _ = add(journal, now=now)

    assert [record.at for record in page(journal).records] == [50, 51, 52, 90]


def test_paging_over_mixed_sizes_skips_none_and_fills_pages() -> None:
    journal = Journal(1000, SIZE_DEFAULT)
    for number in range(200):
        text = "\n" * (TEXT_SIZE_MAX if number % 3 else number % 50)
        fields = (Field("fill", "x" * 500),) if number % 5 == 0 else ()
        _ = put(journal, sender(), line(text, fields), Row(PEER, 1), number)

    assert paged(journal) == list(range(1, 201))
    found = page(journal, 1)
    assert 0 < len(found.records) < PAGE_MAX, "some page is full by size"
    assert sum(len(encode(record)) for record in found.records) <= PAGE_SIZE_MAX
    assert found.next == len(found.records) + 1


def test_paging_goes_on_behind_what_is_pushed_out_meanwhile() -> None:
    journal = Journal(20, SIZE_DEFAULT)
    for _ in range(20):
        _ = add(journal)
    first = page(journal, 1)
    for _ in range(10):
        _ = add(journal)

    second = page(journal, first.next)
    for _ in range(15):
        _ = add(journal)
    third = page(journal, second.next)

    assert [record.record for record in first.records] == list(range(1, 17))
    assert [record.record for record in second.records] == list(range(17, 31))
    assert [record.record for record in third.records] == list(range(31, 46))[:PAGE_MAX]
    assert journal.oldest == 26, "26 to 30 were read before they can be missed"


def test_filters_by_time_trace_and_instance() -> None:
    journal = Journal(16, SIZE_MIN)
    row = Row(PEER, 1)
    for number in (1, 2, 3):
        who = Sender(PEER, Pid(107), number, QosClass.NORMAL)
        payload = packed(line(), 0, bytes([number]) * 16, bytes(8))
        _ = journal.append(who, [payload], row, Nanos(number * SECOND), number * SECOND)

    assert paged(journal, since=2 * SECOND) == [2, 3]
    assert paged(journal, until=2 * SECOND) == [1], "what is at that moment is not before it"
    assert paged(journal, since=2 * SECOND, until=3 * SECOND) == [2]
    assert paged(journal, trace=bytes([2]) * 16) == [2]
    assert paged(journal, trace=bytes([9]) * 16) == []
    assert paged(journal, generation=3) == [3]
    assert paged(journal, pid=107) == [1, 2, 3]
    assert paged(journal, pid=108) == []


def test_filters_by_level_sender_and_field() -> None:
    journal = Journal(100, SIZE_DEFAULT)
    for number in range(40):
        level = Level(number % 5)
        request = line("", (Field("odd", str(number % 2)),), level)
        _ = put(journal, sender(1 + number % 3), request, Row(PEER, 1), number)

    assert paged(journal, level=Level.WARN) == [n + 1 for n in range(40) if n % 5 <= 1]
    assert paged(journal, service=2) == [n + 1 for n in range(40) if n % 3 == 1]
    assert paged(journal, key="odd", value="1") == [n + 1 for n in range(40) if n % 2]
    assert paged(journal, key="odd", value="") == []
    assert paged(journal, service=99) == []
    assert page(journal, 1, count=2).next == 3
    assert (page(journal, 500).records, page(journal, 500).next) == ([], 500)


def test_records_that_come_together_are_kept_as_if_they_came_one_by_one() -> None:
    """Of a batch, too, a quarter of a full ring stays with the others."""
    one_by_one, together = (Journal(100, SIZE_DEFAULT) for _ in range(2))
    for journal in (one_by_one, together):
        for service in (1, 2):
            _ = _said(journal, service, "first")
    payload = packed(line("more"))

    for _ in range(500):
        _ = one_by_one.append(sender(9), [payload], Row(ServiceId(9), 1), Nanos(0), 0)
    last = together.append(sender(9), [payload] * 500, Row(ServiceId(9), 1), Nanos(0), 0)

    assert paged(one_by_one)[:2] == paged(together)[:2] == [1, 2]
    assert last == one_by_one.last == together.last
    assert together.total == len(together) + together.dropped
    assert len(together) <= 100


def test_the_last_records_of_an_instance_come_in_order_and_fit_a_page() -> None:
    journal = Journal(1000, SIZE_DEFAULT)
    for number in range(50):
        _ = _said(journal, 1 + number % 2, f"{number}")
    large = packed(line("\n" * TEXT_SIZE_MAX))
    _ = journal.append(sender(3), [large] * PAGE_MAX, Row(ServiceId(3), 1), Nanos(0), 0)

    latest = journal.last_of(1, 101, 1, 3)
    fewer = journal.last_of(3, 103, 1, PAGE_MAX)

    assert [record.text for record in latest] == ["44", "46", "48"]
    assert 0 < len(fewer) < PAGE_MAX
    assert fewer[-1].record == journal.last
    assert journal.last_of(1, 101, 2, 3) == []


def test_a_smaller_ring_keeps_the_latest() -> None:
    journal = Journal(100, SIZE_DEFAULT)
    for _ in range(100):
        _ = add(journal)

    journal.resize(10, SIZE_MIN)

    assert paged(journal) == list(range(91, 101))


# ------------------------------------------------------------------ the senders


def test_the_25th_record_of_a_window_is_over_the_rate_and_refusals_use_up_nothing() -> None:
    row = Row(PEER, RATE_MAX)
    start = 5_000
    for _ in range(RATE_MAX):
        assert not row.is_over_rate(Nanos(start))
        row.on_accepted()

    for _ in range(3):
        assert row.is_over_rate(Nanos(start + RATE_WINDOW_NS - 1))
        row.on_refused(LogdStatus.RATE_LIMITED)

    assert not row.is_over_rate(Nanos(start + RATE_WINDOW_NS))
    assert (row.accepted, row.rate_limited) == (RATE_MAX, 3)


def test_the_rate_is_each_senders_own_and_core_senders_have_another() -> None:
    senders = Senders({ServiceId(1)}, core_rate=3, rate=2)
    accepted: Counter[int] = Counter()

    for service in (1, 2, 3) * 5:
        row = senders.heard(ServiceId(service))
        if not row.is_over_rate(Nanos(0)):
            row.on_accepted()
            accepted[service] += 1

    assert accepted == {1: 3, 2: 2, 3: 2}


def test_the_65th_sender_is_heard_and_the_one_silent_for_longest_gives_way() -> None:
    senders = Senders({ServiceId(1)})
    for service in range(1, SENDER_ROWS_MAX + 1):
        senders.heard(ServiceId(service)).on_accepted()
    _ = senders.heard(ServiceId(2))

    senders.heard(ServiceId(1000)).on_accepted()

    services = [row.service for row in senders.rows()]
    assert services == [OTHERS, 1, 2, *range(4, SENDER_ROWS_MAX + 1), 1000]
    assert senders.rows()[0].accepted == 1
    assert senders.totals().accepted == SENDER_ROWS_MAX + 1


def test_records_of_a_folded_sender_are_counted_where_it_went_also_if_it_comes_back() -> None:
    journal = Journal(3, SIZE_MIN)
    senders = Senders()

    def send(service: int) -> None:
        row = senders.heard(ServiceId(service))
        row.on_accepted()
        _ = put(journal, sender(service), line(), row, 0)

    send(1)
    send(1)
    for service in range(2, SENDER_ROWS_MAX + 2):
        _ = senders.heard(ServiceId(service))
    send(1)
    send(1)

    rows = {row.service: row for row in senders.rows()}
    assert (rows[OTHERS].accepted, rows[OTHERS].overwritten) == (2, 1)
    assert (rows[ServiceId(1)].accepted, rows[ServiceId(1)].overwritten) == (2, 0)


# ------------------------------------------------------------------ all of it beside a simple model


class JournalBesideAModel(RuleBasedStateMachine):
    """Small rings, few senders, a table that folds early: every edge is met often."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(5, SIZE_MIN)
        self.senders = Senders({ServiceId(1)}, core_rate=9, rate=3)
        self.everything: list[tuple[int, str]] = []
        self.kept: list[tuple[int, int, int]] = []  # id, service, size
        self.sent: Counter[int] = Counter()
        self.now = 0

    @rule(service=st.integers(1, 90), size=st.integers(0, 2 * TEXT_SIZE_MAX), control=st.booleans())
    def append(self, service: int, size: int, control: bool) -> None:
        request = line(("\n" if control else "x") * size)
        row = self.senders.heard(ServiceId(service))
        self.sent[service] += 1
        if is_over_limit(request):
            row.on_refused(LogdStatus.OVER_LIMIT)
        elif row.is_over_rate(Nanos(self.now)):
            row.on_refused(LogdStatus.RATE_LIMITED)
        else:
            row.on_accepted()
            record = put(self.journal, sender(service), request, row, self.now)
            self.everything.append((service, request.text))
            assert record == len(self.everything)
            size = size_of(request)
            while len(self.kept) >= 5 or sum(each[2] for each in self.kept) + size > SIZE_MIN:
                self.kept.remove(self.next_out())
            self.kept.append((record, service, size))

    def next_out(self) -> tuple[int, int, int]:
        """By the rule of the ring: of who has more than three quarters, or the oldest of all."""
        for each in self.kept:
            sizes = [size for _, service, size in self.kept if service == each[1]]
            if 4 * len(sizes) > 3 * 5 or 4 * sum(sizes) > 3 * SIZE_MIN:
                return each
        return self.kept[0]

    @rule(service=st.sampled_from([1, 2]), count=st.integers(1, 12))
    def burst(self, service: int, count: int) -> None:
        for _ in range(count):
            self.append(service, 3, control=False)

    @rule(wait=st.integers(0, 2 * RATE_WINDOW_NS))
    def time_passes(self, wait: int) -> None:
        self.now += wait

    @invariant()
    def the_ring_holds_what_the_rule_says(self) -> None:
        kept = len(self.journal)
        assert kept <= 5
        assert self.journal.size <= self.journal.size_max
        ids = paged(self.journal)
        assert ids == [each[0] for each in self.kept]
        assert kept == len(ids)
        records = [page(self.journal, number, count=1).records[0] for number in ids]
        assert [(each.service, unescaped(each.text)) for each in records] == [
            self.everything[number - 1] for number in ids
        ]
        assert [each.at for each in records] == sorted({each.at for each in records})

    @invariant()
    def every_row_adds_up(self) -> None:
        held: Counter[int] = Counter()
        for chunk in self.journal._chunks:
            held[chunk.row.current.service] += len(chunk.payloads) - chunk.start
        rows = self.senders.rows()
        for row in rows:
            assert row.accepted == held[row.service] + row.overwritten
            if row.service != OTHERS and len(rows) == len(self.senders):
                refused = row.invalid_args + row.over_limit + row.rate_limited
                assert row.accepted + refused == self.sent[row.service]
        totals = self.senders.totals()
        assert totals.accepted == self.journal.total == len(self.everything)
        assert totals.overwritten == self.journal.dropped
        refused = totals.invalid_args + totals.over_limit + totals.rate_limited
        assert totals.accepted + refused == self.sent.total()
        assert len(self.senders) <= SENDER_ROWS_MAX


TestJournalBesideAModel = JournalBesideAModel.TestCase


# ------------------------------------------------------------------ settings


def test_the_settings_of_the_system_file_are_read() -> None:
    settings = msgspec.convert(
        {"records": 10, "size": "64KiB", "core": "policyd execd", "core_rate": 99}, type=Settings
    )

    assert settings.size_bytes == 64 * 1024
    assert settings.core_ids == {service_id("policyd"), service_id("execd")}
    assert Settings().size_bytes == SIZE_DEFAULT


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"records": 0}, "records is 0: from 1 to"),
        ({"size": 12}, f"size is 12: from {SIZE_MIN} to"),
        ({"size": "12KB"}, 'size is "12KB": say it as'),
        ({"core_rate": 0}, "core_rate is 0"),
        ({"core": " ".join(f"s{n}" for n in range(40))}, "number of names in core is 40"),
        ({"volume": 1}, "unknown field `volume`"),
    ],
)
def test_settings_out_of_bounds_are_a_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=sentence.replace("(", r"\(")):
        _ = msgspec.convert(values, type=Settings)
