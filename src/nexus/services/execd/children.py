"""Who was started for whom, how it ended, and who waits for that. Pure: no clock, no messages.

    started --ended, not to be started again--> over, remembered among the last ENDS_MAX
        \\--ended, to be started again--> its next instance is the same child, under another pid
                                       --given up before that--> no child any more

A child is known by each of its pids; only who had it started may wait for it or end it.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from nexus.abi import LinkId, Nanos, ServiceId
from nexus.protocols.execd import Ended

CHILDREN_MAX: Final = 32  # that live, of all starters
CHILDREN_OF_ONE_MAX: Final = 8  # that live, of one starter
ENDS_MAX: Final = 64  # that are remembered; the oldest is forgotten
WAITERS_MAX: Final = 64  # in all
WAITERS_OF_ONE_MAX: Final = 16  # of one client: it leaves room for others

assert CHILDREN_OF_ONE_MAX < CHILDREN_MAX
assert WAITERS_OF_ONE_MAX < WAITERS_MAX


class Waiter(Protocol):
    """Somebody who waits for an end; a runtime.Deferred is one."""

    link: LinkId
    deadline: Nanos


WaiterT = TypeVar("WaiterT", bound=Waiter)


@dataclass(slots=True)
class Child(Generic[WaiterT]):
    """A started program: `pid` and `generation` are the latest known instance's."""

    name: str
    starter: ServiceId
    pid: int
    generation: int
    waiters: list[WaiterT] = field(default_factory=list)
    is_between: bool = False  # that instance has ended, and the next one was to be started


@dataclass(frozen=True, slots=True)
class Over:
    """How an instance ended, and who may know."""

    starter: ServiceId
    ended: Ended


class Children(Generic[WaiterT]):
    """The children that live, and the last that ended."""

    def __init__(self) -> None:
        self._living: dict[str, Child[WaiterT]] = {}
        self._over: OrderedDict[int, Over] = OrderedDict()

    def __len__(self) -> int:
        return len(self._living)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(len(child.waiters) for child in self._living.values())

    def has_room(self, starter: ServiceId) -> bool:
        """Whether this starter may have one more child."""
        own = sum(child.starter == starter for child in self._living.values())
        return own < CHILDREN_OF_ONE_MAX and len(self._living) < CHILDREN_MAX

    def on_started(self, name: str, starter: ServiceId, pid: int, generation: int) -> None:
        """init has started it for `starter`."""
        _ = self._over.pop(pid, None)  # the kernel gives a pid again, after long
        self._living[name] = Child(name, starter, pid, generation)

    def living(self, pid: int) -> Child[WaiterT] | None:
        """The child that runs under this pid."""
        return next((child for child in self._living.values() if child.pid == pid), None)

    def named(self, name: str) -> Child[WaiterT] | None:
        """The child that runs this program."""
        return self._living.get(name)

    def over(self, pid: int) -> Over | None:
        """How the instance with this pid ended."""
        return self._over.get(pid)

    def may_wait(self, link: LinkId, now: Nanos) -> bool:
        """Whether one more may wait by this link. Those whose time is over are let go."""
        count = 0
        for child in self._living.values():
            child.waiters = [each for each in child.waiters if each.deadline > now]
            count += sum(each.link == link for each in child.waiters)
        return count < WAITERS_OF_ONE_MAX and self.waiting < WAITERS_MAX

    def on_ended(self, name: str, ended: Ended, *, again: bool) -> list[WaiterT]:
        """An instance of a child has ended; who waited for it. `again`: it is started again."""
        child = self._living.get(name)
        if child is None:
            return []
        self._over[ended.pid] = Over(child.starter, ended)
        while len(self._over) > ENDS_MAX:
            _ = self._over.popitem(last=False)
        waiters, child.waiters = child.waiters, []
        child.is_between = again
        if not again:
            del self._living[name]
        return waiters

    def forget_link(self, link: LinkId) -> None:
        """The holder of a link is gone, and waits no longer."""
        for child in self._living.values():
            child.waiters = [each for each in child.waiters if each.link != link]

    def keep_only(self, names: Iterable[str]) -> None:
        """init knows of these children: one between two instances that is not among them was given
        up without another end. Nobody waits for it; the ends of the others are still to be told."""
        known = set(names)
        for name, child in list(self._living.items()):
            if child.is_between and name not in known:
                del self._living[name]
