"""Authority over classes, console lines, spawns and messages: the checks under both kernels."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import (
    AbiError,
    BootImage,
    LinkTerms,
    Pid,
    Program,
    QosClass,
    ServiceId,
    Slot,
    SpawnReason,
    SpawnSpec,
    Status,
    service_id,
)
from nexus.kernel.core import (
    EVIDENCE_DEPTH_MAX,
    QOS_STATUS,
    QosReason,
    QosRequest,
    SpawnRefused,
    SystemLimits,
    audit_line,
    check_console,
    check_data,
    check_derived,
    check_spec,
    check_terms,
    decide,
    name_is_valid,
)
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.linux.channel import NOTE

ME, OTHER = Pid(7), Pid(8)
PLAIN = service_id("selftest-client")


def request(**change: object) -> QosRequest:
    plain = QosRequest(PLAIN, ME, ME, 1, QosClass.NORMAL)
    return plain._replace(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"raw": 4, "current": None, "target_pid": OTHER}, QosReason.INVALID_QOS_CLASS),
        ({"raw": -1}, QosReason.INVALID_QOS_CLASS),
        ({"raw": 255}, QosReason.INVALID_QOS_CLASS),
        ({"raw": 3, "current": None, "target_pid": OTHER}, QosReason.INVALID_TARGET_PID),
        ({"raw": 3, "target_pid": OTHER}, QosReason.UNAUTHORIZED_OTHER_PID),
        ({"raw": 0, "target_pid": OTHER}, QosReason.UNAUTHORIZED_OTHER_PID),
        ({"raw": 2}, QosReason.UNAUTHORIZED_ESCALATION),
        ({"raw": 1}, QosReason.APPLIED),
        ({"raw": 0}, QosReason.APPLIED),
    ],
)
def test_the_checks_of_a_class_change_come_in_order(
    change: dict[str, object], reason: QosReason
) -> None:
    assert decide(request(**change)) is reason


@pytest.mark.parametrize("name", ["init-lite", "execd", "policyd"])
def test_three_services_are_exempt_from_the_authority_checks_only(name: str) -> None:
    sid = service_id(name)

    assert decide(request(caller_service=sid, raw=3, target_pid=OTHER)) is QosReason.APPLIED
    assert decide(request(caller_service=sid, raw=9)) is QosReason.INVALID_QOS_CLASS
    gone = request(caller_service=sid, current=None)
    assert decide(gone) is QosReason.INVALID_TARGET_PID


@given(st.integers(0, (1 << 64) - 1), st.integers(-5, 300), st.sampled_from(QosClass))
def test_nobody_else_ever_raises_a_class(sid: int, raw: int, current: QosClass) -> None:
    asked = request(caller_service=ServiceId(sid), raw=raw, current=current)
    exempt = [int(service_id(name)) for name in ("init-lite", "execd", "policyd")]
    if decide(asked) is QosReason.APPLIED and sid not in exempt:
        assert raw <= current


def test_the_audit_line_is_the_contracts() -> None:
    denied = audit_line(request(raw=3), QosReason.UNAUTHORIZED_ESCALATION)
    simple = audit_line(request(raw=255), QosReason.INVALID_QOS_CLASS)
    applied = audit_line(request(raw=0), QosReason.APPLIED)

    sid = "caller_sid=0x52c6c4a34ffb3f69 caller_pid=7 target_pid=7"
    assert denied == (
        f"QOS-AUDIT decision=deny reason=unauthorized_escalation {sid} from=normal to=perfburst"
    )
    assert simple == f"QOS-AUDIT decision=deny reason=invalid_qos_class {sid}"
    assert applied == f"QOS-AUDIT decision=allow reason=applied {sid} from=normal to=idle"


def test_every_denial_has_a_status() -> None:
    assert set(QOS_STATUS) == set(QosReason) - {QosReason.APPLIED}


@pytest.mark.parametrize("line", ["", "init: ready", "x" * 512, "é" * 256, "a\u00a0b"])
def test_a_plain_line_is_accepted(line: str) -> None:
    assert check_console(line, b"") == {}


@given(st.text(max_size=40), st.binary(max_size=60))
def test_any_line_and_evidence_get_an_answer(line: str, evidence: bytes) -> None:
    try:
        parsed = check_console(line, evidence)
    except AbiError as refusal:
        assert refusal.status is Status.INVALID_ARGUMENT
    else:
        assert len(line.splitlines()) <= 1
        if evidence:
            assert parsed == json.loads(evidence)


def test_evidence_at_its_limit_is_accepted_and_one_byte_more_is_not() -> None:
    evidence = b'{"a": "' + b"x" * (4096 - 9) + b'"}'
    assert len(evidence) == 4096

    assert set(check_console("line", evidence)) == {"a"}
    with pytest.raises(AbiError):
        _ = check_console("line", evidence + b" ")


def nested(depth: int) -> bytes:
    """An object that holds lists inside each other, `depth` brackets in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_evidence_is_nested_up_to_its_limit_and_no_deeper() -> None:
    assert set(check_console("line", nested(EVIDENCE_DEPTH_MAX))) == {"a"}

    for depth in (EVIDENCE_DEPTH_MAX + 1, 970, 2000):
        with pytest.raises(AbiError) as refusal:
            _ = check_console("line", nested(depth))
        assert refusal.value.status is Status.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "evidence",
    [
        b'{"a": "' + b"[" * 100 + b'"}',
        b'{"a": "' + rb"\"" + b"[{" * 50 + rb"\\" + b'"}',
        b'{"a": [' + b"[{}], " * 100 + b"[]]}",
    ],
)
def test_brackets_in_strings_and_side_by_side_are_no_nesting(evidence: bytes) -> None:
    assert check_console("line", evidence) == json.loads(evidence)


@pytest.mark.parametrize("ruse", [b'"', rb'"\"', b"]", b"}"])
def test_nesting_is_not_hidden_behind_broken_json(ruse: bytes) -> None:
    with pytest.raises(AbiError):
        _ = check_console("line", b'{"a":' + ruse + nested(970))


def test_a_note_of_a_linux_task_is_held_to_the_same_depth() -> None:
    noted: list[object] = []
    kernel: Any = SimpleNamespace(note=lambda *told: noted.append(told))
    child: Any = SimpleNamespace(notes=0, sender=None)

    def take(fields: bytes) -> bool:
        return LinuxKernel._take_note(kernel, child, bytes((NOTE, 0)) + fields)

    assert take(b'{"a": 1}')
    assert not take(nested(970))
    assert not take(b"[1]")
    assert len(noted) == 1


async def nothing(boot: BootImage) -> None:
    return None


PROGRAMS = {"p": Program(name="p", main=nothing, digest="d")}
SPEC = SpawnSpec("demo.testsvc", "p", Slot(1))


def test_a_sound_spec_gives_its_program() -> None:
    assert check_spec(SPEC, PROGRAMS, ()) is PROGRAMS["p"]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC._replace(program="q"),
        SPEC._replace(name="a b"),
        SPEC._replace(name="x" * 49),
        SPEC._replace(owner_size=0),
        SPEC._replace(endpoints=97),
        SPEC._replace(budget=0),
        SPEC._replace(delegations=-1),
        SPEC._replace(cpu=-1),
    ],
)
def test_an_unsound_spec_is_an_invalid_payload(spec: SpawnSpec) -> None:
    with pytest.raises(SpawnRefused) as refusal:
        _ = check_spec(spec, PROGRAMS, ())

    assert refusal.value.reason is SpawnReason.INVALID_PAYLOAD
    assert refusal.value.status is Status.INVALID_ARGUMENT


def test_a_live_name_is_not_given_twice() -> None:
    with pytest.raises(SpawnRefused):
        _ = check_spec(SPEC, PROGRAMS, {"demo.testsvc"})


@given(st.text(max_size=60))
def test_a_valid_name_can_be_an_identity(name: str) -> None:
    if name_is_valid(name):
        assert 0 < service_id(name) < 1 << 64


@pytest.mark.parametrize("data", [b"", b"\xf0", b"\xff", b"x" * 8241])
def test_misshapen_messages_are_invalid(data: bytes) -> None:
    with pytest.raises(AbiError) as refusal:
        _ = check_data(data)
    assert refusal.value.status is Status.INVALID_ARGUMENT


def test_a_message_says_its_size() -> None:
    assert check_data(b"\xef" + b"\xff" * 8239) == 8240


def test_derived_terms_stay_within_those_held() -> None:
    held = LinkTerms(4, 100, 2)

    check_terms(held)
    check_derived(LinkTerms(4, 100, 0), held)
    for terms in (LinkTerms(5, 100, 0), LinkTerms(4, 101, 0), LinkTerms(1, 1, 1)):
        with pytest.raises(AbiError) as refusal:
            check_derived(terms, held)
        assert refusal.value.status is Status.PERMISSION_DENIED


def test_limits_that_the_root_alone_exceeds_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        _ = SystemLimits(total_size=100_000)
