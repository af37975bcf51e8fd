"""What the commands that ask a running system share: which one, its plan, and its services."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nexus.abi import INIT_NAME, ServiceId, service_id
from nexus.cli.client import OperatorClient
from nexus.cli.errors import UsageError
from nexus.cli.places import Running, base_dirs, is_alive, the_running
from nexus.protocols.init import PROTOCOL as INIT
from nexus.wire import Protocol

if TYPE_CHECKING:
    from nexus.init.plan import Plan


@dataclass(frozen=True)
class Asked:
    """A running system that a command asks. The plan is read again from its file."""

    running: Running

    @cached_property
    def plan(self) -> "Plan":
        """Raises SystemFileError, as when the file was changed since and is wrong now."""
        from nexus.cli.trial import tried_plan

        return tried_plan(Path(self.running.file))

    @cached_property
    def names(self) -> Mapping[ServiceId, str]:
        """Every service by its id, init-lite too."""
        names = [INIT_NAME, *(service.name for service in self.plan.services)]
        return {service_id(name): name for name in names}

    def is_changed(self) -> bool:
        """Whether the system file is no longer the one that was started."""
        return self.plan.digest != self.running.digest

    def client(self) -> OperatorClient:
        """A connection; raises CommandFailed."""
        return client_of(self.running, self.has)

    def has(self, service: str) -> bool:
        """Whether the system has this service; True if its file cannot be read any more."""
        from nexus.init.errors import SystemFileError

        try:
            return service in self.plan.by_name
        except SystemFileError:
            return True

    def protocols(self, service: str) -> tuple[Protocol, ...]:
        """What `service` speaks. Raises UsageError."""
        from nexus.init.plan import sources_of
        from nexus.init.programs import protocols_of

        if service == INIT_NAME:
            return (INIT,)
        planned = self.plan.by_name.get(service)
        if planned is None:
            names = ", ".join([*self.plan.by_name, INIT_NAME])
            raise UsageError(
                f"there is no service {service} in {self.running.title}: it has {names}"
            )
        return protocols_of(sources_of(self.plan)[planned.program])


def client_of(
    running: Running, has: Callable[[str], bool] = lambda _service: True
) -> OperatorClient:
    """A connection to operator of a running system. Raises CommandFailed."""
    home = base_dirs(os.environ, os.getuid())[1] / running.title
    return OperatorClient(
        Path(running.runtime), running.title, lambda: is_alive(running, home), has
    )


def asked(title: str | None) -> Asked:
    """The system a command means. Raises CommandFailed and UsageError."""
    return Asked(the_running(title, os.environ, os.getuid()))
