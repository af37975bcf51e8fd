"""What keystored stands on: records of statefsd, entropy of rngd, the kernel's secret.

Nothing here keeps a copy, and nothing stands in for what is not there: every failure is Unusable.
A write counts when statefsd says that it is durable.
"""

from collections.abc import Mapping
from typing import Final, Protocol

from nexus.abi import AbiError, Nanos, Now, SecretBackend, SecretQuery, SecretRead, SecretReplace
from nexus.ipc import (
    CallFailure,
    Client,
    Refused,
    RetryBudget,
    Stale,
    TimedOut,
    deadline_after,
    may_repeat,
    retry_until,
)
from nexus.protocols.rngd import PROTOCOL as RNGD
from nexus.protocols.rngd import Entropy, GetEntropy
from nexus.protocols.statefsd import (
    LIST_MAX,
    Batch,
    Change,
    Changes,
    Delete,
    Durability,
    Get,
    Keys,
    ListKeys,
    Put,
    StatefsdStatus,
    Stored,
    Value,
)
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.runtime.program import Context, Unreachable
from nexus.services.keystored.faults import corrupted, unavailable
from nexus.wire import Protocol as WireProtocol
from nexus.wire import Request, encode

STATEFSD_NAME: Final = "statefsd"
RNGD_NAME: Final = "rngd"
ATTEMPTS_MAX: Final = 4  # of a call that a restart of the other service cut off
BACKOFF: Final = Nanos(10_000_000)  # ns before the second one
SILENCE_LEAST: Final = Nanos(500_000_000)  # ns of a wait in vain that says the other one hangs
SILENCE_MAX: Final = Nanos(1_000_000_000)  # ns without questions after that: who waits behind the
# request that met it, a probe among them, does not wait once more


class Records(Protocol):
    """Records by key, durable when written. Everything raises Unusable."""

    async def get(self, path: bytes, until: Nanos) -> bytes | None:
        """The record, None if there is none."""

    async def put(self, records: Mapping[bytes, bytes], until: Nanos) -> None:
        """Write all of them or none."""

    async def delete(self, path: bytes, until: Nanos) -> bool:
        """Drop a record; whether there was one."""

    async def page(self, prefix: bytes, after: bytes, until: Nanos) -> tuple[list[bytes], bool]:
        """Keys below `prefix` that come after `after`, and whether there are more."""


class Random(Protocol):
    """Fresh entropy."""

    async def draw(self, size: int, until: Nanos) -> bytes:
        """So many bytes. Raises Unusable."""


class Kept(Protocol):
    """The kernel's secret of this service."""

    async def read(self) -> bytes:
        """What was stored last, b"" if nothing. Raises Unusable."""

    async def replace(self, data: bytes) -> None:
        """Store it, all or nothing. Raises Unusable, and the old one is still there."""


class Asked:
    """Calls to a service keystored uses, repeated while its instance is being replaced."""

    def __init__(self, context: Context, name: str, protocol: WireProtocol) -> None:
        self._context = context
        self._name = name
        self._protocol = protocol
        self.generation = 0  # of the instance that answered last
        self.attempts = 0  # of the latest question, those that were sent
        self._silent_until = Nanos(0)

    async def connect(self, until: Nanos) -> Client:
        """The way to it, found once. Raises Unusable."""
        try:
            return await self._context.client(self._name, self._protocol, until)
        except Unreachable as fault:
            raise unavailable(f"no way to {self._name}") from fault

    async def ask(self, request: Request[object], until: Nanos) -> object:
        """The reply, or Refused. Raises Unusable when there is none.

        Asking again is right for every request keystored makes: it writes whole values, one at a
        time, and an instance that has ended does nothing any more.
        """
        client = await self.connect(until)
        begun = await Now()
        if begun < self._silent_until:
            raise unavailable(f"{self._name}: it has just not answered")
        self.attempts = 0
        budget = RetryBudget(attempts_max=ATTEMPTS_MAX, backoff=BACKOFF, deadline=until)

        async def attempt() -> object:
            outcome = await client.call(request, until)
            self.attempts += not isinstance(outcome, Stale)  # then it was not sent
            return outcome

        outcome = await retry_until(attempt, may_repeat, budget, client.tokens)
        self._note(client)
        if isinstance(outcome, CallFailure):
            ended = await Now()
            if isinstance(outcome, TimedOut) and ended - begun >= SILENCE_LEAST:
                self._silent_until = deadline_after(ended, SILENCE_MAX)
            raise unavailable(f"{self._name}: {type(outcome).__name__}")
        return outcome

    def _note(self, client: Client) -> None:
        self.generation = client.generation


class StateRecords:
    """The records that statefsd keeps for keystored."""

    def __init__(self, context: Context) -> None:
        self._statefsd = Asked(context, STATEFSD_NAME, STATEFSD)
        self.connect = self._statefsd.connect

    @property
    def generation(self) -> int:
        """Of the instance of statefsd that answered last; 0 before the first answer."""
        return self._statefsd.generation

    async def get(self, path: bytes, until: Nanos) -> bytes | None:
        """As Records.get."""
        match await self._statefsd.ask(Get(path), until):
            case Value(value=value):
                return value
            case Refused(StatefsdStatus.NOT_FOUND):
                return None
            case Refused(StatefsdStatus.CORRUPTED | StatefsdStatus.LARGE as status):
                raise corrupted(f"{STATEFSD_NAME}: {status.name}")
            case other:
                raise _refused(other)

    async def put(self, records: Mapping[bytes, bytes], until: Nanos) -> None:
        """As Records.put."""
        if len(records) == 1:
            ((path, record),) = records.items()
            request: Request[Stored] = Put(path, record, Durability.DURABLE, 0)
        else:
            changes = [Change(path, record) for path, record in records.items()]
            request = Batch(bytes(encode(Changes(changes))), Durability.DURABLE, 0)
        _check_durable(await self._statefsd.ask(request, until))

    async def delete(self, path: bytes, until: Nanos) -> bool:
        """As Records.delete."""
        outcome = await self._statefsd.ask(Delete(path, Durability.DURABLE, 0), until)
        if outcome == Refused(StatefsdStatus.NOT_FOUND):
            # The first attempt may have done it, and was cut off before it was answered.
            return self._statefsd.attempts > 1
        _check_durable(outcome)
        return True

    async def page(self, prefix: bytes, after: bytes, until: Nanos) -> tuple[list[bytes], bool]:
        """As Records.page."""
        outcome = await self._statefsd.ask(ListKeys(prefix, after, LIST_MAX), until)
        if not isinstance(outcome, Keys):
            raise _refused(outcome)
        return outcome.keys, outcome.more


class RngdRandom:
    """rngd, and no other source: not the process's own, and not what was drawn before."""

    def __init__(self, context: Context) -> None:
        self._rngd = Asked(context, RNGD_NAME, RNGD)
        self.connect = self._rngd.connect

    async def draw(self, size: int, until: Nanos) -> bytes:
        """As Random.draw."""
        outcome = await self._rngd.ask(GetEntropy(size), until)
        if not isinstance(outcome, Entropy):
            raise _refused(outcome, RNGD_NAME)
        if len(outcome.data) != size:
            raise unavailable("rngd: not as many bytes as asked for")
        return outcome.data


class KernelKept:
    """The secret that the kernel keeps for this service alone."""

    async def backend(self) -> SecretBackend:
        """Where it is."""
        return await SecretQuery()

    async def read(self) -> bytes:
        """As Kept.read."""
        try:
            return await SecretRead()
        except AbiError as error:
            raise unavailable(f"secret: {error.status.name}") from error

    async def replace(self, data: bytes) -> None:
        """As Kept.replace."""
        try:
            await SecretReplace(data)
        except AbiError as error:
            raise unavailable(f"secret: {error.status.name}") from error


def _check_durable(outcome: object) -> None:
    """Go on only with a change that survives a power cut."""
    if not isinstance(outcome, Stored):
        raise _refused(outcome)
    if not outcome.durable:
        raise unavailable(f"{STATEFSD_NAME}: not durable")


def _refused(outcome: object, name: str = STATEFSD_NAME) -> Exception:
    """A refusal that is no answer for us: the device, the quota, the policy."""
    assert isinstance(outcome, Refused), type(outcome).__name__
    return unavailable(f"{name}: {outcome.status.name}")
