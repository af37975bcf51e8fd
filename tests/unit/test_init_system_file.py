"""System files: what is read, and the sentence each wrong one gets."""

import json
from pathlib import Path
from typing import Final

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nexus.abi import LINK_SIZE_MAX, QosClass, ServiceId
from nexus.init import plan as plan_module
from nexus.init.declare import FOUND_SIZE_MAX, SIZE_UNITS, amount_text
from nexus.init.errors import SystemFileError
from nexus.init.frames import reply_frame_size_max, request_frame_size_max
from nexus.init.plan import Plan, make_plan, reserved_size
from nexus.init.system import parse, schema_text
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Register
from nexus.wire import BODY_SIZE_MAX, HEADER_SIZE, encode

ROOT = Path(__file__).parents[2]
FILE = Path("test.toml")

HEAD = """[system]
name = "test"
"""
TIMED_ENTRY = """
[service.timed]
program = "timed"
"""
CLIENT = """
[service.client]
program = "demo.interactive"
"""


@pytest.fixture(autouse=True)
def known_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of this file do not depend on the sources of the programs."""
    monkeypatch.setattr(plan_module, "program_digest", lambda module: f"digest of {module}")


def plan_of(text: str) -> Plan:
    return make_plan(parse(text.encode(), FILE))


def error_of(text: str | bytes) -> SystemFileError:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(SystemFileError) as caught:
        make_plan(parse(data, FILE))
    return caught.value


def test_a_small_system_gets_its_defaults() -> None:
    plan = plan_of(HEAD + TIMED_ENTRY + CLIENT + 'uses = [{ name = "timed" }]\n')

    timed, client = plan.services
    assert [service.name for service in plan.services] == ["timed", "client"]
    assert (client.qos, client.cpu, client.capabilities) == (QosClass.NORMAL, None, ())
    assert (client.backoff, client.health_deadline) == (50_000_000, 2_000_000_000)
    (link,) = plan.links
    assert (link.client, link.server, link.depth, link.size) == ("client", "timed", 8, 16384)
    assert timed.reserved_size == reserved_size((), [link])
    assert (plan.smp, plan.total_size) == (1, 1024 * 1024)


def test_everything_declared_reaches_the_plan() -> None:
    plan = plan_of(
        HEAD
        + 'smp = 4\ntotal_size = "4MiB"\nowner_size = "512KiB"\nends_with = "client"\n'
        + "[system.link]\ndepth = 4\n"
        + TIMED_ENTRY
        + CLIENT
        + """
qos = "perf-burst"
cpu = 3
budget = "1MiB"
owner_size = "300KiB"
endpoints = 12
capabilities = ["proof.control"]
restart = { backoff = "20ms" }
health = { deadline = "1s" }
settings = { limit = 3, name = "x", on = true }
uses.timed = { delegations = 2 }
"""
    )

    client = plan.by_name["client"]
    assert (client.qos, client.cpu, client.budget) == (QosClass.PERF_BURST, 3, 1024**2)
    assert (client.owner_size, client.endpoints) == (300 * 1024, 12)
    assert client.capabilities == ("proof.control",)
    assert (client.backoff, client.health_deadline) == (20_000_000, 1_000_000_000)
    assert client.settings == (("limit", 3), ("name", "x"), ("on", True))
    assert (client.uses[0].depth, client.uses[0].delegations) == (4, 2)
    assert plan.by_name["timed"].owner_size == 512 * 1024
    assert (plan.smp, plan.total_size, plan.ends_with) == (4, 4 * 1024**2, "client")


def test_a_share_is_depth_times_the_largest_frame_within_its_bounds() -> None:
    plan = plan_of(HEAD + TIMED_ENTRY + CLIENT + 'uses = [{ name = "timed", depth = 1 }]\n')

    link = plan.links[0]
    frame = request_frame_size_max(TIMED)
    assert link.size == frame
    assert link.reply_size == LINK_SIZE_MAX
    assert frame <= HEADER_SIZE + BODY_SIZE_MAX


def test_the_largest_frame_holds_a_full_batch() -> None:
    largest = encode([Register(2**64 - 1)] * 256)

    assert HEADER_SIZE + len(largest) <= request_frame_size_max(TIMED)
    assert reply_frame_size_max(TIMED) <= HEADER_SIZE + BODY_SIZE_MAX


def test_a_file_may_make_a_link_smaller_but_not_larger() -> None:
    smaller = HEAD + TIMED_ENTRY + CLIENT + 'uses = [{ name = "timed", size = "10KiB" }]\n'
    larger = HEAD + TIMED_ENTRY + CLIENT
    larger += 'uses = [{ name = "timed", depth = 1, size = "16KiB" }]\n'

    assert plan_of(smaller).links[0].size == 10 * 1024
    assert plan_of(larger).links[0].size == request_frame_size_max(TIMED)


WRONG = [
    # text behind HEAD, line, expected, found
    ("x y", 3, "TOML", "Expected '=' after a key"),
    ("colour = 1", 3, "one of the keys name, smp, total_size", '"colour"'),
    ("smp = 5", 3, "system.smp to be a whole number from 1 to 4", "5"),
    ("smp = true", 3, "system.smp to be a whole number", "true"),
    ('smp = "2"', 3, "a whole number from 1 to 4", '"2"'),
    ("total_size = 4096", 3, "a whole number with a unit (B, KiB, MiB, GiB)", "4096"),
    ('total_size = "4MB"', 3, 'such as "1MiB"', '"4MB"'),
    ('total_size = "1.5MiB"', 3, "with a unit", '"1.5MiB"'),
    ('total_size = "1GiB"', 3, "system.total_size to be 4KiB to 256MiB", '"1GiB"'),
    ("", 1, 'the key "service" in the file', "none"),
    ("[service]", 3, "at least one service", "none"),
    ("service = 3", 3, "one of the keys", '"service"'),
    ("[service.timed]", 3, 'the key "program" in service.timed', "none"),
    ("[service.timed]\nprogram = 7", 4, "service.timed.program to be a name", "7"),
    ('[service.timed]\nprogram = "clock"', 4, "a program, one of demo.interactive", '"clock"'),
    ('[service.Timed]\nprogram = "timed"', 3, "to be a name of at most 48 small", '"Timed"'),
    ('[service.init-lite]\nprogram = "timed"', 3, "another name than init's own", '"init-lite"'),
    (TIMED_ENTRY + 'qos = "high"', 6, 'one of "idle", "normal"', '"high"'),
    (TIMED_ENTRY + "cpu = -1", 6, "service.timed.cpu to be a whole number from 0 to 3", "-1"),
    (TIMED_ENTRY + 'budget = "1GiB"', 6, "service.timed.budget to be", '"1GiB"'),
    (TIMED_ENTRY + "endpoints = 97", 6, "from 2 to 96", "97"),
    (TIMED_ENTRY + "endpoints = 1", 6, "from 2 to 96", "1"),
    (TIMED_ENTRY + 'capabilities = "proof.control"', 6, "an array", '"proof.control"'),
    (TIMED_ENTRY + 'capabilities = ["Proof"]', 6, "a capability such as", '"Proof"'),
    (TIMED_ENTRY + 'capabilities = ["a.b", "a.b"]', 6, "each capability once", '"a.b" again'),
    (TIMED_ENTRY + "restart = { backoff = 50 }", 6, '(ns, us, ms, s, min) such as "50ms"', "50"),
    (TIMED_ENTRY + 'restart = { backoff = "50" }', 6, "service.timed.restart.backoff", '"50"'),
    (TIMED_ENTRY + 'restart = { backoff = "0ms" }', 6, "1ms to 1min", '"0ms"'),
    (TIMED_ENTRY + "restart = { delay = 1 }", 6, "one of the keys backoff", '"delay"'),
    (TIMED_ENTRY + 'health = "2s"', 6, "service.timed.health to be a table", '"2s"'),
    (TIMED_ENTRY + "settings = { a = 1.5 }", 6, "true, false, a 64-bit whole number", "1.5"),
    (TIMED_ENTRY + "settings = { A = 1 }", 6, "a setting in small letters", '"A"'),
    (TIMED_ENTRY + "settings = { a = [1] }", 6, "service.timed.settings.a", "an array"),
    (TIMED_ENTRY + "uses = 3", 6, "service.timed.uses to be a table", "3"),
    (TIMED_ENTRY + 'uses = ["timed"]', 6, "service.timed.uses[1] to be a table", '"timed"'),
    (TIMED_ENTRY + 'uses = [{ name = "timed" }]', 6, "a service other than itself", '"timed"'),
    (TIMED_ENTRY + 'uses = [{ name = "logd" }]', 6, "a service of this system (none)", '"logd"'),
    (
        TIMED_ENTRY + CLIENT + 'uses = [\n { name = "timed" },\n { name = "timed" },\n]',
        11,
        "each service once",
        '"timed" again',
    ),
    (
        TIMED_ENTRY + CLIENT + 'uses = [\n{ name = "timed", depth = 257 }]',
        10,
        "service.client.uses[1].depth to be a whole number from 1 to 256",
        "257",
    ),
    (
        TIMED_ENTRY + CLIENT + 'uses = [{ name = "timed", size = "1KiB" }]',
        9,
        'at least 8240B, one largest frame to "timed"',
        '"1KiB"',
    ),
    (
        TIMED_ENTRY + CLIENT + 'uses = [{ name = "timed", size = "17KiB" }]',
        9,
        "1B to 16KiB",
        '"17KiB"',
    ),
    (
        TIMED_ENTRY + 'owner_size = "20KiB"' + CLIENT + 'uses = [{ name = "timed" }]',
        6,
        'an owner_size of at least 28672B for the links of "timed"',
        "20480B",
    ),
    (
        'owner_size = "640KiB"' + TIMED_ENTRY + CLIENT,
        1,
        "a total_size of at least 1343488B, the sum of every owner_size",
        "1048576B",
    ),
    ('total_size = "1MiB"' + TIMED_ENTRY + 'owner_size = "2MiB"', 3, "a total_size of", "1048576B"),
    ('ends_with = "client"' + TIMED_ENTRY, 3, "the name of a service", '"client"'),
]


@pytest.mark.parametrize(("text", "line", "expected", "found"), WRONG)
def test_a_wrong_file_gets_one_sentence_with_its_line(
    text: str, line: int, expected: str, found: str
) -> None:
    error = error_of(HEAD + text + "\n")

    assert (error.path, error.line) == (FILE, line)
    assert expected in error.expected
    assert found in error.found
    assert str(error) == f"test.toml:{line}: expected {error.expected}, found {error.found}"
    assert "\n" not in str(error)


def test_too_many_endpoints_in_all_are_refused() -> None:
    services = "".join(
        f'[service.s{index}]\nprogram = "timed"\nendpoints = 96\nowner_size = "16KiB"\n'
        for index in range(4)
    )

    error = error_of(HEAD + services)

    assert error.line == 17
    assert "at most 384 endpoints" in error.expected


def test_a_table_of_capabilities_that_would_overflow_is_refused() -> None:
    entries = "".join(
        f'[service.c{index}]\nprogram = "demo.interactive"\nowner_size = "64KiB"\n'
        'uses = [{ name = "timed", delegations = 32 }]\n'
        for index in range(3)
    )

    head = HEAD + 'total_size = "16MiB"\n' + TIMED_ENTRY + 'owner_size = "8MiB"\n'
    error = error_of(head + entries)

    assert error.line == 5
    assert "at most 96 capability slots" in error.expected
    assert error.found == '115 for "timed"'


def test_two_names_with_one_identity_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "service_id", lambda name: ServiceId(len(name)))

    error = error_of(HEAD + TIMED_ENTRY + CLIENT + '[service.timer]\nprogram = "timed"\n')

    assert error.line == 9
    assert 'not that of "timed"' in error.expected
    assert '"timer" with 0x0000000000000005' in error.found


def test_a_name_with_the_identity_of_init_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "service_id", lambda _: ServiceId(1))

    assert 'not that of "init-lite"' in error_of(HEAD + TIMED_ENTRY).expected


def test_bytes_that_are_not_utf8_are_named() -> None:
    error = error_of(b"[system]\n# \xff\n")

    assert (error.line, error.expected, error.found) == (2, "UTF-8", "byte 0xff")


def test_an_enormous_file_is_refused_unread() -> None:
    assert "at most 262144 bytes" in error_of(b"#" * 262145).expected


def test_a_deeply_nested_file_is_refused() -> None:
    error = error_of(b"a = " + b"[" * 100_000)

    assert error.expected == "TOML"


LONG: Final = 20_000  # characters


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "smp = " + "9" * LONG,
        HEAD + "smp = 0x" + "f" * LONG,
        HEAD + "smp = " + "9" * 4000,
        HEAD + 'total_size = "' + "9" * LONG + 'B"',
        HEAD + "k" * LONG + " = 1",
        HEAD + '"' + " " * LONG + '" = 1',
        HEAD + f"[service.{'s' * LONG}]",
        HEAD + f"[service.timed.{'s' * LONG}]",
        HEAD + f"[service.timed.settings]\n{'s' * LONG} = 1",
        "a = {" + "k" * LONG + " = 1, " + "k" * LONG + " = 2}",
    ],
    ids=lambda text: text.strip()[:60].rpartition("\n")[2][:20],
)
def test_a_sentence_repeats_no_more_than_a_bounded_part_of_the_file(text: str) -> None:
    assert len(str(error_of(text))) < 300 + 2 * FOUND_SIZE_MAX


@pytest.mark.parametrize("wrong", ['smp = "a\\nb"', '"a\\u001b[31m" = 1', '"a\\u0085" = 1'])
def test_a_sentence_stays_one_line_of_printable_characters(wrong: str) -> None:
    assert str(error_of(HEAD + wrong)).isprintable()


@given(st.binary(max_size=200))
def test_any_bytes_give_a_sentence_or_a_system(data: bytes) -> None:
    try:
        parse(data, FILE)
    except SystemFileError as error:
        assert "\n" not in str(error)


@given(st.text(alphabet='[]{}"=,.\n abcservicytmdn123KMiB', max_size=80))
def test_any_text_behind_a_good_head_gives_a_sentence_or_a_plan(text: str) -> None:
    try:
        plan_of(HEAD + TIMED_ENTRY + text)
    except SystemFileError as error:
        assert error.line >= 1


def test_one_changed_value_changes_the_digest_and_a_comment_does_not() -> None:
    text = HEAD + TIMED_ENTRY
    digest = plan_of(text).digest

    assert plan_of(text + "# why\n").digest == digest
    assert plan_of(text + 'restart = { backoff = "50ms" }\n').digest == digest
    assert plan_of(text + 'restart = { backoff = "51ms" }\n').digest != digest


def test_a_changed_program_changes_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = plan_of(HEAD + TIMED_ENTRY).digest
    monkeypatch.setattr(plan_module, "program_digest", lambda _: "another")

    assert plan_of(HEAD + TIMED_ENTRY).digest != digest


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0B"), (1, "1B"), (1024, "1KiB"), (1025, "1025B"), (1 << 20, "1MiB")]
)
def test_an_amount_is_written_in_its_largest_whole_unit(amount: int, text: str) -> None:
    assert amount_text(amount, SIZE_UNITS) == text


def test_the_published_schema_is_the_one_of_the_code() -> None:
    published = ROOT / "docs" / "reference" / "system-file.schema.json"

    assert published.read_text() == schema_text(), "nexus check --schema > the file"
    assert json.loads(schema_text())["additionalProperties"] is False
