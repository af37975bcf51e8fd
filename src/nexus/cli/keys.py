"""`nexus keys`: the device key of a running system, as operator may use it; never its seed."""

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from nexus.abi import SecretBackend
from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient, ServiceRefused
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.files import read_input, write_output
from nexus.cli.output import say, say_json
from nexus.protocols.keystored import (
    KEYGEN_RIGHT,
    PROTOCOL,
    PUBKEY_RIGHT,
    ROTATE_RIGHT,
    SIGN_RIGHT,
    SIGN_SIZE_MAX,
    DeviceKey,
    GenerateKey,
    GetPublicKey,
    GetStore,
    KeyState,
    KeystoredStatus,
    RotateWrapping,
    Sign,
)
from nexus.wire import ReplyStatus, Request

KEYSTORED: Final = "keystored"
ASK_TIME: Final = 5.0  # seconds
ROTATE_TIME: Final = 30.0  # seconds; every record is read and written

RIGHTS: Final[dict[type, str]] = {
    GenerateKey: KEYGEN_RIGHT,
    GetPublicKey: PUBKEY_RIGHT,
    Sign: SIGN_RIGHT,
    RotateWrapping: ROTATE_RIGHT,
}
WHY: Final[Mapping[IntEnum, str]] = {
    KeystoredStatus.KEY_NOT_FOUND: "there is no device key yet: "
    f"`nexus call {KEYSTORED} generate-key` makes it, once and for all",
    KeystoredStatus.UNAVAILABLE: "what it stands on cannot be had now: see `nexus logs`",
    KeystoredStatus.CORRUPTED: "what is stored does not open with the wrapping key it has: "
    "bring back the state directory as it was, secrets and disk together",
}
"""What a refusal means for the one who asked."""


def show(asked: Asked, *, as_json: bool) -> None:
    """Print the device id, the public key and how they are kept. Raises CommandFailed."""
    with asked.client() as client:
        store = client.relay(KEYSTORED, PROTOCOL, GetStore(), ASK_TIME)
        key = _key(client) if store.device_key is not KeyState.ABSENT else None
    backend = SecretBackend(store.backend).name.lower()
    if as_json:
        say_json(
            {
                "device_id": None if key is None else key.device_id,
                "public_key": None if key is None else key.public_key,
                "backend": backend,
                "wrapping": store.wrapping,
            }
        )
        return
    say(f"device id:    {'none yet' if key is None else key.device_id}")
    say(f"public key:   {'none yet' if key is None else key.public_key.hex()}")
    say(f"wrapping key: number {store.wrapping}, kept by {backend}")


def sign(asked: Asked, file: Path, output: Path | None, *, as_json: bool) -> None:
    """Print the device key's signature over what a file holds, or write it, 64 bytes, to a file.

    Raises CommandFailed and UsageError.
    """
    payload = _read(file)
    with asked.client() as client:
        signature = _asked(client, Sign(payload), ASK_TIME).signature
        key = _key(client) if as_json else None
    if output is not None:
        write_output(output, signature)
    if key is not None:
        shown = {"signature": signature, "size": len(payload)}
        say_json({**shown, "public_key": key.public_key, "device_id": key.device_id})
    elif output is None:
        say(signature.hex())


def rotate(asked: Asked, *, as_json: bool) -> None:
    """Seal everything with a new wrapping key. Raises CommandFailed."""
    with asked.client() as client:
        number = _asked(client, RotateWrapping(), ROTATE_TIME).wrapping
    if as_json:
        say_json({"wrapping": number})
    else:
        say(f"everything is sealed with wrapping key {number}; the device key is what it was")


def _key(client: OperatorClient) -> DeviceKey:
    found: DeviceKey = _asked(client, GetPublicKey(), ASK_TIME)
    return found


def _asked(client: OperatorClient, request: Request[Any], seconds: float) -> Any:
    """keystored's answer; what a refusal means is said."""
    try:
        return client.relay(KEYSTORED, PROTOCOL, request, seconds)
    except ServiceRefused as error:
        why = WHY.get(error.status)
        if error.status is ReplyStatus.DENIED:
            why = f"operator has no right {RIGHTS[type(request)]}: give it in the system file"
        if why is None:
            raise
        raise CommandFailed(f"{KEYSTORED}: {error.status.name}, {why}") from error


def _read(file: Path) -> bytes:
    """What is to be signed; no more than that is read."""
    payload = read_input(file, SIGN_SIZE_MAX)
    if len(payload) > SIGN_SIZE_MAX:
        raise UsageError(
            f"{file} has more than {SIGN_SIZE_MAX} bytes: sign a digest of it, as in "
            f"`sha256sum < {file} | nexus keys sign -`"
        )
    return payload
