"""Who has how much of policyd's audit: places of one's own, a rate, and sums that leave no gap."""

from collections import Counter
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nexus.abi import INIT_NAME, Nanos, ServiceId, service_id
from nexus.services.policyd.judge import INIT
from nexus.services.policyd.shares import (
    ASKERS_MAX,
    INITS,
    OTHERS,
    RELOADS,
    WINDOW,
    Kind,
    Settings,
    Share,
    Shares,
    Suppressed,
)

SMALL: Final = Settings(audit_rate=3, audit_places=2)
START: Final = Nanos(1_000)


def share_of(audit: Settings, name: str = "app") -> Share:
    return Shares(audit).of(service_id(name), name)


def told(share: Share, kind: Kind, number: int, now: Nanos) -> Kind | None:
    """As the audit does it."""
    taken = share.take(kind, now)
    if taken is None:
        share.suppress(kind, number, denied=False)
    return taken


def test_places_are_free_again_once_given_back_and_the_rate_only_with_the_next_window() -> None:
    share = share_of(Settings(audit_rate=2, audit_places=1))

    assert share.take(Kind.DECISION, START) is Kind.DECISION
    assert share.take(Kind.DECISION, START) is None, "no place"
    share.give_back(Kind.DECISION)
    assert share.take(Kind.DECISION, START) is Kind.DECISION
    share.give_back(Kind.DECISION)
    assert share.take(Kind.DECISION, Nanos(START + WINDOW - 1)) is None, "over the rate"
    assert share.take(Kind.DECISION, Nanos(START + WINDOW)) is Kind.DECISION


def test_while_a_sum_grows_everything_goes_into_it_though_there_is_room() -> None:
    share = share_of(Settings(audit_rate=10, audit_places=1))
    _ = told(share, Kind.DECISION, 1, START)
    _ = told(share, Kind.DECISION, 2, START)
    share.give_back(Kind.DECISION)

    assert told(share, Kind.DECISION, 3, START) is None
    closed = share.close(Nanos(START + WINDOW))
    assert closed is not None
    assert (closed.first, closed.last, closed.count) == (2, 3, 2)
    assert told(share, Kind.DECISION, 4, Nanos(START + WINDOW)) is Kind.DECISION


def test_a_sum_of_malformed_requests_alone_keeps_no_decision_from_its_record() -> None:
    share = share_of(SMALL)
    _ = share.take(Kind.MALFORMED, START)
    share.suppress(Kind.MALFORMED, 0, denied=True)

    assert share.take(Kind.DECISION, START) is Kind.DECISION


def test_a_second_sum_waits_until_the_first_is_in_the_journal() -> None:
    share = share_of(Settings(audit_rate=1, audit_places=1))
    later = Nanos(START + WINDOW)
    for number in (1, 2):
        _ = told(share, Kind.DECISION, number, START)
    first = share.close(later)
    _ = told(share, Kind.DECISION, 3, later)

    assert first is not None
    assert share.due is None
    assert share.close(Nanos(later + 9 * WINDOW)) is None
    share.give_back(Kind.SUM)
    second = share.close(Nanos(later + 9 * WINDOW))
    assert second is not None
    assert (second.first, second.last) == (3, 3)


def test_a_reload_has_places_of_its_own_then_those_of_its_asker() -> None:
    share = share_of(Settings(audit_rate=10, audit_places=1))

    taken = [share.take(Kind.RELOAD, START) for _ in range(RELOADS.places + 2)]

    assert taken == [*[Kind.RELOAD] * RELOADS.places, Kind.DECISION, None]


def test_init_has_a_share_of_its_own_whoever_asked_before() -> None:
    shares = Shares(SMALL)
    strangers = [shares.of(ServiceId(number), f"0x{number:x}") for number in range(1, 200)]

    init = shares.of(INIT, INIT_NAME)

    assert len(set(map(id, strangers))) == ASKERS_MAX, "with the one of all others"
    assert strangers[-1].name == OTHERS
    assert init not in strangers
    assert init.limits[Kind.DECISION] == INITS
    assert shares.of(ServiceId(1), "") is strangers[0]


def test_only_what_happened_stands_in_the_record_of_a_sum() -> None:
    summed = Suppressed(START)
    summed.add(Kind.DECISION, 7, denied=True)
    summed.add(Kind.RELOAD, 9, denied=False)
    summed.add(Kind.MALFORMED, 0, denied=True)

    assert summed.fields("app") == {
        "op": "suppressed",
        "asked_by": "app",
        "count": "2",
        "first": "7",
        "last": "9",
        "allowed": "1",
        "denied": "1",
        "reloads": "1",
        "malformed": "1",
    }


@pytest.mark.parametrize("name", ["audit_rate", "audit_places"])
def test_a_setting_has_bounds(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0: from 1 to"):
        _ = Settings(**{name: 0})


class Telling(RuleBasedStateMachine):
    """Two askers, time that passes, and a logd that takes what it likes: each is told once."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares(SMALL)
        self.now = START
        self.asked: dict[int, str] = {}  # decisions that are no reloads
        self.own: set[int] = set()
        self.sums: list[tuple[str, Suppressed]] = []
        self.since: dict[str, Nanos] = {}  # when the growing sum of an asker began
        self.waiting: list[tuple[Share, Kind]] = []

    @rule(name=st.sampled_from(["app", "other"]), kind=st.sampled_from(list(Kind)[:3]))
    def ask(self, name: str, kind: Kind) -> None:
        share = self.shares.of(service_id(name), name)
        number = 0
        if kind is Kind.DECISION:
            number = len(self.asked) + 1
            self.asked[number] = name
        elif kind is Kind.RELOAD and share.waiting[kind] >= RELOADS.places:
            return
        taken = share.take(kind, self.now)
        if taken is not None:
            self.waiting.append((share, taken))
            self.own |= {number} - {0}
        elif kind is not Kind.RELOAD:
            share.suppress(kind, number, denied=False)
            _ = self.since.setdefault(name, self.now)

    @rule(span=st.sampled_from([1, WINDOW // 3, WINDOW]))
    def pass_time(self, span: int) -> None:
        self.now = Nanos(self.now + span)

    @rule()
    def close(self) -> None:
        for share in self.shares.growing():
            closed = share.close(self.now)
            if closed is not None:
                assert self.now >= closed.due
                self.sums.append((share.name, closed))
                self.waiting.append((share, Kind.SUM))
                del self.since[share.name]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.waiting) - 1))
        share, kind = self.waiting.pop(index)
        share.give_back(kind)

    @invariant()
    def each_is_told_once(self) -> None:
        told = Counter(self.own)
        growing = [(each.name, each.growing) for each in map(self._share, ("app", "other"))]
        for name, summed in [*self.sums, *growing]:
            if summed is None or not summed.count:
                continue
            inside = [n for n in range(summed.first, summed.last + 1) if self.asked.get(n) == name]
            assert len(inside) == summed.count
            told.update(inside)
        assert told == dict.fromkeys(self.asked, 1)

    @invariant()
    def what_waits_is_bounded(self) -> None:
        for (share, kind), count in Counter(self.waiting).items():
            assert count == share.waiting[kind]
            assert count <= (1 if kind is Kind.SUM else share.limits[kind].places)

    @invariant()
    def a_sum_is_due_a_second_after_its_first_at_the_latest(self) -> None:
        for name, since in self.since.items():
            growing = self._share(name).growing
            assert growing is not None
            assert since < growing.due <= since + WINDOW

    def _share(self, name: str) -> Share:
        return self.shares.of(service_id(name), name)


TestTelling = Telling.TestCase
TestTelling.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
