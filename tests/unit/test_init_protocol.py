"""What travels on control links fits them, even when every field is as long as it may be."""

import pytest

from nexus.abi import CONTROL_LINK_SIZE, QosClass
from nexus.protocols.init import (
    AUDIT_LINE_SIZE_MAX,
    AUDIT_ROWS_MAX,
    BOOT_ID_SIZE,
    LINK_ROWS_MAX,
    REASON_SIZE_MAX,
    REASON_TEXT_SIZE_MAX,
    SERVICES_MAX,
    Account,
    AuditRows,
    Health,
    LinkRow,
    LinkRows,
    PolicyGiven,
    Resources,
    ServiceRecord,
    SystemInfo,
    SystemState,
    TaskRow,
    TaskRows,
    TaskState,
    TrialState,
)
from nexus.protocols.meta import (
    COUNTERS_MAX,
    FACT_NAME_SIZE_MAX,
    FACTS_MAX,
    SENDERS_MAX,
    Fact,
    GetStatus,
    SenderCount,
    ServiceStatus,
    StatusCount,
)
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.policy import POLICY_SIZE_MAX
from nexus.wire import HEADER_SIZE, Message, RemoteProtocolError, encode

NAME = "n" * 48
U64 = 2**64 - 1
U32 = 2**32 - 1
FACTS = [Fact("f" * FACT_NAME_SIZE_MAX, -(2**63))] * FACTS_MAX
ACCOUNT = Account(U32, [U64] * COUNTERS_MAX, FACTS)
STATUSES = 24  # different refusals of one service; the largest protocol declares nine

LARGEST: list[Message] = [
    TaskRows(
        0xFFFF,
        [TaskRow(NAME, U32, U64, U32, QosClass.PERF_BURST, TaskState.STOPPED)] * (SERVICES_MAX + 1),
    ),
    LinkRows(
        0xFFFF, 0xFFFF, [LinkRow(NAME, NAME, 256, 16384, 32, U32, U32, 0xFFFF)] * LINK_ROWS_MAX
    ),
    AuditRows(U32, U32, U32, ["a" * AUDIT_LINE_SIZE_MAX] * AUDIT_ROWS_MAX),
    Resources(ACCOUNT, ACCOUNT, 0xFFFF, 0xFFFF),
    ServiceRecord(
        TaskState.STOPPED,
        Health.LATE,
        U32,
        U32,
        U32,
        U64,
        -(2**63),
        0xFFFF,
        "r" * REASON_SIZE_MAX,
        U32,
        6,
        U64,
        "d" * 64,
    ),
    SystemInfo(
        NAME,
        "d" * 64,
        SystemState.SAFE,
        "w" * REASON_TEXT_SIZE_MAX,
        U64,
        U64,
        U64,
        U32,
        bytes(BOOT_ID_SIZE),
        U32,
        "d" * 64,
        True,
        "b",
        U64,
        "d" * 64,
        TrialState.JUDGING,
    ),
    PolicyGiven(POLICY_SIZE_MAX, U32),
    ServiceStatus(
        generation=U32,
        requests=U64,
        replies=U64,
        lost=U64,
        malformed=U64,
        expired=U64,
        unanswerable=U64,
        refusals=[StatusCount(0xFFFF, U64)] * STATUSES,
        senders=[SenderCount(U64, U64)] * (SENDERS_MAX + 1),
        facts=FACTS,
        counters=[U64] * COUNTERS_MAX,
    ),
]


@pytest.mark.parametrize("name", ["", "a b", "A", "timers\n", "\x01", "f\u00fc", "1st", "f" * 33])
def test_the_name_of_a_fact_is_a_word_that_needs_no_escape_anywhere(name: str) -> None:
    told = ServiceStatus(1, 0, 0, 0, 0, 0, 0, [], [], [Fact(name, 1)], [])

    with pytest.raises(RemoteProtocolError):
        META.codecs[GetStatus].decode_reply(encode(told))


@pytest.mark.parametrize("message", LARGEST, ids=lambda message: type(message).__name__)
def test_the_largest_answer_fits_a_control_link(message: Message) -> None:
    assert HEADER_SIZE + len(encode(message)) <= CONTROL_LINK_SIZE
