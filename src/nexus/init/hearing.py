"""Up to when init has heard everybody: silence is judged by that time, and not by the clock.

    a message or an end is taken --------------> the clock goes on; what came with it waits still
    a look after a deadline found nothing -----> all that came until then is heard
    more taken than can have waited at a time -> all that came before the first of these is heard

init looks at one message after the other, and to start a service can take it longer than another
may take to answer. An answer that has come meanwhile is in the queue, and whoever gave it in time
is not to be killed for what held init up.

The count is for those who send without a pause: they put off what is due by two rounds of what
their queues hold, times what init does with a message, and no longer. While its table is full a
look that can take nothing is counted like one that took something: silence is judged then as well.
"""

from nexus.abi import Nanos


class Hearing:
    """`until` (ns, monotonic): everything that had come by then has been looked at
    (tests/sim/test_init_held_up.py)."""

    def __init__(self, begin: Nanos, queued_max: int) -> None:
        """`queued_max` (messages and ends of links) is what services that keep their links can
        have waiting for init at one time."""
        self.until = begin
        self._queued_max = queued_max
        self._since = begin  # the first of those taken
        self._taken = 0

    def on_taken(self, now: Nanos) -> None:
        """A look at `now` found something; more may wait."""
        if not self._taken:
            self._since = now
        self._taken += 1
        if self._taken > self._queued_max:
            self._hear(self._since)

    def on_nothing(self, begun: Nanos) -> None:
        """A look that began at `begun`, or later, found nothing."""
        self._hear(begun)

    def _hear(self, until: Nanos) -> None:
        self.until = max(self.until, until)
        self._taken = 0
