"""Up to when init has heard everybody: silence is judged by that time, and never by the clock.

    a message or an end is taken --------------> the clock goes on; what came with it waits still
    nothing was there at a deadline -----------> all that came until then is heard
    more taken than can have waited at a time -> all that came until that time is heard

init looks at one message after the other, and to start a service can take it longer than another
may take to answer. An answer that has come meanwhile is in the queue, and whoever gave it in time
is not to be killed for what held init up. The bound is for those who send without a pause: they put
off what is due for as long as their queues hold, and no longer.
"""

from nexus.abi import Nanos


class Hearing:
    """`until` (ns, monotonic): everything that had come by then has been looked at."""

    def __init__(self, begin: Nanos, queued_max: int) -> None:
        """`queued_max` (messages and ends of links) is what can wait for init at one time."""
        self.until = begin
        self._queued_max = queued_max
        self._since = begin  # the first of those taken
        self._taken = 0

    def on_taken(self, now: Nanos) -> None:
        """One message, or one end of a link, was taken at `now`; more may wait."""
        if not self._taken:
            self._since = now
        self._taken += 1
        if self._taken > self._queued_max:
            self._hear(self._since)

    def on_nothing(self, deadline: Nanos) -> None:
        """A receive that ended at its deadline, or later, found nothing."""
        self._hear(deadline)

    def _hear(self, until: Nanos) -> None:
        self.until = max(self.until, until)
        self._taken = 0
