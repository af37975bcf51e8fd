"""keystored between true, small ones of what it stands on: statefsd, rngd, and the kernel's secret.

`Cut` ends a run at the n-th change, before it or after it, as a kill or a power cut does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from nexus.abi import Nanos
from nexus.ipc import Client, Peers, RetryBudget
from nexus.protocols.keystored import PROTOCOL
from nexus.protocols.rngd import PROTOCOL as RNGD
from nexus.protocols.rngd import Entropy, GetEntropy, RngdStatus
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.statefsd import (
    Batch,
    Delete,
    Durability,
    Get,
    Keys,
    ListKeys,
    Put,
    StatefsdStatus,
    Stored,
    Value,
    decode_changes,
)
from nexus.runtime import Call, Deferred, Server, ServiceConfig
from nexus.services.keystored import main as keystored_main
from nexus.services.keystored.vault import Vault
from tests.fakes.pair import SEED
from tests.fakes.policy import PolicySystem, policy_of

FAR: Final = Nanos(30_000_000_000)
RIGHTS: Final = ("device.keygen", "device.pubkey.read", "crypto.sign", "device.key.rotate")


class CutHere(Exception):
    """The power is gone."""


@dataclass
class Cut:
    """Counts changes, and ends the run at the one numbered `at`, done or not done."""

    at: int = -1
    done: bool = False
    count: int = 0

    def reached(self) -> bool:
        self.count += 1
        return self.count == self.at


class Numbers:
    """Bytes that are all different, in an order that is known: the run's seed."""

    def __init__(self, start: int = 1) -> None:
        self.next = start
        self.given: list[bytes] = []

    def draw(self, size: int) -> bytes:
        drawn = bytes((self.next * 7 + each * 13 + self.next // 31) % 251 for each in range(size))
        self.next += 1
        self.given.append(drawn)
        return drawn


@dataclass
class Medium:
    """What outlives an instance: the records, and the kernel's secret. For Vault alone."""

    records: dict[bytes, bytes] = field(default_factory=dict)
    secret: bytes = b""
    numbers: Numbers = field(default_factory=Numbers)
    cut: Cut = field(default_factory=Cut)
    page_size: int = 3  # keys of a page

    def vault(self) -> Vault:
        """A new instance on what there is."""
        return Vault(self, self, self)

    async def page(self, prefix: bytes, after: bytes, until: Nanos) -> tuple[list[bytes], bool]:
        keys = sorted(key for key in self.records if key.startswith(prefix) and key > after)
        return keys[: self.page_size], len(keys) > self.page_size

    def change(self) -> bool:
        """A change is about to be made; whether the power goes right after it."""
        if not self.cut.reached():
            return False
        if not self.cut.done:
            raise CutHere
        return True

    async def get(self, path: bytes, until: Nanos) -> bytes | None:
        return self.records.get(path)

    async def put(self, records: Mapping[bytes, bytes], until: Nanos) -> None:
        last = self.change()
        self.records.update(records)
        if last:
            raise CutHere

    async def delete(self, path: bytes, until: Nanos) -> bool:
        last = self.change()
        found = self.records.pop(path, None)
        if last:
            raise CutHere
        return found is not None

    async def draw(self, size: int, until: Nanos) -> bytes:
        return self.numbers.draw(size)

    async def read(self) -> bytes:
        return self.secret

    async def replace(self, data: bytes) -> None:
        last = self.change()
        self.secret = data
        if last:
            raise CutHere


class FakeStatefsd:
    """Keeps records. `refuses` is its answer to every change, `refuses_reads` to every Get.

    With `silent` nothing is answered; with `accepted` changes are answered as not durable.
    """

    def __init__(self, records: dict[bytes, bytes]) -> None:
        self.records = records
        self.refuses: IntEnum | None = None
        self.refuses_reads: IntEnum | None = None
        self.silent = False
        self.accepted = False
        self.asked: list[str] = []
        self.durabilities: list[Durability] = []
        self.deadlines: list[Nanos] = []

    def handle(self, call: Call, request: Any) -> Value | Keys | Stored | Deferred:
        self.asked.append(type(request).__name__)
        self.deadlines.append(call.deadline)
        if self.silent:
            return call.defer()
        if isinstance(request, Get):
            return self._get(call, request.key)
        if isinstance(request, ListKeys):
            below = [key for key in self.records if key.startswith(request.prefix)]
            keys = sorted(key for key in below if key > request.after)
            return Keys(keys[: request.count], len(keys) > request.count)
        if self.refuses is not None:
            raise call.refuse(self.refuses)
        self._change(call, request)
        self.durabilities.append(request.durability)
        return Stored(len(self.asked), durable=not self.accepted, repeated=False)

    def _get(self, call: Call, key: bytes) -> Value:
        if self.refuses_reads is not None:
            raise call.refuse(self.refuses_reads)
        if key not in self.records:
            raise call.refuse(StatefsdStatus.NOT_FOUND)
        return Value(self.records[key], 1)

    def _change(self, call: Call, request: Put | Delete | Batch) -> None:
        match request:
            case Put(key=key, value=value):
                self.records[key] = value
            case Batch(changes=changes):
                for change in decode_changes(changes).changes:
                    assert change.value is not None
                    self.records[change.key] = change.value
            case Delete(key=key):
                if self.records.pop(key, None) is None:
                    raise call.refuse(StatefsdStatus.NOT_FOUND)


class FakeRngd:
    """Gives what `numbers` give; `down` refuses, `silent` says nothing. `excess` is how many bytes
    more, or fewer, it gives than it was asked for."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.down = False
        self.silent = False
        self.excess = 0
        self.sizes: list[int] = []

    def handle(self, call: Call, request: GetEntropy) -> Entropy | Deferred:
        if self.silent:
            return call.defer()
        if self.down:
            raise call.refuse(RngdStatus.UNAVAILABLE)
        self.sizes.append(request.size)
        return Entropy(self.numbers.draw(request.size + self.excess))


class KeySystem:
    """init, policyd, logd, statefsd, rngd and keystored on the tiny kernel."""

    def __init__(
        self,
        rights: Mapping[str, tuple[str, ...]] | None = None,
        *,
        policyd: bool = True,
        start: bool = True,
    ) -> None:
        given = {"app": RIGHTS, "keystored": ("policy.delegate",), "policyd": ()}
        given = {**given, **(rights or {})}
        services = sorted({*given, "logd", "statefsd", "rngd", "app", "other"})
        self.system = PolicySystem(policy_of(given, services=services), policyd=policyd)
        self.kernel = self.system.kernel
        self.kernel.secrets["keystored"] = b""
        self.records: dict[bytes, bytes] = {}
        self.numbers = Numbers()
        self.start_statefsd()
        self.start_rngd()
        if start:
            self.start()

    @property
    def secret(self) -> bytes:
        """What the kernel keeps for keystored."""
        return self.kernel.secrets["keystored"]

    def start_statefsd(self) -> None:
        """Start it (again) on the records there are."""
        service = self.statefsd = FakeStatefsd(self.records)
        _ = self.system.start("statefsd", lambda boot: Server(service, STATEFSD, boot).run())

    def start_rngd(self) -> None:
        service = self.rngd = FakeRngd(self.numbers)
        _ = self.system.start("rngd", lambda boot: Server(service, RNGD, boot).run())

    def start(self) -> None:
        """Start keystored (again)."""
        config = ServiceConfig(
            uses=["policyd", "logd", "statefsd", "rngd"],
            posts=["logd"],
            settings={},
            trace_seed=SEED,
            log_ring=0,  # lines go by message, which the fake logd understands
        )
        _ = self.system.start("keystored", keystored_main, config.encoded())

    def restart(self) -> None:
        """Kill keystored and start it again."""
        self.system.kill("keystored")
        self.start()

    def ask(self, *requests: Any, name: str = "app", wait: int = 5_000_000_000) -> list[Any]:
        """The outcomes of requests to keystored, one after the other."""

        async def body(peers: Peers) -> list[Any]:
            budget = RetryBudget(attempts_max=3, backoff=Nanos(1_000_000), deadline=self.ahead(FAR))
            found = await peers.connect("keystored", PROTOCOL, budget)
            assert isinstance(found, Client), found
            return [await found.call(request, self.ahead(wait)) for request in requests]

        outcomes: list[Any] = self.kernel.run(
            self.system.add_client(body, name), until=self.kernel.now + FAR
        )
        return outcomes

    def ahead(self, span: int) -> Nanos:
        return Nanos(self.kernel.now + span)
