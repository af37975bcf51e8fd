"""keystored between fakes of what it stands on, and the real policyd."""

import json
from collections.abc import Callable
from typing import Any, Final

import pytest

from nexus.abi import Nanos, Now, SecretBackend, SleepUntil, service_id
from nexus.init.system import HEALTH_DEADLINE_DEFAULT
from nexus.ipc import Peers, Refused, TimedOut
from nexus.protocols.keystored import (
    ENTRIES_MAX,
    NAME_SIZE_MAX,
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
from nexus.protocols.meta import (
    HEALTH_ANSWER,
    GetStatus,
    Health,
    Healthy,
    MetaStatus,
    ServiceStatus,
)
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import CheckFor, Decision, Reason
from nexus.protocols.policyd import Verdict as Ruling
from nexus.protocols.statefsd import Durability, StatefsdStatus
from nexus.runtime import Call, Deferred, Server
from nexus.services.keystored.ed25519 import device_id_of, public_of, verify
from nexus.services.keystored.sealing import BOUND_SIZE, NONCE_PREFIX_SIZE, number_of
from nexus.services.keystored.secret import Secret
from nexus.services.keystored.service import SETTLE_PAUSE
from nexus.services.keystored.vault import DEVICE_PATH
from nexus.wire import ReplyStatus
from tests.fakes.keys import RIGHTS, KeySystem

MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
UNAVAILABLE: Final = Refused(KeystoredStatus.UNAVAILABLE)
CORRUPTED: Final = Refused(KeystoredStatus.CORRUPTED)
DENIED: Final = Refused(ReplyStatus.DENIED)
WORK: Final = (
    Put(b"n", b"v"),
    Get(b"n"),
    Delete(b"n"),
    GenerateKey(),
    GetPublicKey(),
    Sign(b"payload"),
    RotateWrapping(),
)
"""Every request that needs what keystored stands on."""


def facts(system: KeySystem) -> dict[str, int]:
    (status,) = system.ask(GetStatus())
    assert isinstance(status, ServiceStatus)
    return {fact.name: fact.value for fact in status.facts}


def audits(system: KeySystem) -> list[dict[str, str]]:
    """Of keystored's own records in the journal, those of an audit."""
    return [
        {field.key: field.value for field in record.fields}
        for record in system.system.logd.records
        if record.scope == "audit"
    ]


# ------------------------------------------------------------------ values


def test_a_value_is_put_got_replaced_and_deleted() -> None:
    found = KeySystem().ask(
        Get(b"n"),
        Put(b"n", b"one"),
        Get(b"n"),
        Put(b"n", b""),
        Get(b"n"),
        Delete(b"n"),
        Get(b"n"),
        Delete(b"n"),
    )

    missing = Refused(KeystoredStatus.NOT_FOUND)
    assert found == [
        missing, Done(), Value(b"one"), Done(), Value(b""), Done(), missing, missing,
    ]  # fmt: skip


def test_a_name_belongs_to_the_service_that_the_kernel_says_is_calling() -> None:
    system = KeySystem()

    assert system.ask(Put(b"n", b"app's")) == [Done()]
    assert (
        system.ask(Get(b"n"), Delete(b"n"), name="other")
        == [Refused(KeystoredStatus.NOT_FOUND)] * 2
    )
    assert system.ask(Put(b"n", b"other's"), name="other") == [Done()]
    assert system.ask(Get(b"n")) == [Value(b"app's")]
    assert sorted(system.records) == sorted(
        b"/state/keystore/%016x/6e" % service_id(name) for name in ("app", "other")
    )


def test_everything_is_written_durably_and_sealed() -> None:
    system = KeySystem()

    system.ask(Put(b"name", b"the value itself"), GenerateKey(), Delete(b"name"))

    assert set(system.statefsd.durabilities) == {Durability.DURABLE}
    assert len(system.statefsd.durabilities) == 3
    assert b"the value itself" not in b"".join(system.records.values())


@pytest.mark.parametrize(
    "name", [b"\0", b"/../", b"\xff" * NAME_SIZE_MAX, b"%00", b"device.signing"]
)
def test_no_name_leads_out_of_the_callers_own_place(name: bytes) -> None:
    system = KeySystem()

    assert system.ask(Put(name, b"v"), Get(name)) == [Done(), Value(b"v")]

    (path,) = system.records
    assert path == b"/state/keystore/%016x/" % service_id("app") + name.hex().encode()
    assert len(path) <= 255


@pytest.mark.covers("keystored.TOO_LARGE")
def test_what_is_too_large_has_a_status_and_changes_nothing() -> None:
    system = KeySystem()
    too_large = Refused(KeystoredStatus.TOO_LARGE)
    name, value = (NAME_SIZE_MAX + 1) * b"n", (VALUE_SIZE_MAX + 1) * b"v"
    payload = (SIGN_SIZE_MAX + 1) * b"p"

    found = system.ask(
        Put(name, b""),
        Put(b"n", value),
        Get(name),
        Delete(name),
        Sign(payload),
        Verify(bytes(32), bytes(64), payload),
        Put(name[1:], value[1:]),
    )

    assert found == [too_large] * 6 + [Done()]
    assert len(system.records) == 1


@pytest.mark.covers("keystored.OVER_LIMIT")
def test_a_caller_has_so_many_entries_and_takes_none_from_another() -> None:
    system = KeySystem()

    found = system.ask(*(Put(b"%d" % each, b"") for each in range(ENTRIES_MAX + 2)))

    assert found == [Done()] * ENTRIES_MAX + [Refused(KeystoredStatus.OVER_LIMIT)] * 2
    assert system.ask(Put(b"0", b"replaced"), Get(b"0")) == [Done(), Value(b"replaced")]
    assert system.ask(Put(b"0", b""), name="other") == [Done()]
    assert system.ask(Delete(b"1"), Put(b"new", b"")) == [Done(), Done()]


def test_every_instance_seals_with_a_prefix_that_rngd_drew_for_it() -> None:
    system = KeySystem()
    assert system.ask(Put(b"1", b"v")) == [Done()]
    ((_, first),) = system.records.items()
    drawn = len(system.numbers.given)
    system.restart()
    assert system.ask(Put(b"2", b"v")) == [Done()]
    (second,) = {*system.records.values()} - {first}

    prefixes = [each[BOUND_SIZE : BOUND_SIZE + NONCE_PREFIX_SIZE] for each in (first, second)]

    assert prefixes[0] in system.numbers.given[:drawn]
    assert prefixes[1] in system.numbers.given[drawn:]
    assert prefixes[0] != prefixes[1]


@pytest.mark.parametrize("excess", [-1, 1])
def test_nothing_is_made_of_more_or_less_entropy_than_was_asked_for(excess: int) -> None:
    system = KeySystem()
    assert system.ask(Put(b"n", b"v")) == [Done()]
    secret, records, asked = system.secret, {**system.records}, len(system.rngd.sizes)
    system.rngd.excess = excess

    assert system.ask(GenerateKey(), RotateWrapping()) == [UNAVAILABLE] * 2

    assert len(system.rngd.sizes) == asked + 2
    assert (system.secret, system.records) == (secret, records)
    system.rngd.excess = 0
    assert isinstance(system.ask(GenerateKey())[0], DeviceKey)


# ------------------------------------------------------------------ the device key


@pytest.mark.covers("keystored.KEY_NOT_FOUND", "keystored.KEY_EXISTS")
def test_the_device_key_is_made_of_rngds_entropy_once() -> None:
    system = KeySystem()
    missing = Refused(KeystoredStatus.KEY_NOT_FOUND)
    assert system.ask(GetPublicKey(), Sign(b"")) == [missing, missing]
    drawn = len(system.rngd.sizes)

    (made, again, shown) = system.ask(GenerateKey(), GenerateKey(), GetPublicKey())

    assert system.rngd.sizes[drawn:] == [32], "the seed, and nothing else"
    public = public_of(Secret(system.numbers.given[-1]))
    assert made == shown == DeviceKey(public, device_id_of(public))
    assert again == Refused(KeystoredStatus.KEY_EXISTS)


def test_the_same_key_signs_after_every_restart_and_none_is_made() -> None:
    system = KeySystem()
    (made,) = system.ask(GenerateKey())

    for _ in range(3):
        system.restart()
        shown, signature, again, store = system.ask(
            GetPublicKey(), Sign(b"payload"), GenerateKey(), GetStore()
        )
        assert shown == made
        assert isinstance(signature, Signature)
        assert verify(made.public_key, signature.signature, b"payload")
        assert again == Refused(KeystoredStatus.KEY_EXISTS)
        assert store.keygens == 0
        assert store.device_key is KeyState.PRESENT


def test_a_generated_key_is_said_on_the_console_by_its_public_half() -> None:
    system = KeySystem()

    (made,) = system.ask(GenerateKey())

    (evidence,) = [
        evidence
        for name, line, evidence in system.kernel.console
        if (name, line) == ("keystored", "keystored: device key generated")
    ]
    assert json.loads(evidence) == {
        "device_id": made.device_id,
        "public_key": made.public_key.hex(),
    }


def test_verification_needs_no_key_of_ours() -> None:
    system = KeySystem()
    made, signature = system.ask(GenerateKey(), Sign(b"payload"))
    system.statefsd.silent = True

    found = system.ask(
        Verify(made.public_key, signature.signature, b"payload"),
        Verify(made.public_key, signature.signature, b"another"),
        Verify(bytes(32), signature.signature, b"payload"),
        name="other",
    )

    assert found == [Verdict(True), Verdict(False), Verdict(False)]


@pytest.mark.covers("keystored.EXPORT_DENIED")
def test_the_private_key_is_exported_to_nobody_and_each_attempt_is_audited() -> None:
    everything = (*RIGHTS, "device.key.export", "policy.authority", "proof.control")
    system = KeySystem({"app": everything})
    system.ask(GenerateKey())

    found = [*system.ask(ExportPrivateKey()), *system.ask(ExportPrivateKey(), name="other")]
    system.kernel.run(system.system.add_client(_nap), until=system.ahead(SECOND))

    assert found == [Refused(KeystoredStatus.EXPORT_DENIED)] * 2
    assert [(each["op"], each["decision"], each["subject"]) for each in audits(system)] == [
        ("export", "deny", f"0x{service_id(name):016x}") for name in ("app", "other")
    ]
    assert facts(system)["exports_refused_total"] == 2


async def _nap(peers: Peers) -> None:
    _ = await SleepUntil(Nanos(await Now() + 50 * MS))


# ------------------------------------------------------------------ rights

GATED: Final = dict(
    zip(RIGHTS, (GenerateKey(), GetPublicKey(), Sign(b"p"), RotateWrapping()), strict=True)
)


@pytest.mark.parametrize("right", RIGHTS)
def test_each_request_needs_its_own_right_and_no_other_helps(right: str) -> None:
    rest = tuple(each for each in RIGHTS if each != right)
    system = KeySystem({"other": rest})
    system.ask(GenerateKey())
    before = dict(system.records)

    assert system.ask(GATED[right], name="other") == [DENIED]

    assert system.records == before
    (denial,) = [
        each
        for each in system.system.logd.audits()
        if each.get("action") == right and each.get("decision") == "deny"
    ]
    assert (denial["subject"], denial["asked_by"]) == ("other", "keystored")


@pytest.mark.parametrize("right", RIGHTS)
def test_what_is_allowed_is_audited_too(right: str) -> None:
    system = KeySystem()
    system.ask(GenerateKey(), GATED[right])

    decisions = [
        (each["subject"], each["decision"])
        for each in system.system.logd.audits()
        if each.get("action") == right
    ]

    assert ("app", "allow") in decisions


def test_without_the_right_to_ask_for_others_nobody_may_do_anything() -> None:
    system = KeySystem({"keystored": ()})

    assert system.ask(*GATED.values()) == [DENIED] * 4
    assert DEVICE_PATH not in system.records


def test_a_right_is_looked_at_before_the_size_of_what_is_to_be_signed() -> None:
    system = KeySystem({"other": ()})

    assert system.ask(Sign((SIGN_SIZE_MAX + 1) * b"p"), name="other") == [DENIED]


class Judge:
    """A policyd that answers as it is told."""

    def __init__(self, say: Callable[[Call, CheckFor], Any]) -> None:
        self._say = say

    def handle(self, call: Call, request: CheckFor) -> Decision | Deferred:
        answer: Decision | Deferred = self._say(call, request)
        return answer


def _silent(call: Call, request: CheckFor) -> Deferred:
    return call.defer()


def _stale(call: Call, request: CheckFor) -> Decision:
    """By a policy that is no longer in force."""
    return Decision(Ruling.ALLOW, Reason.POLICY, 0, 1)


def _unreasonable(call: Call, request: CheckFor) -> Decision:
    """Allowed, and not by policy: no policyd says so."""
    return Decision(Ruling.ALLOW, Reason.MALFORMED, 9, 1)


def _busy(call: Call, request: CheckFor) -> Decision:
    raise call.refuse(ReplyStatus.BUSY)


@pytest.mark.parametrize("say", [_silent, _stale, _unreasonable, _busy])
def test_whatever_is_no_decision_is_a_denial(say: Callable[[Call, CheckFor], Any]) -> None:
    system = KeySystem(policyd=False, start=False)
    system.system.start("policyd", lambda boot: Server(Judge(say), POLICYD, boot).run())
    system.start()

    assert system.ask(*GATED.values()) == [DENIED] * 4
    assert DEVICE_PATH not in system.records
    assert system.ask(Put(b"n", b"v"), Get(b"n")) == [Done(), Value(b"v")], "it needs no right"


def test_a_policyd_that_is_gone_denies_and_its_successor_is_asked() -> None:
    system = KeySystem()
    system.ask(GenerateKey())
    system.system.kill("policyd")
    system.system.raise_page(available=False)

    assert system.ask(Sign(b"p")) == [DENIED]

    system.system.start_policyd()
    system.system.raise_page(available=True)
    (signed,) = system.ask(Sign(b"p"))
    assert isinstance(signed, Signature)


# ------------------------------------------------------------------ what it stands on fails


@pytest.mark.covers("keystored.UNAVAILABLE")
@pytest.mark.parametrize("status", [StatefsdStatus.IO_ERROR, ReplyStatus.DENIED])
def test_a_statefsd_that_refuses_is_no_reason_to_keep_anything_in_memory(status: Any) -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"old"), GenerateKey())
    before = dict(system.records), system.secret
    system.statefsd.refuses = system.statefsd.refuses_reads = status

    found = system.ask(*WORK)

    assert found == [UNAVAILABLE] * len(WORK)
    assert (dict(system.records), system.secret) == before
    system.statefsd.refuses = system.statefsd.refuses_reads = None
    assert system.ask(Get(b"n")) == [Value(b"old")]


def test_a_full_store_refuses_writes_and_what_is_there_can_be_read() -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"old"), GenerateKey())
    system.statefsd.refuses = StatefsdStatus.OVER_QUOTA

    put, got, signed, rotated = system.ask(
        Put(b"n", b"new"), Get(b"n"), Sign(b"p"), RotateWrapping()
    )

    assert (put, got, rotated) == (UNAVAILABLE, Value(b"old"), UNAVAILABLE)
    assert isinstance(signed, Signature)


def test_an_answer_that_is_not_durable_is_not_passed_on_as_one() -> None:
    system = KeySystem()
    system.statefsd.accepted = True

    assert system.ask(Put(b"n", b"v"), GenerateKey()) == [UNAVAILABLE] * 2


def test_a_silent_statefsd_costs_no_caller_more_than_its_deadline() -> None:
    system = KeySystem()
    assert system.ask(Put(b"n", b"v")) == [Done()]
    system.statefsd.silent = True
    begun = system.kernel.now

    (outcome,) = system.ask(Get(b"n"), wait=300 * MS)

    assert isinstance(outcome, TimedOut) or outcome == UNAVAILABLE
    assert system.kernel.now - begun < 400 * MS
    assert system.statefsd.asked[-1] == "Get"
    assert system.statefsd.deadlines[-1] <= begun + 301 * MS, "the caller's own deadline"


def test_a_statefsd_that_hangs_keeps_no_probe_waiting() -> None:
    system = KeySystem()
    assert system.ask(Put(b"n", b"v")) == [Done()]
    system.statefsd.silent = True
    begun = system.kernel.now

    refused, at_once, health = system.ask(Get(b"n"), Get(b"n"), Health(), wait=20 * SECOND)

    assert (refused, at_once) == (UNAVAILABLE, UNAVAILABLE)
    assert isinstance(health, Healthy)
    assert system.kernel.now - begun < HEALTH_ANSWER == HEALTH_DEADLINE_DEFAULT
    system.statefsd.silent = False
    system.kernel.run(system.system.add_client(_nap_long), until=system.ahead(10 * SECOND))
    assert system.ask(Get(b"n")) == [Value(b"v")]


def test_a_statefsd_that_is_restarted_is_found_again() -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"v"))

    system.system.kill("statefsd")
    system.start_statefsd()

    got, store = system.ask(Get(b"n"), GetStore())
    assert got == Value(b"v")
    assert store.statefsd_generation == 2


def test_damage_in_statefsd_is_corrupted_and_not_missing() -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"v"), GenerateKey())
    system.statefsd.refuses_reads = StatefsdStatus.CORRUPTED

    assert system.ask(Get(b"n"), Sign(b"p"), GetPublicKey(), GenerateKey()) == [CORRUPTED] * 4


def test_without_rngd_nothing_is_made_and_what_is_there_is_served() -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"v"))
    system.rngd.down = True

    assert system.ask(GenerateKey(), RotateWrapping(), Get(b"n"), Put(b"n", b"w")) == [
        UNAVAILABLE, UNAVAILABLE, Value(b"v"), Done(),
    ]  # fmt: skip
    assert DEVICE_PATH not in system.records


def test_a_first_start_without_rngd_makes_no_wrapping_key_until_rngd_is_there() -> None:
    system = KeySystem(start=False)
    system.rngd.down = True
    system.start()

    health, put = system.ask(Health(), Put(b"n", b"v"))

    assert isinstance(health, Healthy), "it is known that there is none"
    assert put == UNAVAILABLE
    assert system.secret == b""
    system.rngd.down = False
    assert system.ask(Put(b"n", b"v"), Get(b"n")) == [Done(), Value(b"v")]


@pytest.mark.parametrize("trap", ["SecretRead", "SecretReplace"])
def test_a_secret_that_cannot_be_had_is_unavailable(trap: str) -> None:
    system = KeySystem(start=False)
    system.kernel.secret_faults = {trap}
    system.start()

    assert system.ask(Put(b"n", b"v"), GenerateKey(), RotateWrapping()) == [UNAVAILABLE] * 3
    assert system.records == {}

    system.kernel.secret_faults.clear()
    assert system.ask(Put(b"n", b"v")) == [Done()]


def test_without_the_grant_there_are_no_keys() -> None:
    system = KeySystem(start=False)
    del system.kernel.secrets["keystored"]
    system.start()

    put, store = system.ask(Put(b"n", b"v"), GetStore())

    assert put == UNAVAILABLE
    assert store.backend == SecretBackend.NONE


@pytest.mark.covers("keystored.CORRUPTED")
def test_a_lost_secret_is_corrupted_for_everybody_and_is_never_replaced() -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"v"), GenerateKey())
    system.kernel.secrets["keystored"] = b""
    system.restart()

    assert system.ask(*(each for each in WORK if not isinstance(each, Delete))) == [CORRUPTED] * 6
    health, store = system.ask(Health(), GetStore())
    assert isinstance(health, Healthy), "it is known how it stands, and that is what it says"
    assert store.wrapping == 0
    assert system.secret == b""


def test_a_secret_that_is_damaged_is_told_and_is_no_reason_not_to_be_ready() -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"v"), GenerateKey())
    system.kernel.secrets["keystored"] = b"\0"  # what linux gives for an empty file
    system.restart()

    health, got, store = system.ask(Health(), Get(b"n"), GetStore())

    assert isinstance(health, Healthy)
    assert (got, store.device_key) == (CORRUPTED, KeyState.DAMAGED)
    assert "keys cannot be opened" in [record.text for record in system.system.logd.records]
    assert system.secret == b"\0"


def test_the_store_says_how_it_stands_with_the_device_key() -> None:
    system = KeySystem()
    absent, _, present = system.ask(GetStore(), GenerateKey(), GetStore())
    record = system.records[DEVICE_PATH]
    system.records[DEVICE_PATH] = record[:-1] + bytes([record[-1] ^ 1])
    (damaged,) = system.ask(GetStore())
    del system.records[DEVICE_PATH]
    (gone,) = system.ask(GetStore())
    system.statefsd.refuses_reads = StatefsdStatus.IO_ERROR
    (unknown,) = system.ask(GetStore())

    assert [each.device_key for each in (absent, present, damaged, gone, unknown)] == [
        KeyState.ABSENT, KeyState.PRESENT, KeyState.DAMAGED, KeyState.DAMAGED, KeyState.UNKNOWN,
    ]  # fmt: skip


# ------------------------------------------------------------------ start and rotation


def test_it_is_not_ready_before_statefsd_was_read() -> None:
    system = KeySystem(start=False)
    system.statefsd.silent = True
    system.start()
    early = system.ask(Health(), wait=1_500 * MS)

    system.statefsd.silent = False
    system.kernel.run(system.system.add_client(_nap_long), until=system.ahead(10 * SECOND))

    assert early == [Refused(MetaStatus.NOT_READY)]
    (health,) = system.ask(Health())
    assert isinstance(health, Healthy)


async def _nap_long(peers: Peers) -> None:
    _ = await SleepUntil(Nanos(await Now() + 4 * SETTLE_PAUSE))


def test_what_it_stands_on_is_told() -> None:
    system = KeySystem()
    _, _, store = system.ask(GenerateKey(), RotateWrapping(), GetStore())

    assert store == Store(1, SecretBackend.FILE, 2, 1, KeyState.PRESENT)
    assert facts(system)["rotations_total"] == 1


def test_a_rotation_keeps_the_device_key_and_every_value() -> None:
    system = KeySystem()
    system.ask(*(Put(b"%d" % each, b"v%d" % each) for each in range(ENTRIES_MAX)))
    (made,) = system.ask(GenerateKey())

    assert system.ask(RotateWrapping(), RotateWrapping()) == [Rotated(2), Rotated(3)]

    assert {number_of(record) for record in system.records.values()} == {3}
    system.restart()
    assert system.ask(GetPublicKey()) == [made]
    assert system.ask(*(Get(b"%d" % each) for each in range(ENTRIES_MAX))) == [
        Value(b"v%d" % each) for each in range(ENTRIES_MAX)
    ]


def test_a_rotation_that_failed_half_way_is_finished_without_being_asked_for() -> None:
    system = KeySystem()
    system.ask(Put(b"n", b"v"))
    system.statefsd.refuses = StatefsdStatus.IO_ERROR
    assert system.ask(RotateWrapping()) == [UNAVAILABLE]
    assert {number_of(record) for record in system.records.values()} == {1}

    system.statefsd.refuses = None
    system.kernel.run(system.system.add_client(_nap_long), until=system.ahead(10 * SECOND))

    assert {number_of(record) for record in system.records.values()} == {2}
    assert facts(system)["rotations_total"] == 1
    assert system.ask(Get(b"n")) == [Value(b"v")]


# ------------------------------------------------------------------ nothing of it is shown


def test_no_line_record_status_or_remark_has_a_secret_in_it() -> None:
    system = KeySystem()
    value = b"a value of the caller's"
    system.ask(Put(b"n", value), GenerateKey(), Sign(b"p"), RotateWrapping(), ExportPrivateKey())
    system.records[DEVICE_PATH] = b"damaged"
    system.ask(Sign(b"p"), GenerateKey(), RotateWrapping())
    (status,) = system.ask(GetStatus())
    secrets = [each for each in system.numbers.given if len(each) == 32]
    assert len(secrets) == 3, "two wrapping keys and the seed"

    shown = repr(
        (status, system.kernel.console, [str(each) for each in system.system.logd.records])
    ).encode()

    for each in (*secrets, value):
        for form in (each, each.hex().encode(), repr(each).encode()[2:-1]):
            assert form not in shown
