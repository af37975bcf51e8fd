"""The checks of logs, metrics and spans on what a real run of three boots left behind: true
evidence passes, and each way to lie in one place is found."""

import dataclasses
import zlib
from base64 import b64decode, b64encode
from typing import Any

import pytest

from nexus.abi import Event, EventKind
from nexus.proof.prove import Outcome
from nexus.proof.remains import Remains
from nexus.proof.verdict import Mismatch
from nexus.protocols.ladder import SELFTEST
from nexus.services.metricsd.wal import ROOT
from tests.fakes.told import Change, ChangeLeft, Told

NUMBERS = (11, 12, 31, 111, 112, 113, 114, 115, *range(118, 129))
METRICSD = "metricsd"
HEALTH = "init: health metricsd ok"
COUNTER = "selftest.counter"
LEVEL = "selftest.level"

pytestmark = [pytest.mark.sim, pytest.mark.slow]


@pytest.mark.parametrize("number", NUMBERS)
def test_true_evidence_passes(outcome: Outcome, number: int) -> None:
    Told(outcome, number).check()


def _fact(name: str, value: int) -> Change:
    return lambda evidence: evidence["facts"].update({name: value})


def _page(change: Any) -> Change:
    """Another word in the page that came with the evidence, at the place of the gauge."""

    def changed(evidence: dict[str, Any]) -> None:
        page = bytearray(zlib.decompress(b64decode(evidence["page"])))
        change(page, evidence["word"])
        evidence["page"] = b64encode(zlib.compress(bytes(page))).decode()

    return changed


def _other_word(page: bytearray, word: int) -> None:
    at = 64 + 8 * word
    page[at : at + 8] = (3).to_bytes(8, "little", signed=True)


def _no_magic(page: bytearray, _word: int) -> None:
    page[:8] = bytes(8)


LIES: tuple[tuple[int, Change], ...] = (
    (12, lambda e: e.update(generation=2)),
    (12, lambda e: e.update(pid=e["pid"] + 1)),
    (12, lambda e: e.update(service="00" * 8)),
    (31, lambda e: e.update(sink="console")),
    (111, lambda e: e.update(reason="over_limit")),
    (112, lambda e: e.update(sender="00" * 8)),
    (114, lambda e: e.update(record=0)),
    (114, lambda e: e["shapes"].update({"no ring": "OK"})),
    (114, lambda e: e["shapes"].update({"too large": "INVALID_ARGS"})),
    (114, lambda e: e["growth"].update(over_limit=0)),
    (114, lambda e: e["opened"]["statuses"].__setitem__(-1, "OK")),
    (114, lambda e: e["opened"].update(took_ns=2_000_000_000)),
    (114, lambda e: e["opened"].update(rate_limited=0)),
    (114, lambda e: e["streams"].__setitem__(1, e["streams"][0] + 1)),
    (115, lambda e: e["growth"].update(unread=e["growth"]["unread"] - 1)),
    (115, lambda e: e["growth"].update(unread=0, accepted=e["sent"])),
    (115, lambda e: e["growth"].update(damaged=1, accepted=e["growth"]["accepted"] - 1)),
    (115, lambda e: e["drained"].__setitem__(2, e["drained"][2] - 1)),
    (115, lambda e: e["totals"].__setitem__(2, 0)),
    (115, lambda e: e.update(foreign=0)),
    (115, lambda e: e["older"].__setitem__(2, e["older"][0] + 1)),
    (118, lambda e: e["probes"].pop("statefsd")),
    (118, lambda e: e["probes"]["timed"].update(service=e["probes"]["policyd"]["service"])),
    (118, lambda e: e["probes"]["timed"].update(growth=0)),
    (118, lambda e: e["probes"]["policyd"].update(pid=1)),
    (118, lambda e: e["probes"]["policyd"].update(record=e["probes"]["timed"]["record"])),
    (119, lambda e: e.update(reason="rate_limited")),
    (120, lambda e: e.update(reason="rate_limited")),
    (121, lambda e: e.update(sender="0x0000000000000001")),
    (122, lambda e: e["statuses"].__setitem__(1, "NOT_FOUND")),
    (122, lambda e: e["series"].__setitem__(1, 0)),
    (122, lambda e: e["span"].__setitem__(1, "TIMED_OUT")),
    (122, lambda e: e["stray"].__setitem__(1, e["stray"][0])),
    (122, lambda e: e["seen"].append(7)),
    (122, lambda e: e.update(looked_at=0)),
    (123, lambda e: e.update(value=3)),
    (123, lambda e: e["added"].__setitem__(1, 5)),
    (123, lambda e: e.update(sender="00" * 8)),
    (123, lambda e: e["fields"].update(value="3")),
    (123, lambda e: e["fields"].update(owner="0x0000000000000001")),
    (123, lambda e: e["fields"].update(series="0")),
    (124, lambda e: e["values"].__setitem__(1, 5)),
    (124, lambda e: e["set"].__setitem__(1, 3)),
    (124, lambda e: e.update(word=1 << 20)),
    (124, lambda e: e.update(page="no page")),
    (124, _page(_other_word)),
    (124, _page(_no_magic)),
    (125, lambda e: e["buckets"].__setitem__(0, 2)),
    (125, lambda e: e["bounds"].__setitem__(0, 1)),
    (125, lambda e: e.update(sum=e["sum"] + 1)),
    (125, lambda e: e.update(snapshots=999)),
    (125, lambda e: e.update(different=1)),
    (125, lambda e: e.update(wrong=1)),
    (125, lambda e: e["halted"].clear()),
    (125, lambda e: e["halted"][0].__setitem__(0, 6)),
    (125, lambda e: e["halted"][1].__setitem__(2, e["halted"][1][2] + 1)),
    (125, lambda e: e.update(written=e["written"] + 1)),
    (125, lambda e: e.update(torn=0)),
    (126, lambda e: e["own"].update(end=0)),
    (126, lambda e: e["own"].update(end=e["own"]["start"] + 4_999_999)),
    (126, lambda e: e["child"].update(parent="00" * 8)),
    (126, lambda e: e["child"].update(trace="00" * 16)),
    (126, lambda e: e["child"].update(service=e["own"]["service"])),
    (126, lambda e: e["child"].update(pid=1)),
    (126, lambda e: e["child"].update(start=e["own"]["start"] - 1)),
    (126, lambda e: e["own"].update(status="LOST")),
    (126, lambda e: e.update(woken=e["asked"][1] - 1)),
    (127, lambda e: e.update(store_sequence=0)),
    (127, lambda e: e.update(store_sequence=1 << 40)),
    (127, lambda e: e.update(key=f"{ROOT}wear")),
    (128, lambda e: e.update(generations=[1, 3])),
    (128, lambda e: e.update(value=4)),
    (128, lambda e: e.update(recovery_lost=1)),
    (128, lambda e: e["lengths"].__setitem__(0, 1)),
    (128, lambda e: e["after"][COUNTER]["short"].pop()),
    (128, lambda e: e["after"][LEVEL]["long"].clear()),
    (128, lambda e: e["before"][COUNTER]["long"].clear()),
    (128, lambda e: e["bounds"][0].__setitem__(0, e["bounds"][0][1] + 1)),
    (128, lambda e: e["bounds"][2].__setitem__(3, e["bounds"][2][4] + 1)),
    (128, lambda e: e["bounds"][1].__setitem__(5, e["bounds"][1][6] + 1)),
)


@pytest.mark.parametrize(("number", "lie"), LIES)
def test_each_lie_in_the_evidence_is_found(outcome: Outcome, number: int, lie: Change) -> None:
    told = Told(outcome, number)

    told.say(lie)

    with pytest.raises(Mismatch):
        told.check()


def _in_both(name: str, resolution: str, index: int, value: int) -> Change:
    """The same lie about a window before and after metricsd's death."""

    def changed(evidence: dict[str, Any]) -> None:
        for when in ("before", "after"):
            evidence[when][name][resolution][0][index] = value

    return changed


@pytest.mark.parametrize("resolution", ["short", "long"])
@pytest.mark.parametrize("index", [1, 2, 3, 4, 5])
def test_a_window_that_does_not_add_up_is_found(
    outcome: Outcome, resolution: str, index: int
) -> None:
    told = Told(outcome, 128)

    told.say(_in_both(COUNTER, resolution, index, 99))

    with pytest.raises(Mismatch):
        told.check()


@pytest.mark.parametrize("index", [2, 3, 4, 5])
def test_a_window_of_a_gauge_that_does_not_add_up_is_found(outcome: Outcome, index: int) -> None:
    told = Told(outcome, 128)

    told.say(_in_both(LEVEL, "long", index, 99))

    with pytest.raises(Mismatch):
        told.check()


MEASURED: tuple[tuple[int, int, Change], ...] = (
    (111, 111, lambda e: e.update(status="OK")),
    (111, 111, lambda e: e.update(ids=1)),
    (112, 112, lambda e: e["statuses"].__setitem__(1, "OK")),
    (113, 113, lambda e: e["statuses"].__setitem__(-1, "OK")),
    (113, 113, lambda e: e["policyd"].update(rate_limited=1)),
    (114, 113, lambda e: e["statuses"].__setitem__(-1, "OK")),
    (119, 119, lambda e: e["statuses"].__setitem__(0, "OK")),
    (119, 119, lambda e: e["growth"].update(invalid_args=1)),
    (119, 119, lambda e: e["series"].__setitem__(2, 1)),
    (119, 119, lambda e: e["spans"].__setitem__(1, e["spans"][0] + 1)),
    (119, 119, lambda e: e["maker"].__setitem__(1, "00" * 8)),
    (120, 120, lambda e: e["statuses"].__setitem__(16, "OK")),
    (120, 120, lambda e: e["statuses"].__setitem__(15, "OVER_LIMIT")),
    (120, 120, lambda e: e["values"].pop()),
    (120, 120, lambda e: e["refused"].__setitem__(1, e["refused"][0])),
    (120, 120, lambda e: e.update(per_metric=17)),
    (121, 121, lambda e: e.update(refused_from=65)),
    (121, 121, lambda e: e.update(took_ns=1_000_000_000)),
    (121, 121, lambda e: e["statuses"]["open"].__setitem__(-1, "OK")),
    (121, 121, lambda e: e.update(other=18)),
    (122, 120, lambda e: e["statuses"].__setitem__(16, "OK")),
    (127, 127, lambda e: e["keys"].clear()),
    (127, 127, lambda e: e["ops"].clear()),
    (127, 127, lambda e: e.update(senders=[])),
)


@pytest.mark.parametrize(("number", "measured", "lie"), MEASURED)
def test_what_the_client_measured_otherwise_is_found(
    outcome: Outcome, number: int, measured: int, lie: Change
) -> None:
    told = Told(outcome, number)

    told.say(lie, f"{SELFTEST}: measured #{measured}")

    with pytest.raises(Mismatch):
        told.check()


@pytest.mark.parametrize(
    "limit", ["series_max", "series_per_metric_max", "spans_open_max", "rate_max", "log_sink_logd"]
)
def test_limits_that_are_not_the_files_are_found(outcome: Outcome, limit: str) -> None:
    told = Told(outcome, 31)

    told.say(_fact(limit, 7), HEALTH)

    with pytest.raises(Mismatch):
        told.check()


def _segments(left: Remains, change: Any) -> Remains:
    records = {
        key: change(kept) if key.startswith(f"{ROOT}wal/".encode()) else kept
        for key, kept in left.records.items()
    }
    return dataclasses.replace(left, records={key: kept for key, kept in records.items() if kept})


DISKS: tuple[ChangeLeft, ...] = (
    lambda left: dataclasses.replace(left, problem="there is none"),
    lambda left: _segments(left, lambda _kept: None),
    lambda left: _segments(left, lambda kept: kept._replace(value=b"no segment")),
    lambda left: _segments(left, lambda kept: kept._replace(value=kept.value[:-1])),
    lambda left: _segments(left, lambda kept: kept._replace(sequence=0)),
)


@pytest.mark.parametrize("change", DISKS)
def test_a_disk_without_the_segments_is_found(outcome: Outcome, change: ChangeLeft) -> None:
    told = Told(outcome, 127)

    told.leave(change, told.boot)

    with pytest.raises(Mismatch):
        told.check()


def _ends_of_metricsd(event: Event) -> bool:
    return event.kind is EventKind.EXIT and event.fields.get("name") == METRICSD


def test_a_metricsd_that_never_died_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 128)

    told.without(_ends_of_metricsd)

    with pytest.raises(Mismatch, match="has not ended"):
        told.check()
