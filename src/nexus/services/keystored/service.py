"""keystored: a service's small values, and the device key, which never leaves.

Owns the area /state/keystore/ of statefsd, where everything is sealed, and the wrapping key that
the kernel keeps for it alone. A value belongs to the caller the kernel stamped, and to no other;
about the device key policyd decides. It trusts rngd for entropy and has no other source. What it
stands on missing, it refuses: nothing is kept in memory instead. It logs and prints no secret,
and no value, and nobody gets the private key, whatever the policy says. Decision: docs/adr/0014.
"""

import json
from contextlib import suppress
from typing import Any, Final, assert_never

from nexus.abi import AbiError, ConsoleWrite, Nanos, Now, SecretBackend
from nexus.ipc import deadline_after, nested_deadline
from nexus.protocols.keystored import (
    ENTRIES_MAX,
    KEYGEN_RIGHT,
    NAME_SIZE_MAX,
    PROTOCOL,
    PUBKEY_RIGHT,
    ROTATE_RIGHT,
    SIGN_RIGHT,
    SIGN_SIZE_MAX,
    VALUE_SIZE_MAX,
    Delete,
    DeviceKey,
    Done,
    ExportPrivateKey,
    GenerateKey,
    Get,
    GetPublicKey,
    GetStore,
    KeyState,
    KeystoredRequest,
    KeystoredStatus,
    Put,
    Rotated,
    RotateWrapping,
    Sign,
    Signature,
    Store,
    Value,
    Verdict,
    Verify,
)
from nexus.protocols.logd import Level
from nexus.protocols.meta import HEALTH_ANSWER
from nexus.runtime import Call
from nexus.runtime.authority import AUDIT_SCOPE
from nexus.runtime.program import Context
from nexus.services.keystored.ed25519 import device_id_of, public_of, sign, verify
from nexus.services.keystored.faults import Unusable
from nexus.services.keystored.places import STATEFSD_NAME, KernelKept, RngdRandom, StateRecords
from nexus.services.keystored.secret import Secret
from nexus.services.keystored.vault import ROOT, Vault

START_MAX: Final = Nanos(1_000_000_000)  # ns; inside the readiness deadline of 2 s
WORK_MAX: Final = Nanos(1_500_000_000)  # ns for one request, whatever its deadline
SETTLE_MAX: Final = Nanos(250_000_000)  # ns of one attempt to put right what a start could not
SETTLE_PAUSE: Final = Nanos(500_000_000)  # ns before the first of them, doubling
SETTLE_PAUSE_MAX: Final = Nanos(16_000_000_000)  # ns; nobody is served during an attempt
DEVICE_TARGET: Final = "device"  # of the decisions about the device key

# A probe that came right after a request, and an attempt before it, is answered in time.
assert WORK_MAX + SETTLE_MAX < HEALTH_ANSWER

Reply = Done | Value | Verdict | DeviceKey | Signature | Rotated | Store


class Keystored:
    """Serves nexus.protocols.keystored."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._context = context
        self._records = StateRecords(context)
        self._kept = KernelKept()
        self._random = RngdRandom(context)
        self._vault = Vault(self._records, self._random, self._kept)
        self._backend = SecretBackend.NONE
        self._due: Nanos | None = None  # when to try again what is not settled
        self._pause = SETTLE_PAUSE
        self._exports = 0
        self._signatures = 0

    async def start(self) -> None:
        """Open what there is, and finish what a cut left; what fails is tried again later."""
        self._backend = await self._kept.backend()
        until = await self._context.after(START_MAX)
        for connect in (self._records.connect, self._random.connect):
            with suppress(Unusable):  # the planned links are there also if nothing can be opened
                _ = await connect(until)
        await self._settle(START_MAX)

    async def handle(self, call: Call, request: KeystoredRequest) -> Reply:
        """The reply."""
        until = nested_deadline(call.deadline, deadline_after(call.now, WORK_MAX))
        try:
            match request:
                case Put():
                    return await self._put(call, request, until)
                case Get():
                    return await self._get(call, request, until)
                case Delete():
                    return await self._delete(call, request, until)
                case Verify():
                    return self._verify(call, request)
                case GenerateKey():
                    return await self._generate(call, until)
                case GetPublicKey():
                    return await self._public_key(call, until)
                case Sign():
                    return await self._sign(call, request, until)
                case ExportPrivateKey():
                    return self._refuse_export(call)
                case RotateWrapping():
                    return await self._rotate(call, until)
                case GetStore():
                    return await self._store(until)
                case _:
                    assert_never(request)
        except Unusable as fault:
            call.note("why", fault.why)
            raise call.refuse(fault.status) from None

    def next_time(self) -> Nanos | None:
        """When to try again what is not settled."""
        return self._due

    async def on_time(self, now: Nanos) -> None:
        """Try again."""
        self._pause = min(Nanos(2 * self._pause), SETTLE_PAUSE_MAX)
        self._plan_settling(now)
        await self._settle(SETTLE_MAX)

    def ready(self) -> bool:
        """Whether statefsd has been read, and it is known how it stands with the wrapping key."""
        return self._vault.opened

    def evidence(self) -> dict[str, Any]:
        """What it stands on, with the line that says it is ready."""
        return {
            "store": STATEFSD_NAME,
            "statefsd_generation": self._records.generation,
            "backend": self._backend.name.lower(),
            "wrapping": self._vault.number,
        }

    def facts(self) -> dict[str, int]:
        """What it has done, in this instance's life."""
        vault = self._vault
        return {
            "damaged_total": vault.damaged,
            "exports_refused_total": self._exports,
            "keygens_total": vault.keygens,
            "rotations_total": vault.rotations,
            "signatures_total": self._signatures,
            "statefsd_generation": self._records.generation,
            "wrapping": vault.number,
        }

    # ------------------------------------------------------------------ values

    async def _put(self, call: Call, request: Put, until: Nanos) -> Done:
        path = self._path(call, request.name)
        if len(request.value) > VALUE_SIZE_MAX:
            raise call.refuse(KeystoredStatus.TOO_LARGE)
        if not await self._vault.has_room(self._prefix(call), path, ENTRIES_MAX, until):
            raise call.refuse(KeystoredStatus.OVER_LIMIT)
        await self._vault.put(path, request.value, until)
        return Done()

    async def _get(self, call: Call, request: Get, until: Nanos) -> Value:
        value = await self._vault.get(self._path(call, request.name), until)
        if value is None:
            raise call.refuse(KeystoredStatus.NOT_FOUND)
        with value:
            return Value(bytes(value.data))

    async def _delete(self, call: Call, request: Delete, until: Nanos) -> Done:
        if not await self._vault.delete(self._path(call, request.name), until):
            raise call.refuse(KeystoredStatus.NOT_FOUND)
        return Done()

    def _prefix(self, call: Call) -> bytes:
        """Where the caller's values are: the kernel's word, and nothing of the payload."""
        return ROOT + b"%016x/" % call.sender.service

    def _path(self, call: Call, name: bytes) -> bytes:
        if len(name) > NAME_SIZE_MAX:
            raise call.refuse(KeystoredStatus.TOO_LARGE)
        return self._prefix(call) + name.hex().encode()

    def _verify(self, call: Call, request: Verify) -> Verdict:
        if len(request.payload) > SIGN_SIZE_MAX:
            raise call.refuse(KeystoredStatus.TOO_LARGE)
        return Verdict(verify(request.public_key, request.signature, request.payload))

    # ------------------------------------------------------------------ the device key

    async def _generate(self, call: Call, until: Nanos) -> DeviceKey:
        await self._require(call, KEYGEN_RIGHT)
        key = _shown(await self._vault.generate(until))
        self._context.log.info("device key generated", device_id=key.device_id)
        evidence = {"device_id": key.device_id, "public_key": key.public_key.hex()}
        with suppress(AbiError):  # the console is for people; the key is there without it
            line = f"{self._context.name}: device key generated"
            await ConsoleWrite(line, json.dumps(evidence).encode())
        return key

    async def _public_key(self, call: Call, until: Nanos) -> DeviceKey:
        await self._require(call, PUBKEY_RIGHT)
        with await self._device(call, until) as seed:
            return _shown(public_of(seed))

    async def _sign(self, call: Call, request: Sign, until: Nanos) -> Signature:
        await self._require(call, SIGN_RIGHT)
        if len(request.payload) > SIGN_SIZE_MAX:
            raise call.refuse(KeystoredStatus.TOO_LARGE)
        with await self._device(call, until) as seed:
            signature = sign(seed, request.payload)
        self._signatures += 1
        return Signature(signature)

    def _refuse_export(self, call: Call) -> Done:
        """No right allows it, so policyd is not asked, and the record is ours to write."""
        self._exports += 1
        sender = call.sender
        fields: dict[str, str | int] = {
            "op": "export",
            "decision": "deny",
            "reason": "never",
            "subject": f"0x{sender.service:016x}",
            "action": "device.key.export",
            "target": DEVICE_TARGET,
            "number": self._exports,
            "trace": call.parent.trace.hex(),
        }
        _ = self._context.log.write(Level.WARN, "audit", fields, scope=AUDIT_SCOPE)
        raise call.refuse(KeystoredStatus.EXPORT_DENIED)

    async def _rotate(self, call: Call, until: Nanos) -> Rotated:
        await self._require(call, ROTATE_RIGHT)
        try:
            number = await self._vault.rotate(until)
        except Unusable:
            self._plan_settling(call.now)
            raise
        damaged = self._vault.damaged
        self._context.log.info("wrapping key rotated", wrapping=number, damaged=damaged)
        return Rotated(number)

    async def _device(self, call: Call, until: Nanos) -> Secret:
        seed = await self._vault.device(until)
        if seed is None:
            raise call.refuse(KeystoredStatus.KEY_NOT_FOUND)
        return seed

    async def _require(self, call: Call, right: str) -> None:
        await self._context.authority.require(call, right, DEVICE_TARGET)

    async def _store(self, until: Nanos) -> Store:
        state = await self._device_state(until)
        return Store(
            statefsd_generation=self._records.generation,
            backend=int(self._backend),
            wrapping=self._vault.number,
            keygens=self._vault.keygens,
            device_key=state,
        )

    async def _device_state(self, until: Nanos) -> KeyState:
        """As who would use the key now finds it."""
        try:
            seed = await self._vault.device(until)
        except Unusable as fault:
            is_damaged = fault.status is KeystoredStatus.CORRUPTED
            return KeyState.DAMAGED if is_damaged else KeyState.UNKNOWN
        if seed is None:
            return KeyState.ABSENT
        seed.wipe()
        return KeyState.PRESENT

    # ------------------------------------------------------------------ what a cut left

    async def _settle(self, span: Nanos) -> None:
        """Open, finish a rotation, make ahead what a first write needs; come back for the rest."""
        now = await Now()
        until = deadline_after(now, span)
        sealed = self._vault.sealed
        try:
            await self._vault.settle(until)
            await self._vault.prepare(until)
        except Unusable as fault:
            if fault.status is KeystoredStatus.CORRUPTED:
                self._due = None  # no attempt makes it better; who asks is told
                fields = {"why": fault.why}
                _ = self._context.log.write(Level.ERROR, "keys cannot be opened", fields)
            else:
                if self._vault.sealed > sealed:
                    self._pause = SETTLE_PAUSE  # there is more of it than one attempt does
                self._plan_settling(await Now())
        else:
            self._due = None
            self._pause = SETTLE_PAUSE

    def _plan_settling(self, now: Nanos) -> None:
        self._due = deadline_after(now, self._pause)


def _shown(public_key: bytes) -> DeviceKey:
    return DeviceKey(public_key, device_id_of(public_key))
