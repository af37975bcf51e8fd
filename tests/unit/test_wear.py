"""The wear budget: how much may be written in a day, whatever happens in between."""

from hypothesis import given
from hypothesis import strategies as st

from nexus.runtime.wear import BURSTS_PER_DAY, DAY, RESERVED, Spent, WearBudget

START = 1_800_000_000_000_000_000
HOUR = DAY // 24
STEPS = st.lists(
    st.tuples(st.integers(0, 3 * HOUR), st.integers(1, 400), st.booleans(), st.booleans()),
    max_size=120,
)


def test_a_burst_is_an_hours_share_and_a_part_of_it_is_for_what_is_important() -> None:
    budget = WearBudget(bytes_per_day=2400, writes_per_day=2400)

    ordinary = sum(budget.spend(1, START) for _ in range(200))
    important = sum(budget.spend(1, START, important=True) for _ in range(200))

    assert (ordinary, important) == (75, 25)
    assert ordinary + important == budget.burst_size == 2400 // BURSTS_PER_DAY
    assert important == budget.burst_size // RESERVED
    assert budget.refused == 400 - budget.burst_size


def test_writes_are_bounded_as_bytes_are() -> None:
    budget = WearBudget(bytes_per_day=1_000_000, writes_per_day=48)

    assert [budget.spend(1, START, important=True) for _ in range(3)] == [True, True, False]
    assert not budget.has_room(1, START + HOUR // 3, important=True)
    assert budget.has_room(1, START + HOUR, important=True)


def test_who_has_used_up_a_burst_waits_for_the_next_hour_and_not_for_the_next_day() -> None:
    budget = WearBudget(bytes_per_day=2400, writes_per_day=2400)
    while budget.spend(1, START, important=True):
        pass

    later = sum(budget.spend(1, START + HOUR, important=True) for _ in range(200))

    assert 90 <= later <= 100


@given(STEPS)
def test_no_day_sees_more_than_its_budget_whatever_is_asked_for_and_restarted(
    steps: list[tuple[int, int, bool, bool]],
) -> None:
    """A restart makes a new budget of what the last write kept, as a service does."""
    budget = WearBudget(bytes_per_day=4800, writes_per_day=96)
    kept = budget.spent(START)
    now = START
    spent: list[tuple[int, int]] = []
    for pause, size, important, restarts in steps:
        now += pause
        if budget.spend(size, now, important=important):
            spent.append((now, size))
            kept = budget.spent(now)
        if restarts:
            budget = WearBudget(bytes_per_day=4800, writes_per_day=96)
            budget.restore(kept)

    for begin, _ in spent:
        day = [size for at, size in spent if begin <= at < begin + DAY]
        assert sum(day) <= 4800
        assert len(day) <= 96


def test_what_was_spent_survives_a_restart_also_when_it_is_read_late() -> None:
    first = WearBudget(bytes_per_day=2400, writes_per_day=2400)
    while first.spend(1, START, important=True):
        pass

    second = WearBudget(bytes_per_day=2400, writes_per_day=2400)
    early = second.spend(10, START + 1)
    second.restore(first.spent(START))

    assert early
    assert not second.spend(1, START + 2, important=True)
    assert second.written_today(START + 2) == 110


def test_writes_that_were_spent_survive_a_restart_as_bytes_do() -> None:
    first, second = (WearBudget(bytes_per_day=1_000_000, writes_per_day=48) for _ in range(2))
    assert [first.spend(1, START, important=True) for _ in range(2)] == [True, True]

    second.restore(first.spent(START))

    assert not second.spend(1, START, important=True)
    assert second.spend(1, START + HOUR, important=True)


def test_a_clock_that_is_set_back_pays_nothing_off_and_one_set_forward_a_burst_at_most() -> None:
    budget = WearBudget(bytes_per_day=2400, writes_per_day=2400)
    while budget.spend(1, START, important=True):
        pass

    back = budget.spend(1, START - 10 * DAY, important=True)
    forward = sum(budget.spend(1, START + 10 * DAY, important=True) for _ in range(500))

    assert not back
    assert forward == 100


def test_today_is_the_day_of_the_clock() -> None:
    budget = WearBudget(bytes_per_day=24_000, writes_per_day=24)
    midnight = START // DAY * DAY + DAY

    assert budget.spend(500, midnight - 1)
    before = budget.written_today(midnight - 1)
    after = budget.written_today(midnight)

    assert (before, after) == (500, 0)


def test_what_a_device_says_was_spent_is_a_burst_at_most() -> None:
    budget = WearBudget(bytes_per_day=2400, writes_per_day=2400)

    budget.restore(Spent(START, 1 << 60, 1 << 60, -5, -5))
    full = WearBudget(bytes_per_day=2400, writes_per_day=2400)
    full.restore(Spent(START, 0, 0, (1 << 64) - 1, (1 << 64) - 1))

    assert full.written_today(START) == 2400, "no more than may be"
    assert not budget.spend(1, START, important=True)
    assert budget.spend(50, START + HOUR, important=True)
    assert budget.written_today(START + HOUR) == 50
