"""How much may be written to a device that wears out: bytes and writes per day, across restarts.

    spend: the debt grows by what is written; refused when it would exceed the burst
    time:  the debt is paid off evenly, the rest of a day's allowance in a day

So in any 24 hours at most `bytes_per_day` bytes and `writes_per_day` writes are spent, and who has
used up a burst waits for the next hour and not for the next day. A part of each burst is kept for
what is important. What was spent survives with the data: the owner keeps `spent` beside what it
writes, and hands it to `restore` when it has read it back. The clock is the wall's, because a
restart must not forget; one that is set back pays nothing off, one that is set forward a burst at
most.
"""

from typing import Final

import msgspec

DAY: Final = 86_400_000_000_000  # ns
BURSTS_PER_DAY: Final = 24  # a burst is an hour's share; that much may be written at once
RESERVED: Final = 4  # of a burst, one part in so many is for what is important


class Spent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is to be kept of a budget: the debts, when they were so (wall clock, ns), and what was
    written on that day (UTC)."""

    at: int = 0
    debt_size: int = 0  # bytes
    debt_count: int = 0  # writes
    today_size: int = 0
    today_count: int = 0


class _Allowance:
    """One of the two amounts, in DAYs of it, so that nothing is lost by rounding."""

    def __init__(self, per_day: int) -> None:
        self.burst = max(1, per_day // BURSTS_PER_DAY)
        self._pay = per_day - self.burst  # in a day; with one burst more it is `per_day`
        self.debt = 0  # of what was spent, times DAY

    def pay(self, elapsed: int) -> None:
        """`elapsed` ns have passed."""
        self.debt = max(0, self.debt - elapsed * self._pay)

    def has_room(self, amount: int, burst: int) -> bool:
        """Whether that much more stays inside `burst`."""
        return self.debt + amount * DAY <= burst * DAY

    def owed(self) -> int:
        """The debt, rounded up."""
        return -(-self.debt // DAY)


class WearBudget:
    """The budget of one owner of data on a device; times are wall-clock ns.

    What does not fit is refused and counted, and it is for the owner to try a smaller or a later
    write.
    """

    def __init__(self, bytes_per_day: int, writes_per_day: int) -> None:
        assert bytes_per_day >= BURSTS_PER_DAY, "a burst has a byte at least"
        assert writes_per_day >= 1, "a budget of nothing is no budget"
        self.bytes_per_day = bytes_per_day
        self.writes_per_day = writes_per_day
        self.refused = 0  # writes, in this instance's life
        self._size = _Allowance(bytes_per_day)
        self._count = _Allowance(writes_per_day)
        self._at = 0
        self._today_size = 0
        self._today_count = 0

    @property
    def burst_size(self) -> int:
        """Bytes that one write may have at most."""
        return self._size.burst

    def spend(self, size: int, now: int, *, important: bool = False) -> bool:
        """Whether a write of `size` bytes may be made now; it is spent if so."""
        if not self.has_room(size, now, important=important):
            self.refused += 1
            return False
        self._size.debt += size * DAY
        self._count.debt += DAY
        self._today_size += size
        self._today_count += 1
        return True

    def has_room(self, size: int, now: int, *, important: bool = False) -> bool:
        """Whether `spend` would agree; nothing is spent and nothing counted."""
        self._pass_to(now)
        size_burst, count_burst = self._size.burst, self._count.burst
        if not important:
            size_burst -= size_burst // RESERVED
            count_burst -= count_burst // RESERVED
        return self._size.has_room(size, size_burst) and self._count.has_room(1, count_burst)

    def written_today(self, now: int) -> int:
        """Bytes spent on the day (UTC) of `now`."""
        self._pass_to(now)
        return self._today_size

    def spent(self, now: int) -> Spent:
        """What the owner keeps beside its data."""
        self._pass_to(now)
        return Spent(
            self._at,
            self._size.owed(),
            self._count.owed(),
            self._today_size,
            self._today_count,
        )

    def restore(self, spent: Spent) -> None:
        """Go on with what an earlier instance had spent, added to what was spent since.

        The data was read from a device and may say anything: a debt is a burst at most.
        """
        self._size.debt += min(max(spent.debt_size, 0), self._size.burst) * DAY
        self._count.debt += min(max(spent.debt_count, 0), self._count.burst) * DAY
        if self._at == 0:
            self._at = max(spent.at, 0)
        elif spent.at < self._at:
            self._pay_off(self._at - max(spent.at, 0))
        if max(spent.at, 0) // DAY == self._at // DAY:
            self._today_size += min(max(spent.today_size, 0), self.bytes_per_day)
            self._today_count += min(max(spent.today_count, 0), self.writes_per_day)

    def _pass_to(self, now: int) -> None:
        """Time has passed; a clock that was set back has only moved."""
        if self._at and now > self._at:
            self._pay_off(now - self._at)
        if now // DAY != self._at // DAY:
            self._today_size = 0
            self._today_count = 0
        self._at = now

    def _pay_off(self, elapsed: int) -> None:
        self._size.pay(elapsed)
        self._count.pay(elapsed)
