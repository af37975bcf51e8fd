"""`nexus keys`: what is asked of keystored, what is printed, and what a refusal tells people."""

import io
import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from nexus.abi import SecretBackend
from nexus.cli import keys
from nexus.cli.client import ServiceRefused
from nexus.cli.errors import CommandFailed, UsageError
from nexus.protocols.keystored import (
    SIGN_SIZE_MAX,
    DeviceKey,
    GetPublicKey,
    GetStore,
    KeyState,
    KeystoredStatus,
    Rotated,
    RotateWrapping,
    Sign,
    Signature,
    Store,
)
from nexus.wire import ReplyStatus

KEY = DeviceKey(bytes(range(32)), 64 * "e")
STORE = Store(3, SecretBackend.FILE, 2, 0, KeyState.PRESENT)


class Keystored:
    """A running system whose operator passes requests on to this."""

    def __init__(self, answers: dict[type, Any]) -> None:
        self.answers = answers
        self.asked: list[Any] = []

    def client(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def relay(self, service: str, protocol: Any, request: Any, seconds: float) -> Any:
        assert service == protocol.name == "keystored"
        self.asked.append(request)
        answer = self.answers[type(request)]
        if isinstance(answer, IntEnum):
            raise ServiceRefused(service, type(request).__name__, answer)
        return answer


def test_show_tells_the_id_the_key_and_who_keeps_the_wrapping_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    system: Any = Keystored({GetStore: STORE, GetPublicKey: KEY})

    keys.show(system, as_json=False)
    plain = capsys.readouterr().out
    keys.show(system, as_json=True)

    assert plain.splitlines() == [
        f"device id:    {64 * 'e'}",
        f"public key:   {KEY.public_key.hex()}",
        "wrapping key: number 2, kept by file",
    ]
    assert json.loads(capsys.readouterr().out) == {
        "device_id": 64 * "e",
        "public_key": KEY.public_key.hex(),
        "backend": "file",
        "wrapping": 2,
    }


def test_without_a_device_key_show_says_so_and_asks_for_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    system: Any = Keystored({GetStore: Store(3, SecretBackend.KEYRING, 1, 0, KeyState.ABSENT)})

    keys.show(system, as_json=False)

    assert capsys.readouterr().out.splitlines() == [
        "device id:    none yet",
        "public key:   none yet",
        "wrapping key: number 1, kept by keyring",
    ]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (KeyState.DAMAGED, KeystoredStatus.CORRUPTED),
        (KeyState.UNKNOWN, KeystoredStatus.UNAVAILABLE),
    ],
)
def test_a_device_key_that_cannot_be_opened_is_not_shown_as_none_yet(
    state: KeyState, status: KeystoredStatus, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(3, SecretBackend.FILE, 2, 0, state)
    system: Any = Keystored({GetStore: store, GetPublicKey: status})

    with pytest.raises(CommandFailed, match=f"keystored: {status.name}, what"):
        keys.show(system, as_json=False)

    assert capsys.readouterr().out == ""


def test_sign_signs_the_bytes_of_a_file_and_prints_or_writes_the_signature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system: Any = Keystored({Sign: Signature(64 * b"s"), GetPublicKey: KEY})
    file, output = tmp_path / "order", tmp_path / "order.sig"
    file.write_bytes(b"\0order\n")

    keys.sign(system, file, None, as_json=False)
    printed = capsys.readouterr().out
    keys.sign(system, file, output, as_json=False)
    silent = capsys.readouterr().out
    keys.sign(system, file, None, as_json=True)

    assert system.asked[0] == Sign(b"\0order\n")
    assert printed == f"{(64 * b's').hex()}\n"
    assert (silent, output.read_bytes()) == ("", 64 * b"s")
    assert json.loads(capsys.readouterr().out) == {
        "signature": (64 * b"s").hex(),
        "size": 7,
        "public_key": KEY.public_key.hex(),
        "device_id": KEY.device_id,
    }


def test_sign_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    system: Any = Keystored({Sign: Signature(64 * b"s")})
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"piped")))

    keys.sign(system, Path("-"), None, as_json=False)

    assert system.asked == [Sign(b"piped")]


def test_what_is_too_large_to_sign_is_refused_here_with_the_way_to_do_it(tmp_path: Path) -> None:
    system: Any = Keystored({})
    file = tmp_path / "image"
    file.write_bytes(bytes(SIGN_SIZE_MAX + 1))

    with pytest.raises(UsageError, match="more than 4096 bytes: sign a digest of it"):
        keys.sign(system, file, None, as_json=False)
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        keys.sign(system, tmp_path / "none", None, as_json=False)

    assert system.asked == []


def test_rotate_prints_the_new_number(capsys: pytest.CaptureFixture[str]) -> None:
    system: Any = Keystored({RotateWrapping: Rotated(7)})

    keys.rotate(system, as_json=False)
    assert "wrapping key 7" in capsys.readouterr().out
    keys.rotate(system, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"wrapping": 7}


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (ReplyStatus.DENIED, "operator has no right crypto.sign: give it in the system file"),
        (KeystoredStatus.KEY_NOT_FOUND, "`nexus call keystored generate-key` makes it"),
        (KeystoredStatus.UNAVAILABLE, "see `nexus logs`"),
        (KeystoredStatus.CORRUPTED, "bring back the state directory"),
    ],
)
def test_a_refusal_says_what_to_do(status: IntEnum, sentence: str, tmp_path: Path) -> None:
    system: Any = Keystored({Sign: status})
    file = tmp_path / "order"
    file.write_bytes(b"order")

    with pytest.raises(CommandFailed, match=sentence):
        keys.sign(system, file, None, as_json=False)
