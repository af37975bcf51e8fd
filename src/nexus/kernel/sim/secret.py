"""Where services' secrets are kept: a model of the file backend and of the kernel's keyring.

A replacement is atomic on both: there is no moment at which half of one could be seen.
"""

from collections.abc import Mapping

from nexus.abi import SECRET_SIZE_MAX, AbiError, SecretBackend, Status
from nexus.kernel.sim.objects import Task


class Secrets:
    """The secrets of all services, by service and backend. They never reach a log.

    While a service is in `failing` its backend gives errors.
    """

    def __init__(self, kept: Mapping[tuple[str, SecretBackend], bytes]) -> None:
        self.kept = dict(kept)
        self.failing: set[str] = set()

    def read(self, task: Task) -> bytes:
        """What was stored last. Refuses as SecretRead."""
        return self.kept.get(self._place(task), b"")

    def replace(self, task: Task, data: bytes, *, full: bool) -> None:
        """Store, unless there is no room. Refuses as SecretReplace."""
        backend = self._granted(task)
        if not 1 <= len(data) <= SECRET_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"a secret of {len(data)} bytes")
        place = self._place(task)
        if full:
            raise AbiError(Status.NO_SPACE, f"the {backend.name.lower()} backend is full")
        self.kept[place] = bytes(data)

    def lose_power(self) -> None:
        """Forget what only the machine's memory held."""
        for place in [place for place in self.kept if place[1] is SecretBackend.KEYRING]:
            del self.kept[place]

    def _granted(self, task: Task) -> SecretBackend:
        if task.secret is SecretBackend.NONE:
            raise AbiError(Status.PERMISSION_DENIED, f"{task.name} was granted no secret")
        return task.secret

    def _place(self, task: Task) -> tuple[str, SecretBackend]:
        backend = self._granted(task)
        if task.name in self.failing:
            raise AbiError(Status.DEVICE_FAILED, f"the {backend.name.lower()} backend fails")
        return task.name, backend
