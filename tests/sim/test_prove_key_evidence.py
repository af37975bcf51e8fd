"""The checks of keys and of decisions that others enforce, on what a real run of three boots left
behind: true evidence passes, each way to lie in one place is found, and so is each leak."""

import base64
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus.abi import Event, EventKind
from nexus.proof.prove import Outcome
from nexus.proof.remains import Remains
from nexus.proof.verdict import Mismatch
from nexus.protocols.ladder import SELFTEST, rung
from nexus.services.keystored.sealing import unpack, unseal
from nexus.services.keystored.vault import DEVICE_PATH
from nexus.services.selftest.decision_rungs import DENIED_KEY, TESTSVC_KEY
from nexus.services.selftest.key_rungs import CANARY, JOURNAL_LINE
from tests.fakes.told import Change, ChangeLeft, Told

SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"
NUMBERS = (17, 18, 35, 52, 74, 81, 82, 83, 107, 108, 109, 110)
MEASURED = f"{SELFTEST}: measured #"
POLICY_SET = "init: policy set"

pytestmark = [pytest.mark.sim, pytest.mark.slow]


def seed_of(outcome: Outcome) -> bytes:
    """The device key's seed, as the runner comes by it."""
    left = outcome.traces[0].left
    with unseal(
        unpack(left.secrets["keystored"]), DEVICE_PATH, left.records[DEVICE_PATH].value
    ) as seed:
        return bytes(seed.data)


@pytest.mark.parametrize("number", NUMBERS)
def test_true_evidence_passes(outcome: Outcome, number: int) -> None:
    Told(outcome, number).check()


LIES: tuple[tuple[int, Change], ...] = (
    (35, lambda e: e.update(store="memory")),
    (35, lambda e: e.update(backend="keyring")),
    (35, lambda e: e.update(statefsd_generation=2)),
    (35, lambda e: e.update(wrapping=0)),
    (52, lambda e: e.update(counters={"ok": 2})),
    (52, lambda e: e.update(generation=2)),
    (74, lambda e: e["deadlines"][0].__setitem__(1, e["deadlines"][0][0] + 1)),
    (74, lambda e: e["deadlines"][1].__delitem__(slice(1, None))),
    (74, lambda e: e["traces"][0].__setitem__(1, "00" * 16)),
    (74, lambda e: e["traces"].__setitem__(1, e["traces"][0])),
    (74, lambda e: e["spans"][0].__setitem__(1, e["spans"][0][0])),
    (74, lambda e: e["spans"][1].__setitem__(1, "00" * 8)),
    (74, lambda e: e.update(outcome="answered")),
    (74, lambda e: e.update(late_ns=1_000_000_000)),
    (81, lambda e: e["policy"]["fields"].update(reason="unavailable")),
    (81, lambda e: e["policy"].update(service=e["unavailable"]["service"])),
    (81, lambda e: e["identity"]["fields"].update(subject="demo.testsvc")),
    (81, lambda e: e["identity"]["fields"].update(target="")),
    (81, lambda e: e["malformed"].update(status=0)),
    (81, lambda e: e["unavailable"]["fields"].update(reason="policy")),
    (81, lambda e: e["unavailable"]["fields"].update(target="/state/")),
    (81, lambda e: e["unavailable"].update(took_ns=5_000_000_000)),
    (81, lambda e: e["unavailable"].update(late_ns=5_000_000_000)),
    (81, lambda e: e["unavailable"].update(generations=[2, 3])),
    (81, lambda e: e["audits"][0]["decided"].__setitem__(0, 0)),
    (81, lambda e: e["audits"][0]["numbers"].pop()),
    (81, lambda e: e["audits"][1]["told"].__setitem__(1, 7)),
    (81, lambda e: e["policy"]["fields"].update(number="999")),
    (82, lambda e: e.update(subject="00" * 8)),
    (82, lambda e: e.update(generation=1)),
    (82, lambda e: e.update(pid=1)),
    (82, lambda e: e["records"].reverse()),
    (82, lambda e: e["records"][0]["fields"].update(reason="policy")),
    (82, lambda e: e["records"][1]["fields"].update(decision="deny")),
    (82, lambda e: e["records"][2]["fields"].update(subject="keystored")),
    (82, lambda e: e["records"][3]["fields"].update(asked_by="statefsd")),
    (83, lambda e: e["generations"].__setitem__(0, e["generations"][0] - 1)),
    (83, lambda e: e["generations"].__setitem__(2, e["generations"][0])),
    (83, lambda e: e["fields"].update(generation=str(e["generations"][0]))),
    (83, lambda e: e["fields"].update(subject=SELFTEST)),
    (83, lambda e: e["statuses"].__setitem__(2, 0)),
    (83, lambda e: e.update(cached=0)),
    (83, lambda e: e["instances"].__setitem__(0, 9)),
    (107, lambda e: e["statuses"].__setitem__(0, 0)),
    (107, lambda e: e["statuses"].__setitem__(4, 0)),
    (107, lambda e: e.update(calls=[3, 3])),
    (108, lambda e: e.update(public_key="00" * 32)),
    (108, lambda e: e.update(device_id="00" * 32)),
    (108, lambda e: e.update(given=[48, 48])),
    (109, lambda e: e.update(status=0)),
    (109, lambda e: e.update(size=e["size"] + 32)),
    (109, lambda e: e["fields"].update(decision="allow")),
    (109, lambda e: e["journal"].update(keystored=1)),
    (109, lambda e: e.update(record=1)),
    (110, lambda e: e.update(public_key="00" * 32)),
    (110, lambda e: e.update(device_id="00" * 32)),
    (110, lambda e: e.update(keygens=1)),
)


@pytest.mark.parametrize(("number", "lie"), LIES)
def test_each_lie_in_the_evidence_is_found(outcome: Outcome, number: int, lie: Change) -> None:
    told = Told(outcome, number)

    told.say(lie)

    with pytest.raises(Mismatch):
        told.check()


OTHERS: tuple[tuple[int, str, Change], ...] = (
    (35, f"{MEASURED}35", lambda e: e.update(total=0)),
    (35, f"{MEASURED}35", lambda e: e.update(ops=[1])),
    (35, f"{MEASURED}35", lambda e: e.update(senders=["00" * 8])),
    (35, "init: health keystored ok", lambda e: e["facts"].update(statefsd_generation=0)),
    (35, "init: ready", lambda e: e["grants"].clear()),
    (74, f"{MEASURED}35", lambda e: e["spans"].append("00" * 8)),
    (81, "init: end of policyd", lambda e: e.update(reason="asked")),
    (83, POLICY_SET, lambda e: e.update(generation=1)),
    (83, POLICY_SET, lambda e: e.update(digest="00" * 32)),
    (108, "keystored: device key generated", lambda e: e.update(public_key="00" * 32)),
    (109, f"{JOURNAL_LINE} keystored", lambda e: e.update(record=0)),
    (110, rung(108).marker, lambda e: e.update(public_key="00" * 32)),
    (110, f"{MEASURED}110", lambda e: e.update(keygens=1)),
    (110, f"{MEASURED}110", lambda e: e.update(generations=[1, 1])),
    (110, f"{MEASURED}110", lambda e: e.update(device_id="00" * 32)),
)


@pytest.mark.parametrize(("number", "text", "lie"), OTHERS)
def test_each_lie_of_the_other_side_is_found(
    outcome: Outcome, number: int, text: str, lie: Change
) -> None:
    told = Told(outcome, number)

    told.say(lie, text, boot=0)

    with pytest.raises(Mismatch):
        told.check()


def _killed(name: str) -> Callable[[Event], bool]:
    return lambda event: event.kind is EventKind.EXIT and event.fields.get("name") == name


def _linked(event: Event) -> bool:
    return event.kind is EventKind.LINK and event.fields["owner"] == "keystored"


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (17, lambda event: event.fields.get("name") == "keystored"),
        (52, _linked),
        (81, _killed("policyd")),
        (82, _killed("keystored")),
        (108, lambda event: event.fields.get("what") == "draw"),
    ],
)
def test_what_the_kernel_did_not_record_is_found(
    outcome: Outcome, number: int, wanted: Callable[[Event], bool]
) -> None:
    told = Told(outcome, number)

    told.without(wanted)

    with pytest.raises(Mismatch):
        told.check()


def _without(*keys: bytes) -> ChangeLeft:
    def change(left: Remains) -> Remains:
        records = {key: kept for key, kept in left.records.items() if key not in keys}
        return dataclasses.replace(left, records=records)

    return change


def _moved(source: bytes, target: bytes) -> ChangeLeft:
    def change(left: Remains) -> Remains:
        return dataclasses.replace(left, records={**left.records, target: left.records[source]})

    return change


def _clear(left: Remains) -> Remains:
    """Every value of keystored's that was sealed stands there as it was put."""
    records = {
        key: kept._replace(value=CANARY) if key.startswith(b"/state/keystore/") else kept
        for key, kept in left.records.items()
    }
    return dataclasses.replace(left, records=records)


def _other_secret(left: Remains) -> Remains:
    blob = bytearray(left.secrets["keystored"])
    blob[50] ^= 1
    return dataclasses.replace(left, secrets={"keystored": bytes(blob)})


def _no_secret(left: Remains) -> Remains:
    return dataclasses.replace(left, secrets={})


DISKS: tuple[tuple[int, int, ChangeLeft], ...] = (
    (83, 0, _without(TESTSVC_KEY)),
    (83, 0, _moved(TESTSVC_KEY, DENIED_KEY)),
    (107, 0, _clear),
    (107, 0, _moved(DEVICE_PATH, b"/state/keystore/everybody/656e747279")),
    (107, 0, _no_secret),
    (108, 0, _without(DEVICE_PATH)),
    (108, 0, _other_secret),
    (109, 2, _no_secret),
    (110, 1, _without(DEVICE_PATH)),
    (110, 1, _moved(b"/state/selftest/put", DEVICE_PATH)),
)


@pytest.mark.parametrize(("number", "boot", "change"), DISKS)
def test_a_disk_that_says_otherwise_is_found(
    outcome: Outcome, number: int, boot: int, change: ChangeLeft
) -> None:
    told = Told(outcome, number)

    told.leave(change, boot)

    with pytest.raises(Mismatch):
        told.check()


def test_a_key_that_another_seed_of_the_run_would_yield_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 108)

    told.put(0, dataclasses.replace(told.traces[0], seed=told.traces[0].seed + 1))

    with pytest.raises(Mismatch, match="never delivered this seed"):
        told.check()


FORMS: tuple[Callable[[bytes], bytes], ...] = (
    lambda seed: seed,
    lambda seed: seed.hex().encode(),
    base64.b64encode,
    lambda seed: repr(seed).encode(),
    lambda seed: b"half of it: " + seed[:16],
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("boot", [0, 2])
def test_a_seed_on_the_disk_is_found(
    outcome: Outcome, form: Callable[[bytes], bytes], boot: int
) -> None:
    told = Told(outcome, 109)
    leak = form(seed_of(outcome))

    told.leave(lambda left: dataclasses.replace(left, written=left.written + leak), boot)

    with pytest.raises(Mismatch, match=f"the seed.* in the disk after boot {boot}"):
        told.check()


@pytest.mark.parametrize("form", FORMS[1:4])
def test_a_seed_in_the_record_is_found(
    outcome: Outcome, form: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    told = Told(outcome, 109)
    record = tmp_path / "record.jsonl"
    _ = record.write_bytes(outcome.record.read_bytes() + form(seed_of(outcome)))

    told.case = dataclasses.replace(told.case, written=(record,))

    with pytest.raises(Mismatch, match=r"the seed.* in record\.jsonl"):
        told.check()


def test_a_wrapping_key_and_an_entry_in_the_output_are_found(outcome: Outcome) -> None:
    told = Told(outcome, 109)
    (key,) = unpack(outcome.traces[0].left.secrets["keystored"]).keys
    output = f"{key.secret.data.hex()} and {CANARY!r}"

    told.put(1, dataclasses.replace(told.traces[1], output=output))

    with pytest.raises(Mismatch, match=r"the entry, wrapping key 1.* in the output of boot 1"):
        told.check()


def test_a_run_without_a_record_proves_nothing_of_secrets(outcome: Outcome) -> None:
    told = Told(outcome, 109)

    told.case = dataclasses.replace(told.case, written=())

    with pytest.raises(Mismatch, match="no record"):
        told.check()


def test_a_system_that_never_got_ready_is_not_keystoreds_fault(outcome: Outcome) -> None:
    told = Told(outcome, 35)

    told.without(
        lambda event: (
            event.fields.get("line") == "init: ready"
            or (event.kind is EventKind.CONSOLE and event.fields.get("name") == SELFTEST)
        )
    )

    told.check()


def test_an_opening_read_that_a_climbing_client_does_not_tell_of_is_missed(
    outcome: Outcome,
) -> None:
    told = Told(outcome, 35)

    told.without(lambda event: event.fields.get("line") == f"{MEASURED}35")

    with pytest.raises(Mismatch, match="#35"):
        told.check()
