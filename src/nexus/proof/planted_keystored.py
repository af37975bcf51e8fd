"""What saboteurs break inside keystored, by rung.

In the simulator it is planted into the process that simulates; on linux keystored runs in an
interpreter of its own, whose entry is then `sabotaged`. Only who plants imports this: what
cryptography holds is not to be in init's process.
"""

# ruff: noqa: SLF001 (saboteurs break what is private)

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Annotated, Any, Final

from nexus.abi import Nanos
from nexus.ipc.exchange import Caller
from nexus.proof.sabotage import replace
from nexus.protocols.keystored import Done, ExportPrivateKey
from nexus.runtime import Refusal, Server, ServiceConfig
from nexus.runtime.program import Context, Main, program_of
from nexus.services.keystored.ed25519 import SEED_SIZE, public_of
from nexus.services.keystored.places import Asked, StateRecords
from nexus.services.keystored.sealing import Wrapping, seal
from nexus.services.keystored.secret import Secret
from nexus.services.keystored.service import Keystored
from nexus.services.keystored.vault import DEVICE_PATH, ROOT, Vault
from nexus.wire import Blob, ReplyStatus, answer, encode

FRESH: Final = 3_000_000_000  # ns; longer than the client of rung 74 gives


def sabotaged(number: str) -> Main:
    """keystored with the fault of a rung."""
    plant(int(number))
    return program_of(Keystored)


def plant(number: int) -> None:
    """Break what turns this rung red."""
    _PLANTS[number]()


class _Memory:
    """keystored.places.Records with nothing in it, in the place of what could not be read."""

    def __init__(self, records: StateRecords) -> None:
        self._statefsd = records._statefsd

    async def get(self, _path: bytes, _until: Nanos) -> None:
        """There is nothing."""

    async def page(self, _prefix: bytes, _after: bytes, until: Nanos) -> tuple[list[bytes], bool]:
        """There is nothing; statefsd is named all the same."""
        self._statefsd._note(await self._statefsd.connect(until))
        return [], False


def _opened_in_memory() -> None:
    """#35: what the opening would read it takes from an empty memory."""

    async def opened(vault: Any, until: Nanos) -> Any:
        records = vault._records
        vault._records = _Memory(records)
        try:
            return await original(vault, until)
        finally:
            vault._records = records

    original = replace(Vault, "open", opened)


def _fresh_deadlines() -> None:
    """#74: every call that keystored makes has time of its own."""
    callers: list[Caller] = []

    def begin(asked: Asked, context: Any, *rest: Any) -> None:
        callers.append(context.peers.caller)
        original_init(asked, context, *rest)

    def deadline_within(caller: Caller, parent: Any, own: Nanos) -> Nanos:
        if any(each is caller for each in callers):
            return Nanos(own + FRESH)
        nested: Nanos = original(caller, parent, own)
        return nested

    original_init = replace(Asked, "__init__", begin)
    original = replace(Caller, "deadline_within", deadline_within)


def _one_key_space() -> None:
    """#107."""
    _ = replace(Keystored, "_prefix", lambda _service, _call: ROOT + b"everybody/")


class _Own:
    """keystored.places.Random: the process's own."""

    async def draw(self, size: int, _until: Nanos) -> bytes:
        return os.urandom(size)


def _own_randomness() -> None:
    """#108: the device key's seed alone."""

    async def generate(vault: Any, until: Nanos) -> bytes:
        _ = await vault.prepare(until)
        random, vault._random = vault._random, _Own()
        try:
            public: bytes = await original(vault, until)
        finally:
            vault._random = random
        return public

    original = replace(Vault, "generate", generate)


class _Exported(Done):
    """Says more than it should."""

    blob: Annotated[bytes, Blob(size_max=256)]


def _blob_exported() -> None:
    """#109: what is stored of the key is given, and the record is written as ever."""

    async def handle(service: Any, call: Any, request: Any) -> Any:
        if not isinstance(request, ExportPrivateKey):
            return await original(service, call, request)
        with suppress(Refusal):
            _ = service._refuse_export(call)
        return _Exported(await service._records.get(DEVICE_PATH, call.deadline))

    def framed(server: Any, reply: Any) -> Any:
        if not isinstance(reply, _Exported):
            return original_framed(server, reply)
        return answer(server._call.message.data, ReplyStatus.OK, encode(reply))

    original = replace(Keystored, "handle", handle)
    original_framed = replace(Server, "_framed", framed)


def _new_key_for_a_lost_one() -> None:
    """#110: in a later boot the key is not loaded, and another one is made."""
    boots: list[int] = []

    def begin(service: Keystored, context: Context) -> None:
        boots.append(ServiceConfig.of(context.boot).boot)
        original_init(service, context)

    async def device(vault: Any, until: Nanos) -> Secret | None:
        seed: Secret | None = await original(vault, until)
        if seed is None or vault.keygens or not boots[-1]:
            return seed
        seed.wipe()
        wrapping, nonces = await vault._ensured(until), await vault._refill(until)
        fresh = Secret(await vault._random.draw(SEED_SIZE, until))
        record = seal(wrapping.current, nonces.take(), DEVICE_PATH, fresh.data)
        await vault._records.put({DEVICE_PATH: record}, until)
        vault.keygens += 1
        await vault._replace(Wrapping(keys=wrapping.keys, device=public_of(fresh)))
        return fresh

    original_init = replace(Keystored, "__init__", begin)
    original = replace(Vault, "device", device)


_PLANTS: Final[Mapping[int, Callable[[], None]]] = MappingProxyType(
    {
        35: _opened_in_memory,
        74: _fresh_deadlines,
        107: _one_key_space,
        108: _own_randomness,
        109: _blob_exported,
        110: _new_key_for_a_lost_one,
    }
)
