"""Is a starting system ready? Decided from its console lines and from what ended. No I/O."""

from collections.abc import Iterable

from nexus.abi import INIT_NAME, EventKind
from nexus.cli.sink import Told
from nexus.init.reasons import Reason

INIT_READY = "init: ready"
SAFE_MODE = "init: safe mode"
GAVE_UP = "init: gave up on "
NO_START = "init: no start of "
DENIED = Reason.DENIED  # an `undecided` start is tried again, a denied one is not


class Readiness:
    """Fed with what a boot tells; `done` once every service has said that it is ready.

    A service says so after init found it healthy (nexus.runtime); in safe mode only some run.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self.waiting = dict.fromkeys(services, "has not said that it is ready")
        self.wired = False
        self.safe_mode = ""
        self.ends = 0
        self.ended: dict[str, str] = {}  # how the last instance of each ended
        self._refused: set[str] = set()  # of whom the kernel has said why there is no start
        self.hopeless: dict[str, str] = {}
        """Services that init has given up, so that waiting for them makes no sense, and why."""

    @property
    def done(self) -> bool:
        """Whether there is nothing more to wait for."""
        return bool(self.safe_mode) or (self.wired and not self.waiting and not self.hopeless)

    def on_told(self, told: Told) -> None:
        """Something happened in the booting system."""
        if told.kind == EventKind.CONSOLE and told.name == INIT_NAME:
            self.wired = self.wired or told.text == INIT_READY
            if told.text.startswith(SAFE_MODE):
                self.safe_mode = told.text
            elif told.text.startswith(GAVE_UP):
                self._give_up(told.text.removeprefix(GAVE_UP), f"init gave up on it: {told.why}")
            elif told.text.startswith(NO_START) and told.why == DENIED:
                why = "not started, the policy does not allow what the system file grants it"
                self._give_up(told.text.removeprefix(NO_START), why)
            elif told.text.startswith(NO_START):
                self._not_started(told.text.removeprefix(NO_START), told.why)
        elif told.kind == EventKind.CONSOLE:
            line, _, _ = told.text.partition(" (")  # some say what their readiness stands on
            if line in (f"{told.name}: ready", f"{told.name}: ready again"):
                _ = self.waiting.pop(told.name, None)
        elif told.kind in (EventKind.EXIT, EventKind.SPAWN_FAILED, EventKind.HANG):
            self.ends += 1
            if told.kind == EventKind.SPAWN_FAILED:
                self._refused.add(told.name)
            self.ended[told.name] = _in_short(told.text)
            if told.name in self.waiting:
                self.waiting[told.name] = self.ended[told.name]

    def _give_up(self, name: str, why: str) -> None:
        """It will not be ready, even if it was before."""
        ended = self.ended.get(name)
        self.hopeless[name] = f"{why}; it ended with {ended}" if ended else why

    def _not_started(self, name: str, why: str) -> None:
        """init tries again; what the kernel says of a refused spawn says more than init does."""
        if name in self.waiting and name not in self._refused:
            self.waiting[name] = f"not started: {why}"
        self._refused.discard(name)

    def lacking(self) -> list[str]:
        """A line for each service that is not ready: which, and what is known of it.

        Of those that are given up, if there are any: the others had no time.
        """
        if self.hopeless:
            return [f"{name}: {why}" for name, why in self.hopeless.items()]
        lines = [f"{name}: {why}" for name, why in self.waiting.items()]
        return lines if self.wired or lines else ["init: has not linked the services yet"]


def _in_short(text: str) -> str:
    """How it ended, and the last line of its crash, which names the error."""
    first, *crash = text.split("\n")
    return f"{first}, {crash[-1].strip()}" if crash else first
