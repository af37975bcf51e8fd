"""Neither seed nor wrapping key nor entropy is in anything that a simulated system writes.

Every secret of the run is known, for the simulation is. The same scan over the same places finds
each of the leaks that are planted.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest

from nexus.abi import ConsoleWrite, Nanos, SecretBackend
from nexus.proof.leaks import Leaks
from nexus.protocols.keystored import (
    DeviceKey,
    Done,
    ExportPrivateKey,
    GenerateKey,
    Get,
    GetPublicKey,
    Put,
    RotateWrapping,
    Sign,
)
from nexus.protocols.logd import EVERY_RECORD, THIS_BOOT, Query, Records
from nexus.protocols.rngd import Entropy, GetEntropy
from nexus.runtime.program import Context
from nexus.services.keystored import vault as vault_module
from nexus.services.keystored.ed25519 import public_of
from nexus.services.keystored.places import RngdRandom, StateRecords
from nexus.services.keystored.sealing import NONCE_PREFIX_SIZE, WrappingKey, seal, unpack
from nexus.services.keystored.secret import Secret
from nexus.services.keystored.service import Keystored
from tests.fakes.initrig import MS
from tests.fakes.keyrig import DRAWING, SimMachine, asked, nap
from tests.fakes.policyrig import Hands, Outcome

pytestmark = pytest.mark.sim

VALUE: Final = bytes(range(100, 160))


async def lived(hands: Hands) -> str:
    """Everything that touches a secret; what the driver drew itself, as digits in reverse."""
    (made, *_) = await asked(
        hands, GenerateKey(), Put(b"name", VALUE), Sign(b"payload"), GetPublicKey(),
        RotateWrapping(), ExportPrivateKey(), Get(b"name"), Get(b"none"),
    )  # fmt: skip
    assert isinstance(made, DeviceKey)
    drawn = await hands.call("rngd", GetEntropy(64))
    assert isinstance(drawn, Entropy)
    await hands.outside("kill keystored")
    await nap(hands)
    assert await asked(hands, Put(b"name", VALUE)) == [Done()]
    await nap(hands, 500 * MS)
    since = 1
    while True:
        page = await hands.call("logd", Query(THIS_BOOT, since, 16, EVERY_RECORD))
        assert isinstance(page, Records)
        for record in page.records:
            fields = [f"{field.key}={field.value}" for field in record.fields]
            await ConsoleWrite(
                "driver: journal", json.dumps({"record": [record.text, *fields]}).encode()
            )
        if page.next > page.total:
            return drawn.data.hex()[::-1]
        since = page.next


class Run:
    """A run, its secrets, and everything it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draws: list[bytes] = []
        drawing = RngdRandom.draw

        async def draw(self: RngdRandom, size: int, until: Nanos) -> bytes:
            draws.append(await drawing(self, size, until))
            return draws[-1]

        monkeypatch.setattr(RngdRandom, "draw", draw)
        self.machine = SimMachine(monkeypatch, text=DRAWING, trace=True)
        self.outcome = self.machine.boot(lived)
        drawn = bytes.fromhex(self.outcome.result[::-1])
        # A nonce is no secret, and stands in front of what is sealed with it.
        secrets = [each for each in draws if len(each) > NONCE_PREFIX_SIZE]
        assert len(secrets) == 3, "the first wrapping key, the seed, the second wrapping key"
        (_, self.seed, self.wrapping) = secrets
        names = ("old wrapping key", "seed", "wrapping key")
        self.leaks = Leaks(
            {**dict(zip(names, secrets, strict=True)), "value": VALUE, "entropy": drawn}
        )

    def places(self) -> list[tuple[str, bytes]]:
        """Everything that is written: console, journal, event log, disk, memory of boots."""
        kernel = self.machine.kernel
        events = repr([(event.kind, dict(event.fields)) for event in self.outcome.events])
        return [
            ("events", events.encode()),
            ("event log", "\n".join(kernel.log_lines()).encode()),
            ("disk", self.machine.disks["disk"].image()),
            ("boot memory", kernel.boot_memory or b""),
        ]


def journal(outcome: Outcome) -> str:
    return repr([e.fields for e in outcome.events if e.fields.get("line") == "driver: journal"])


def test_no_secret_is_in_anything_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)

    assert run.leaks.among(run.places()) == {}

    # What was looked for is what there was, and where it may be it is.
    kept = run.machine.secrets["keystored", SecretBackend.FILE]
    assert bytes(unpack(kept).current.secret.data) == run.wrapping
    assert run.leaks.within(kept) == {"wrapping key"}
    shown = public_of(Secret(run.seed)).hex()
    assert shown.encode() in dict(run.places())["events"], "the public half may be known"
    assert "device key generated" in journal(run.outcome)
    assert "device.key.export" in journal(run.outcome)


def by_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs what it was asked to keep."""

    async def put(self: Keystored, call: Any, request: Put, until: Nanos) -> Done:
        self._context.log.info("put", value=request.value.hex())
        return Done()

    monkeypatch.setattr(Keystored, "_put", put)


def by_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells people of the seed."""
    seeds: list[str] = []

    def public(seed: Secret) -> bytes:
        seeds.append(seed.data.hex())
        return public_of(seed)

    monkeypatch.setattr(vault_module, "public_of", public)
    monkeypatch.setattr(Keystored, "evidence", lambda _self: {"seeds": seeds})


def by_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stores in clear what it has sealed, beside it."""
    values: list[bytes] = []
    write = StateRecords.put

    def sealed(key: WrappingKey, nonce: bytes, path: bytes, value: bytes | bytearray) -> bytes:
        values.append(bytes(value))
        return seal(key, nonce, path, value)

    async def put(self: StateRecords, records: Mapping[bytes, bytes], until: Nanos) -> None:
        await write(self, {**records, b"/state/keystore/clear": b"".join(values)}, until)

    monkeypatch.setattr(vault_module, "seal", sealed)
    monkeypatch.setattr(StateRecords, "put", put)


def by_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints its wrapping key, as Python prints bytes."""
    begin = Keystored.__init__

    def init(self: Keystored, context: Context) -> None:
        begin(self, context)
        original = self._vault.rotate

        async def rotate(until: Nanos) -> int:
            number = await original(until)
            keys = self._vault._wrapping
            assert keys is not None
            await ConsoleWrite(repr(bytes(keys.current.secret.data))[:200])
            return number

        monkeypatch.setattr(self._vault, "rotate", rotate)

    monkeypatch.setattr(Keystored, "__init__", init)


@pytest.mark.parametrize(
    ("plant", "place", "secret"),
    [
        (by_the_log, "events", "value"),
        (by_the_console, "events", "seed"),
        (by_the_disk, "disk", "seed"),
        (by_a_line, "events", "wrapping key"),
    ],
)
def test_a_leak_that_is_planted_is_found(
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    place: str,
    secret: str,
) -> None:
    plant(monkeypatch)
    run = Run(monkeypatch)

    found = run.leaks.among(run.places())

    assert secret in found[place]
