"""keystored in an interpreter of its own, on what really keeps a secret: killed, and booted again."""

from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import SecretBackend
from nexus.protocols.keystored import (
    DeviceKey,
    Done,
    GenerateKey,
    Get,
    GetPublicKey,
    GetStore,
    Put,
    RotateWrapping,
    Sign,
    Signature,
    Store,
    Value,
)
from nexus.services.keystored.ed25519 import verify
from nexus.services.keystored.sealing import unpack
from tests.fakes.initrig import MS
from tests.fakes.keyrig import LinuxMachine, asked, nap
from tests.fakes.policyrig import Hands

pytestmark = pytest.mark.linux

ENTRIES: Final = 6
KILLS: Final = 8  # while it rotates
VALUES: Final = [f"value {number}" for number in range(ENTRIES)]


async def filled(hands: Hands) -> str:
    """A device key and entries; the public key."""
    (made,) = await asked(hands, GenerateKey())
    assert isinstance(made, DeviceKey), made
    puts = [Put(b"%d" % number, b"value %d" % number) for number in range(ENTRIES)]
    assert await asked(hands, *puts) == [Done()] * ENTRIES
    return made.public_key.hex()


async def looked(hands: Hands) -> dict[str, Any]:
    """What there is."""
    shown, signature, store = await asked(hands, GetPublicKey(), Sign(b"payload"), GetStore())
    assert isinstance(shown, DeviceKey), shown
    assert isinstance(signature, Signature), signature
    assert isinstance(store, Store), store
    values = await asked(hands, *(Get(b"%d" % number) for number in range(ENTRIES)))
    return {
        "public": shown.public_key.hex(),
        "signs": verify(shown.public_key, signature.signature, b"payload"),
        "values": [each.value.decode() if isinstance(each, Value) else each for each in values],
        "wrapping": store.wrapping,
        "keygens": store.keygens,
        "backend": SecretBackend(store.backend).name,
    }


def test_keys_last_over_a_kill_and_a_restart_of_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = LinuxMachine(monkeypatch, tmp_path / "state")

    async def first(hands: Hands) -> list[Any]:
        public = await filled(hands)
        await hands.outside("kill keystored")
        await nap(hands)
        return [public, await looked(hands), await asked(hands, GenerateKey())]

    async def second(hands: Hands) -> list[Any]:
        return [await looked(hands), await asked(hands, GenerateKey())]

    public, found, again = machine.boot(first).result
    later, once_more = machine.boot(second).result

    expected = {
        "public": public,
        "signs": True,
        "values": VALUES,
        "wrapping": 1,
        "keygens": 0,
        "backend": "FILE",
    }
    assert found == later == expected
    assert again == once_more == ["KEY_EXISTS"]
