"""Is a starting system ready? Decided from its console lines and from what ended. No I/O."""

from collections.abc import Iterable

from nexus.abi import INIT_NAME, EventKind
from nexus.cli.sink import Told

INIT_READY = "init: ready"
SAFE_MODE = "init: safe mode"


class Readiness:
    """Fed with what a boot tells; `done` once every service has said that it is ready.

    A service says so after init found it healthy (nexus.runtime); in safe mode only some run.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self.waiting = dict.fromkeys(services, "has not said that it is ready")
        self.wired = False
        self.safe_mode = ""
        self.ends = 0

    @property
    def done(self) -> bool:
        """Whether there is nothing more to wait for."""
        return bool(self.safe_mode) or (self.wired and not self.waiting)

    def on_told(self, told: Told) -> None:
        """Something happened in the booting system."""
        if told.kind == EventKind.CONSOLE and told.name == INIT_NAME:
            self.wired = self.wired or told.text == INIT_READY
            if told.text.startswith(SAFE_MODE):
                self.safe_mode = told.text
        elif told.kind == EventKind.CONSOLE:
            if told.text in (f"{told.name}: ready", f"{told.name}: ready again"):
                _ = self.waiting.pop(told.name, None)
        elif told.kind in (EventKind.EXIT, EventKind.SPAWN_FAILED, EventKind.HANG):
            self.ends += 1
            if told.name in self.waiting:
                self.waiting[told.name] = told.text

    def lacking(self) -> list[str]:
        """A line for each service that is not ready: which, and what is known of it."""
        lines = [f"{name}: {why}" for name, why in self.waiting.items()]
        return lines if self.wired or lines else ["init: has not linked the services yet"]
