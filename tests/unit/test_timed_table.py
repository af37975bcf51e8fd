"""The timer table of timed: limits, coalescing, firing, and who may touch what."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nexus.abi import LinkId, Nanos, QosClass, ServiceId
from nexus.protocols.timed import (
    AHEAD_MAX,
    TIMER_ID_MAX,
    TIMERS_MAX,
    TIMERS_PER_OWNER_MAX,
    WINDOWS,
    TimedStatus,
)
from nexus.services.timed.table import (
    KEPT_PER_OWNER_MAX,
    Entry,
    Owner,
    TimerTable,
    coalesce,
)

MS = 1_000_000
ANN = Owner(ServiceId(1), 1)
BOB = Owner(ServiceId(2), 1)
LINK = LinkId(7)
OTHER_LINK = LinkId(8)


def added(result: Entry[str] | TimedStatus) -> Entry[str]:
    assert isinstance(result, Entry)
    return result


def register(
    table: TimerTable[str], owner: Owner, deadline: int, *, link: LinkId = LINK
) -> Entry[str]:
    return added(table.add(owner, link, Nanos(deadline), Nanos(deadline), Nanos(0)))


@pytest.mark.parametrize(
    ("qos", "deadline", "expected"),
    [
        (QosClass.NORMAL, 10_000_001, 12 * MS),
        (QosClass.NORMAL, 12 * MS, 12 * MS),
        (QosClass.IDLE, 1, 8 * MS),
        (QosClass.INTERACTIVE, 20_500_000, 21 * MS),
        (QosClass.PERF_BURST, 20_500_001, 20_500_001),
        (QosClass.NORMAL, 0, 0),
    ],
)
def test_a_deadline_is_rounded_up_to_the_window_of_its_class(
    qos: QosClass, deadline: int, expected: int
) -> None:
    assert coalesce(Nanos(deadline), WINDOWS[qos]) == expected


def test_a_65th_timer_of_one_owner_is_refused_and_another_owner_is_served() -> None:
    table: TimerTable[str] = TimerTable()
    for _ in range(TIMERS_PER_OWNER_MAX):
        register(table, ANN, 5)

    refused = table.add(ANN, LINK, Nanos(5), Nanos(5), Nanos(0))

    assert refused is TimedStatus.OVER_LIMIT
    assert table.owned(ANN) == TIMERS_PER_OWNER_MAX
    register(table, BOB, 5)


def test_a_1025th_timer_of_all_owners_is_refused() -> None:
    table: TimerTable[str] = TimerTable()
    owners = [Owner(ServiceId(100 + index), 1) for index in range(17)]
    for index in range(TIMERS_MAX):
        register(table, owners[index // TIMERS_PER_OWNER_MAX], 5)

    refused = table.add(owners[16], LINK, Nanos(5), Nanos(5), Nanos(0))

    assert refused is TimedStatus.OVER_LIMIT
    assert len(table) == TIMERS_MAX


def test_a_deadline_more_than_an_hour_ahead_is_refused() -> None:
    table: TimerTable[str] = TimerTable()
    now = Nanos(1000)

    at_limit = table.add(ANN, LINK, Nanos(now + AHEAD_MAX), Nanos(now + AHEAD_MAX), now)
    beyond = table.add(ANN, LINK, Nanos(now + AHEAD_MAX + 1), now, now)

    assert isinstance(at_limit, Entry)
    assert beyond is TimedStatus.INVALID_ARGS


def test_a_deadline_in_the_past_is_due_at_once() -> None:
    table: TimerTable[str] = TimerTable()
    entry = added(table.add(ANN, LINK, Nanos(5), Nanos(5), Nanos(1000)))

    assert table.due(Nanos(1000)) == [entry]
    assert len(table) == 0


def test_only_the_owner_may_cancel_a_timer() -> None:
    table: TimerTable[str] = TimerTable()
    entry = register(table, ANN, 5)

    assert table.cancel(BOB, entry.timer_id) is None
    assert table.cancel(Owner(ANN.service, 2), entry.timer_id) is None
    assert table.cancel(ANN, 999) is None
    assert table.cancel(ANN, entry.timer_id) is entry
    assert table.cancel(ANN, entry.timer_id) is None


def test_a_sleep_cannot_be_cancelled_or_waited_for_by_a_guessed_id() -> None:
    table: TimerTable[str] = TimerTable()
    sleep = added(table.add(ANN, LINK, Nanos(5), Nanos(5), Nanos(0), sleeper="ann"))

    assert table.cancel(ANN, sleep.timer_id) is None
    assert table.find(ANN, sleep.timer_id) is None
    assert table.owned(ANN) == 1
    assert table.sleepers == 1


def test_nothing_fires_before_its_deadline_and_the_earliest_fires_first() -> None:
    table: TimerTable[str] = TimerTable()
    late = register(table, ANN, 30)
    early = register(table, BOB, 10)

    assert table.due(Nanos(9)) == []
    assert table.next_time() == 10
    assert table.due(Nanos(30)) == [early, late]
    assert table.next_time() is None


def test_a_cancelled_timer_never_fires() -> None:
    table: TimerTable[str] = TimerTable()
    entry = register(table, ANN, 10)
    table.cancel(ANN, entry.timer_id)

    assert table.next_time() is None
    assert table.due(Nanos(10)) == []


def test_a_firing_nobody_waited_for_is_kept_and_given_once_to_its_owner() -> None:
    table: TimerTable[str] = TimerTable()
    entry = register(table, ANN, 10)
    for fired in table.due(Nanos(12)):
        table.keep(fired, Nanos(12))

    assert table.take_kept(BOB, entry.timer_id) is None
    firing = table.take_kept(ANN, entry.timer_id)
    assert firing is not None
    assert (firing.deadline, firing.now) == (10, 12)
    assert table.take_kept(ANN, entry.timer_id) is None
    assert table.owners == 0


def test_kept_firings_are_bounded_and_the_oldest_gives_way() -> None:
    table: TimerTable[str] = TimerTable()
    entries = []
    for index in range(KEPT_PER_OWNER_MAX + 1):
        entries.append(register(table, ANN, index))
        for fired in table.due(Nanos(index)):
            table.keep(fired, Nanos(index))

    assert table.kept == KEPT_PER_OWNER_MAX
    assert table.pushed_out == 1
    assert table.take_kept(ANN, entries[0].timer_id) is None
    assert table.take_kept(ANN, entries[1].timer_id) is not None


def test_a_lost_link_frees_what_was_asked_for_over_it_and_nothing_else() -> None:
    table: TimerTable[str] = TimerTable()
    register(table, ANN, 10)
    kept = register(table, ANN, 1)
    for fired in table.due(Nanos(1)):
        table.keep(fired, Nanos(1))
    stays = register(table, ANN, 20, link=OTHER_LINK)

    table.forget_link(LINK)

    assert table.take_kept(ANN, kept.timer_id) is None
    assert table.due(Nanos(30)) == [stays]


def test_a_new_instance_of_a_service_frees_what_the_old_one_set() -> None:
    table: TimerTable[str] = TimerTable()
    table.meet(ANN)
    register(table, ANN, 10)
    bobs = register(table, BOB, 11)

    table.meet(Owner(ANN.service, 2))

    assert table.owned(ANN) == 0
    assert table.due(Nanos(30)) == [bobs]


def test_ids_are_never_0_and_never_those_of_something_alive_or_kept() -> None:
    table: TimerTable[str] = TimerTable()
    table._last_id = TIMER_ID_MAX - 1
    last = register(table, ANN, 10)
    first = register(table, ANN, 0)
    for fired in table.due(Nanos(0)):
        table.keep(fired, Nanos(0))
    table._last_id = TIMER_ID_MAX - 1

    next_id = register(table, ANN, 10).timer_id

    assert (last.timer_id, first.timer_id, next_id) == (TIMER_ID_MAX, 1, 2)


def test_cancelled_timers_do_not_pile_up_in_the_heap() -> None:
    table: TimerTable[str] = TimerTable()
    keeper = register(table, BOB, 1)
    for _ in range(5000):
        table.cancel(ANN, register(table, ANN, 100).timer_id)

    assert len(table._heap) <= TIMERS_MAX + 2
    assert table.next_time() == 1
    assert table.due(Nanos(1)) == [keeper]


class TimerTableMachine(RuleBasedStateMachine):
    """The table beside a dumb list that is searched from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.table: TimerTable[str] = TimerTable()
        self.now = 0
        self.live: list[Entry[str]] = []
        self.newest: dict[ServiceId, int] = {}

    owners = st.builds(Owner, st.sampled_from([ServiceId(1), ServiceId(2)]), st.integers(1, 2))
    links = st.sampled_from([LinkId(1), LinkId(2)])

    def met(self, owner: Owner) -> None:
        self.table.meet(owner)
        if self.newest.get(owner.service, 0) < owner.generation:
            self.newest[owner.service] = owner.generation
            self.live = [
                each
                for each in self.live
                if each.owner.service != owner.service or each.owner.generation >= owner.generation
            ]

    @rule(
        owner=owners,
        link=links,
        ahead=st.integers(-5, 20),
        window=st.sampled_from([0, 1, 4]),
        sleeper=st.sampled_from([None, "someone"]),
    )
    def add(self, owner: Owner, link: LinkId, ahead: int, window: int, sleeper: str | None) -> None:
        self.met(owner)
        deadline = Nanos(max(0, self.now + ahead))
        fires = coalesce(deadline, Nanos(window))
        result = self.table.add(owner, link, deadline, fires, Nanos(self.now), sleeper=sleeper)
        if sum(each.owner == owner for each in self.live) >= TIMERS_PER_OWNER_MAX:
            assert result is TimedStatus.OVER_LIMIT
            return
        entry = added(result)
        assert entry.deadline >= deadline
        assert entry.deadline - deadline < max(1, window)
        assert entry.timer_id not in {0, *(each.timer_id for each in self.live)}
        self.live.append(entry)

    @rule(owner=owners, index=st.integers(0, 10))
    def cancel(self, owner: Owner, index: int) -> None:
        timer_id = self.live[index].timer_id if index < len(self.live) else 12345
        expected = next(
            (e for e in self.live if e.timer_id == timer_id and e.owner == owner and not e.sleeps),
            None,
        )

        assert self.table.cancel(owner, timer_id) is expected
        if expected is not None:
            self.live.remove(expected)

    @rule(link=links)
    def lose_link(self, link: LinkId) -> None:
        self.table.forget_link(link)
        self.live = [each for each in self.live if each.link != link]

    @rule(passed=st.integers(0, 12))
    def fire(self, passed: int) -> None:
        self.now += passed
        fired = self.table.due(Nanos(self.now))

        assert sorted(e.timer_id for e in fired) == sorted(
            e.timer_id for e in self.live if e.deadline <= self.now
        )
        assert [e.deadline for e in fired] == sorted(e.deadline for e in fired)
        self.live = [each for each in self.live if each.deadline > self.now]

    @invariant()
    def table_and_list_agree(self) -> None:
        assert len(self.table) == len(self.live)
        deadlines = [each.deadline for each in self.live]
        assert self.table.next_time() == (min(deadlines) if deadlines else None)
        for owner in {each.owner for each in self.live}:
            assert self.table.owned(owner) == sum(each.owner == owner for each in self.live)


TestTimerTable = TimerTableMachine.TestCase
