"""keystored in an interpreter of its own, on what really keeps a secret: killed, booted again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import SecretBackend
from nexus.kernel.linux.secrets import forget_keys
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
from tests.fakes.initrig import MS, SECOND
from tests.fakes.keyrig import SYSTEM, LinuxMachine, asked, nap
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


async def until_back(hands: Hands) -> None:
    """A new instance serves; its interpreter takes a moment to start."""

    async def good() -> bool:
        outcome = await hands.client("keystored").call(GetStore(), await hands.ahead(SECOND))
        return isinstance(outcome, Store) and outcome.wrapping > 0

    _ = await hands.until(good, 20 * SECOND)


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
        await until_back(hands)
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


def test_killed_again_and_again_while_it_rotates_it_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = LinuxMachine(monkeypatch, tmp_path / "state")

    async def script(hands: Hands) -> list[Any]:
        public = await filled(hands)
        seen = []
        for number in range(KILLS):
            client = hands.client("keystored")
            started = await client.start(RotateWrapping(), await hands.ahead(5 * SECOND))
            await nap(hands, number * MS // 2)
            await hands.outside("kill keystored")
            _ = await client.finish(started)
            await until_back(hands)
            seen.append(await looked(hands))
        return [public, seen]

    public, seen = machine.boot(script).result
    later = machine.boot(looked).result

    for found in [*seen, later]:
        assert (found["public"], found["signs"], found["keygens"]) == (public, True, 0)
        assert found["values"] == VALUES
    numbers = [found["wrapping"] for found in [*seen, later]]
    assert numbers == sorted(numbers)
    wrapping = unpack(machine.secret)
    assert [key.number for key in wrapping.keys] == [later["wrapping"]], "finished"


def test_a_secret_file_that_is_gone_or_damaged_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = LinuxMachine(monkeypatch, tmp_path / "state")
    _ = machine.boot(filled)
    kept = machine.secret

    async def script(hands: Hands) -> list[Any]:
        return await asked(hands, GenerateKey(), Sign(b""), Get(b"0"), Put(b"n", b""))

    machine.secret_path.write_bytes(kept[:-1] + b"\0")
    damaged = machine.boot(script).result
    left = machine.secret
    machine.secret_path.unlink()
    gone = machine.boot(script).result

    assert damaged == gone == ["CORRUPTED"] * 4
    assert left == kept[:-1] + b"\0"
    assert not machine.secret_path.exists()


@pytest.mark.skipif(
    not Path("/proc/keys").exists(), reason="this kernel was built without keyrings"
)
def test_the_keyring_keeps_it_over_a_kill_and_a_restart_of_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = SYSTEM.replace('secret = "file"', 'secret = "keyring"')
    machine = LinuxMachine(monkeypatch, tmp_path / "state", text)

    async def first(hands: Hands) -> list[Any]:
        public = await filled(hands)
        await hands.outside("kill keystored")
        await nap(hands)
        await until_back(hands)
        return [public, await looked(hands)]

    try:
        public, found = machine.boot(first).result
        later = machine.boot(looked).result
    finally:
        forgotten = forget_keys(machine.state)

    assert found == later
    assert (found["public"], found["backend"], found["signs"]) == (public, "KEYRING", True)
    assert not machine.secret_path.exists(), "nothing of it is on the disk"
    assert forgotten == 1


def test_init_never_imports_cryptography_and_keystored_does_not_run_in_a_fork(
    tmp_path: Path,
) -> None:
    # In a fresh interpreter: this one has imported it for other tests.
    code = f"""
import sys
from pathlib import Path
import pytest
from nexus.protocols.keystored import DeviceKey, GenerateKey
from tests.fakes.keyrig import LinuxMachine, asked

async def script(hands):
    (made,) = await asked(hands, GenerateKey())
    await hands.outside("look keystored")
    return type(made).__name__

def look(what, pid):
    print(what, Path("/proc", str(pid), "cmdline").read_bytes().split(b"\\0")[1].decode())
    print("maps", "cryptography" in Path("/proc", str(pid), "maps").read_text())
    print("init", "cryptography" in Path("/proc/self/maps").read_text())

machine = LinuxMachine(pytest.MonkeyPatch(), Path({str(tmp_path / "state")!r}))
print(machine.boot(script, obey=look).result)
kept = ("cryptography", "nexus.services.keystored")
print([name for name in sys.modules if name.startswith(kept)])
"""

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )

    assert done.stdout.splitlines() == [
        "look -I",
        "maps True",
        "init False",
        "DeviceKey",
        "[]",
    ]
