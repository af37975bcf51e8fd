"""keystored with the real rngd, statefsd, policyd and logd on the simulated kernel."""

import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any, Final

import pytest

from nexus.abi import (
    BootImage,
    Event,
    EventKind,
    Nanos,
    PolicyRead,
    SecretBackend,
    service_id,
)
from nexus.ipc import Refused, TimedOut
from nexus.kernel.sim.kernel import SimKernel
from nexus.kernel.sim.objects import Task
from nexus.kernel.sim.power import Cut, Moment
from nexus.protocols.keystored import (
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
)
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import CheckFor, Decision, Reason, Verdict
from nexus.runtime import Call, Deferred, Server
from nexus.runtime.authority import ASK_MAX
from nexus.services.keystored.ed25519 import verify
from nexus.services.keystored.sealing import unpack
from tests.fakes.initrig import MS, SECOND
from tests.fakes.keyrig import SYSTEM, SimMachine, asked, nap
from tests.fakes.policyrig import Hands, Outcome

pytestmark = pytest.mark.sim

ENTRIES: Final = 12
CUTS: Final = 10  # moments of a rotation at which something is cut off
BEGIN: Final = "driver: outside mark begin"
UNAVAILABLE: Final = Refused(KeystoredStatus.UNAVAILABLE)
Say = Callable[[Call], Decision | Deferred]
SECRET: Final = ("keystored", SecretBackend.FILE)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimMachine:
    return SimMachine(monkeypatch)


async def filled(hands: Hands) -> dict[str, Any]:
    """A device key and entries; the public key."""
    (made,) = await asked(hands, GenerateKey())
    assert isinstance(made, DeviceKey), made
    for number in range(ENTRIES):
        assert await asked(hands, Put(b"%d" % number, b"value %d" % number)) == [Done()]
    return {"public": made.public_key.hex(), "device": made.device_id}


async def looked(hands: Hands) -> dict[str, Any]:
    """What there is: the public key, whether it signs, the entries, the store."""
    shown, signature, store = await asked(hands, GetPublicKey(), Sign(b"payload"), GetStore())
    assert isinstance(shown, DeviceKey), shown
    assert isinstance(signature, Signature), signature
    assert isinstance(store, Store), store
    values = await asked(hands, *(Get(b"%d" % number) for number in range(ENTRIES)))
    return {
        "public": shown.public_key.hex(),
        "device": shown.device_id,
        "signs": verify(shown.public_key, signature.signature, b"payload"),
        "values": [each.value.decode() if isinstance(each, Value) else each for each in values],
        "wrapping": store.wrapping,
        "keygens": store.keygens,
        "backend": SecretBackend(store.backend).name,
        "statefsd": store.statefsd_generation,
    }


VALUES: Final = [f"value {number}" for number in range(ENTRIES)]


def evidence(outcome: Outcome, line: str) -> dict[str, Any]:
    (found,) = [
        event.fields["evidence"] for event in outcome.events if event.fields.get("line") == line
    ]
    said: Any = json.loads(found) if isinstance(found, str | bytes) else found
    assert isinstance(said, dict)
    return said


# ------------------------------------------------------------------ what lasts


def test_keys_last_over_restarts_of_the_service_and_of_the_device(machine: SimMachine) -> None:
    async def first(hands: Hands) -> list[Any]:
        made = await filled(hands)
        await hands.outside("kill keystored")
        await nap(hands)
        await hands.outside("kill statefsd")
        return [made, await looked(hands)]

    async def second(hands: Hands) -> list[Any]:
        return [await looked(hands), await asked(hands, GenerateKey())]

    one = machine.boot(first)
    two = machine.boot(second)

    made, found = one.result
    later, again = two.result
    assert {**found, **made} == found, "the same key"
    assert (found["signs"], found["values"], found["keygens"]) == (True, VALUES, 0)
    assert {**later, **made} == later
    assert (later["signs"], later["values"], later["keygens"]) == (True, VALUES, 0)
    assert again == ["KEY_EXISTS"]
    assert made["device"] == sha256(bytes.fromhex(made["public"])).hexdigest()
    ready = evidence(two, "keystored: ready")
    assert ready["store"] == "statefsd"
    assert (ready["backend"], ready["wrapping"]) == ("file", 1)


def test_another_seed_makes_another_key_and_the_same_seed_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [SimMachine(monkeypatch, seed=seed).boot(filled).result for seed in (1, 1, 2)]

    assert found[0] == found[1] != found[2]


def test_what_is_sealed_and_signed_follows_from_the_seed_and_from_no_other_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = []
    for seed in (1, 1, 2):
        machine = SimMachine(monkeypatch, seed=seed)
        _ = machine.boot(rotating)
        left.append((machine.secrets[SECRET], machine.disks["disk"].image()))

    assert left[0] == left[1]
    assert left[0][0] != left[2][0]
    assert left[0][1] != left[2][1]


def test_a_lost_secret_is_never_replaced_and_no_new_device_key_is_made(
    machine: SimMachine,
) -> None:
    _ = machine.boot(filled)
    del machine.secrets[SECRET]

    async def script(hands: Hands) -> list[Any]:
        return await asked(
            hands, GenerateKey(), Sign(b""), Get(b"0"), Put(b"new", b""), RotateWrapping()
        )

    assert machine.boot(script).result == ["CORRUPTED"] * 5
    assert SECRET not in machine.secrets


def test_keys_in_the_keyring_end_with_the_power_and_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = SimMachine(monkeypatch, text=SYSTEM.replace('secret = "file"', 'secret = "keyring"'))

    async def restarted(hands: Hands) -> Any:
        _ = await filled(hands)
        await hands.outside("kill keystored")
        await nap(hands)
        return await looked(hands)

    async def script(hands: Hands) -> list[Any]:
        return await asked(hands, Sign(b""), GenerateKey())

    found = machine.boot(restarted).result
    assert (found["backend"], found["signs"], found["keygens"]) == ("KEYRING", True, 0)
    machine.kernel.secrets.lose_power()
    machine.secrets = dict(machine.kernel.secrets.kept)
    assert machine.boot(script).result == ["CORRUPTED"] * 2


def test_a_frozen_statefsd_is_waited_for_no_longer_than_asked_and_nothing_is_kept_instead(
    machine: SimMachine,
) -> None:
    async def script(hands: Hands) -> list[Any]:
        _ = await filled(hands)
        await hands.outside("freeze statefsd")
        await nap(hands)
        begun = await hands.ahead(0)
        refused = []
        for request in (Sign(b""), RotateWrapping(), Get(b"0"), Put(b"0", b"in memory")):
            outcome = await hands.client("keystored").call(request, await hands.ahead(300 * MS))
            refused.append(isinstance(outcome, TimedOut) or outcome == UNAVAILABLE)
        lasted = await hands.ahead(0) - begun
        await nap(hands, 5_000 * MS)  # no request waits as long as init does for its probe
        generation = (await looked(hands))["statefsd"]
        return [refused, lasted, generation, await looked(hands)]

    refused, lasted, generation, found = machine.boot(script).result

    assert refused == [True] * 4
    assert lasted <= 4 * 300 * MS + 50 * MS
    assert generation == 2, "init has started another"
    assert found["signs"]
    assert found["values"] in (VALUES, ["in memory", *VALUES[1:]]), "the old value or the new one"


def test_a_statefsd_that_is_replaced_meanwhile_costs_only_time(machine: SimMachine) -> None:
    async def script(hands: Hands) -> list[Any]:
        _ = await filled(hands)
        await hands.outside("kill statefsd")
        answers = await asked(hands, Put(b"0", b"again"), Get(b"0"))
        return [type(each).__name__ for each in answers]

    assert machine.boot(script).result == ["Done", "Value"]


# ------------------------------------------------------------------ cut off while it rotates


async def rotating(hands: Hands) -> Any:
    """A rotation between two marks on the console."""
    made = await filled(hands)
    await hands.outside("mark begin")
    outcome = await asked(hands, RotateWrapping())
    await hands.outside("mark end")
    return [made, *[each.wrapping if isinstance(each, Rotated) else each for each in outcome]]


def marks(outcome: Outcome) -> list[int]:
    """When the two marks were set."""
    return [
        event.time
        for event in outcome.events
        if event.kind is EventKind.CONSOLE and str(event.fields["line"]).startswith(BEGIN[:20])
    ]


def moments(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], dict[str, Any]]:
    """Times spread over the rotation of a run that is not disturbed, after its first mark; and
    what that run made, which is what any run of the seed makes."""
    outcome = SimMachine(monkeypatch).boot(rotating)
    begin, end = marks(outcome)
    made, number = outcome.result
    assert number == 2
    return [(end - begin) * step // CUTS for step in range(1, CUTS + 1)], made


def test_killed_at_any_moment_of_a_rotation_it_finishes_it_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times, made = moments(monkeypatch)
    numbers = set()

    for after in times:
        machine = SimMachine(monkeypatch)

        def on_event(kernel: SimKernel, event: Event, after: int = after) -> None:
            if event.fields.get("line") == BEGIN:
                kernel.at(Nanos(kernel.now + after), lambda: kill(kernel))

        async def script(hands: Hands) -> Any:
            _ = await filled(hands)
            await hands.outside("mark begin")
            _ = await hands.client("keystored").call(RotateWrapping(), await hands.ahead(SECOND))
            await nap(hands, 200 * MS)
            return await looked(hands)

        found = machine.boot(script, on_event=on_event).result

        assert {**found, **made} == found, after
        assert (found["signs"], found["values"], found["keygens"]) == (True, VALUES, 0), after
        wrapping = unpack(machine.secrets[SECRET])
        assert [key.number for key in wrapping.keys] == [found["wrapping"]], "finished"
        numbers.add(found["wrapping"])

    assert numbers == {1, 2}, "killed before it began, and after"


def kill(kernel: SimKernel) -> None:
    task = kernel.living("keystored")
    assert task is not None
    kernel.end(task, 0, 9)


def test_a_power_cut_at_any_moment_of_a_rotation_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times, made = moments(monkeypatch)

    for after in times:
        machine = SimMachine(monkeypatch)

        def on_event(kernel: SimKernel, event: Event, after: int = after) -> None:
            if event.fields.get("line") == BEGIN:
                kernel.at(Nanos(kernel.now + after), lambda: kernel.power.cut("in a rotation"))

        _ = machine.boot(rotating, on_event=on_event)
        assert machine.kernel.power.off
        found = machine.boot(looked).result

        assert {**found, **made} == found, after
        assert (found["signs"], found["values"], found["keygens"]) == (True, VALUES, 0), after
        assert not unpack(machine.secrets[SECRET]).rotating


def lost_nothing(machine: SimMachine, made: dict[str, Any], where: object) -> int:
    """The next boot opens everything and finishes the rotation; the wrapping key's number."""
    found = machine.boot(looked).result
    assert {**found, **made} == found, where
    assert (found["signs"], found["values"], found["keygens"]) == (True, VALUES, 0), where
    assert not unpack(machine.secrets[SECRET]).rotating
    number: int = found["wrapping"]
    return number


@pytest.mark.parametrize(
    ("moment", "size"), [(Moment.BEFORE, 0), (Moment.INSIDE, 1000), (Moment.AFTER, 0)]
)
def test_a_power_cut_at_every_write_of_a_rotation_and_inside_it_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, moment: Moment, size: int
) -> None:
    made = SimMachine(monkeypatch).boot(filled).result
    reached = []

    for write, flush in [(nth, 0) for nth in range(1, 6)] + [(0, nth) for nth in range(1, 6)]:
        if moment is Moment.INSIDE and flush:
            continue
        cut = Cut(write=write, flush=flush, moment=moment, size=size, task="driver", line=BEGIN)
        machine = SimMachine(monkeypatch)
        _ = machine.boot(rotating, on_machine=partial(SimKernel.cut_power, cut=cut))
        if machine.kernel.power.off:
            reached.append((write, flush))
            assert lost_nothing(machine, made, cut) == 2, "the new key was kept before any write"

    assert (1, 0) in reached
    assert (5, 0) not in reached, "there were fewer: each of them was tried"
    assert (0, 5) not in reached


@pytest.mark.parametrize("done", [False, True])
def test_a_power_cut_at_every_replacement_of_the_secret_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    made = SimMachine(monkeypatch).boot(filled).result
    numbers = []

    for nth in (1, 2):
        machine = SimMachine(monkeypatch)
        left = [nth]

        def on_event(kernel: SimKernel, event: Event, left: list[int] = left) -> None:
            if event.fields.get("line") != BEGIN:
                return
            replace = kernel.secrets.replace

            def cut(task: Task, data: bytes, **options: bool) -> None:
                left[0] -= 1
                if left[0] or done:
                    replace(task, data, **options)
                if not left[0]:
                    kernel.power.cut("at the secret")

            monkeypatch.setattr(kernel.secrets, "replace", cut)

        _ = machine.boot(rotating, on_event=on_event)
        assert machine.kernel.power.off
        numbers.append(lost_nothing(machine, made, (nth, done)))

    assert numbers == ([2, 2] if done else [1, 2])


# ------------------------------------------------------------------ who decides


def test_decisions_are_policyds_and_both_kinds_are_audited(machine: SimMachine) -> None:
    async def other(boot: BootImage) -> int:
        hands = Hands(boot)
        await hands.begin(ready=False)
        await hands.connect("keystored")
        names = await asked(
            hands, GenerateKey(), GetPublicKey(), Sign(b""), RotateWrapping(), ExportPrivateKey(),
            Get(b"0"),
        )  # fmt: skip
        assert names == ["DENIED"] * 4 + ["EXPORT_DENIED", "NOT_FOUND"], names
        return await hands.server.run()

    async def script(hands: Hands) -> Any:
        _ = await filled(hands)
        refused = await asked(hands, ExportPrivateKey())
        _ = await looked(hands)
        await nap(hands, 500 * MS)
        told = {
            (each["action"], each["subject"], each["decision"]) for each in await hands.audits()
        }
        return [refused, sorted(told)]

    refused, audits = machine.boot(script, mains={"guard": other}).result

    assert refused == ["EXPORT_DENIED"]
    told = {tuple(each) for each in audits}
    rights = {"device.keygen", "device.pubkey.read", "crypto.sign", "device.key.rotate"}
    assert {(right, "other", "deny") for right in rights} <= told
    assert {(right, "driver", "allow") for right in rights - {"device.key.rotate"}} <= told
    assert {(right, "other", "allow") for right in rights}.isdisjoint(told)
    exports = {subject for action, subject, _ in told if action == "device.key.export"}
    assert exports == {f"0x{service_id(name):016x}" for name in ("driver", "other")}


def test_a_frozen_policyd_lets_nobody_sign_nor_make_a_key_and_not_for_longer_than_asked(
    machine: SimMachine,
) -> None:
    async def script(hands: Hands) -> Any:
        _ = await filled(hands)
        await hands.outside("freeze policyd")
        await nap(hands)
        begun = await hands.ahead(0)
        outcome = await asked(hands, Sign(b"p"))
        lasted = await hands.ahead(0) - begun
        values = await asked(hands, Get(b"0"))
        return [outcome, lasted, [each.value.decode() for each in values]]

    outcome, lasted, values = machine.boot(script).result

    assert outcome == ["DENIED"]
    assert lasted <= ASK_MAX + 50 * MS
    assert values == ["value 0"], "one's own values need no right"


class Judge:
    """Allows init what it asks about; what is asked about the driver it answers as `say` does."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._late: list[tuple[Nanos, Deferred]] = []

    async def handle(self, call: Call, request: CheckFor) -> Decision | Deferred:
        if request.subject == service_id("driver"):
            answer = self._say(call)
            if isinstance(answer, Deferred) and self._say is late:
                self._late.append((Nanos(call.now + ASK_MAX + 50 * MS), answer))
            return answer
        return Decision(Verdict.ALLOW, Reason.POLICY, (await PolicyRead()).generation, 1)

    def next_time(self) -> Nanos | None:
        return self._late[0][0] if self._late else None

    async def on_time(self, now: Nanos) -> None:
        while self._late and self._late[0][0] <= now:
            _, deferred = self._late.pop(0)
            generation = (await PolicyRead()).generation
            deferred.reply(Decision(Verdict.ALLOW, Reason.POLICY, generation, 1))


def silent(call: Call) -> Deferred:
    return call.defer()


def late(call: Call) -> Deferred:
    return call.defer()


def malformed(call: Call) -> Decision:
    """An ALLOW that no policy gives."""
    return Decision(Verdict.ALLOW, Reason.MALFORMED, 1 << 30, 1)


def stale(call: Call) -> Decision:
    """By a policy from before this one."""
    return Decision(Verdict.ALLOW, Reason.POLICY, 0, 1)


@pytest.mark.parametrize("say", [silent, late, malformed, stale])
def test_a_policyd_that_is_silent_late_or_makes_no_sense_keeps_the_device_key_closed(
    machine: SimMachine, say: Say
) -> None:
    machine.text = SYSTEM.replace("uses = { logd = { depth = 64, sync = false } }\n", "", 1)

    async def judge(boot: BootImage) -> int:
        return await Server(Judge(say), POLICYD, boot).run()

    async def script(hands: Hands) -> list[Any]:
        gated = (GenerateKey(), GetPublicKey(), Sign(b""), RotateWrapping())
        store, *_ = await asked(hands, GetStore())
        denied = []
        for request in gated:
            denied += await asked(hands, request)
            await nap(hands, 800 * MS)  # beyond the late answers, which count for nothing
        after, *_ = await asked(hands, GetStore())
        return [denied, store.wrapping, after.wrapping, after.device_key]

    found = machine.boot(script, mains={"policyd": judge}).result

    assert found == [["DENIED"] * 4, 1, 1, KeyState.ABSENT]
