"""System files: what is read, and the sentence each wrong one gets."""

import json
import time
from pathlib import Path
from typing import Final

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nexus.abi import (
    LINK_SIZE_MAX,
    DeviceGrant,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    ListenGrant,
    Nanos,
    QosClass,
    SecretBackend,
    ServiceId,
)
from nexus.init import crosschecks
from nexus.init import plan as plan_module
from nexus.init.crosschecks import CORE_STAGE, POLICY_STAGE, REST_STAGE
from nexus.init.declare import FOUND_SIZE_MAX, SIZE_UNITS, amount_text
from nexus.init.errors import SystemFileError
from nexus.init.frames import reply_frame_size_max, request_frame_size_max
from nexus.init.plan import (
    Plan,
    PlannedGroup,
    make_plan,
    plan_data,
    reserved_size,
)
from nexus.init.policy import policy_schema_text
from nexus.init.system import Exceeded, Strategy, parse, schema_text
from nexus.kernel.core.hardware import Hardware, check_bus
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Register
from nexus.wire import BODY_SIZE_MAX, HEADER_SIZE, encode

ROOT = Path(__file__).parents[2]
FILE = Path("test.toml")
TIME_MAX: Final = 3.0  # s of CPU for a file of 256 KiB; it takes one at most, on two cores of 2020

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
cpu_share = 150
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
    assert (client.cpu_share, plan.by_name["timed"].cpu_share) == (150, None)
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
    ("[service.timed]", 3, 'the key "program" or "module" in service.timed', "none"),
    ("[service.timed]\nprogram = 7", 4, "service.timed.program to be a name", "7"),
    ('[service.timed]\nprogram = "clock"', 4, "a program, one of demo.exit0, ", '"clock"'),
    ('[service.Timed]\nprogram = "timed"', 3, "to be a name of at most 48 small", '"Timed"'),
    ('[service.init-lite]\nprogram = "timed"', 3, "a name that is not reserved", '"init-lite"'),
    (TIMED_ENTRY + 'qos = "high"', 6, 'one of "idle", "normal"', '"high"'),
    (TIMED_ENTRY + "cpu = -1", 6, "service.timed.cpu to be a whole number from 0 to 3", "-1"),
    (TIMED_ENTRY + "cpu_share = 0", 6, "cpu_share to be a whole number from 1 to 400", "0"),
    (TIMED_ENTRY + "cpu_share = 401", 6, "cpu_share to be a whole number from 1 to 400", "401"),
    (TIMED_ENTRY + 'cpu_share = "20%"', 6, "a whole number from 1 to 400", '"20%"'),
    (TIMED_ENTRY + 'budget = "1GiB"', 6, "service.timed.budget to be", '"1GiB"'),
    (TIMED_ENTRY + "endpoints = 97", 6, "from 2 to 96", "97"),
    (TIMED_ENTRY + "endpoints = 1", 6, "from 2 to 96", "1"),
    (TIMED_ENTRY + 'capabilities = "proof.control"', 6, "an array", '"proof.control"'),
    (TIMED_ENTRY + 'capabilities = ["Proof"]', 6, "a right such as", '"Proof"'),
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
    monkeypatch.setattr(crosschecks, "service_id", lambda name: ServiceId(ord(name[0])))

    error = error_of(HEAD + TIMED_ENTRY + CLIENT + '[service.timer]\nprogram = "timed"\n')

    assert error.line == 9
    assert 'not that of "timed"' in error.expected
    assert '"timer" with 0x0000000000000074' in error.found


def test_a_name_with_the_identity_of_init_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosschecks, "service_id", lambda _: ServiceId(1))

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


def test_the_schema_of_policy_files_is_published_too() -> None:
    published = ROOT / "docs" / "reference" / "policy-file.schema.json"

    assert published.read_text() == policy_schema_text()
    allow = json.loads(policy_schema_text())["properties"]["allow"]
    assert allow["additionalProperties"]["uniqueItems"] is True


def test_the_schema_says_which_keys_exclude_and_need_each_other() -> None:
    service = json.loads(schema_text())["properties"]["service"]["additionalProperties"]

    assert service["oneOf"] == [{"required": ["program"]}, {"required": ["module"]}]
    assert service["dependentRequired"]["module"] == ["protocol"]
    assert service["dependentRequired"]["double"] == ["ordinary"]
    assert service["properties"]["program"]["pattern"].startswith("^(?:")


# ---------------------------------------------------------------- stages, groups, watching, grants

POLICYD = """
[service.policyd]
program = "policyd"
"""


def test_services_start_by_stage_and_in_a_stage_as_in_the_file() -> None:
    plan = plan_of(
        HEAD
        + 'total_size = "2MiB"\n'
        + CLIENT
        + TIMED_ENTRY
        + 'stage = "core"\n'
        + '\n[service.logd]\nprogram = "logd"\nstage = "core"\nuses = { policyd = {} }\n'
        + POLICYD
    )

    assert [(service.name, service.stage) for service in plan.services] == [
        ("policyd", POLICY_STAGE),
        ("timed", CORE_STAGE),
        ("logd", CORE_STAGE),
        ("client", REST_STAGE),
    ]
    assert plan.policyd == "policyd"
    assert plan.policy.services == ["policyd", "timed", "logd", "client"]


def test_the_policy_service_is_watched_more_closely_and_is_there_in_safe_mode() -> None:
    plan = plan_of(HEAD + POLICYD + TIMED_ENTRY)

    policyd, timed = plan.services
    assert policyd.safe
    assert not timed.safe
    assert (policyd.probe_every, policyd.probe_answer) == (250_000_000, 500_000_000)
    assert policyd.probe_every + policyd.probe_answer <= plan.policy_stale_max
    assert (timed.probe_every, timed.probe_answer) == (1_000_000_000, 2_000_000_000)


def test_a_system_without_the_new_keys_gets_their_defaults() -> None:
    plan = plan_of(HEAD + TIMED_ENTRY)

    (timed,) = plan.services
    assert (plan.stable, plan.safe_after) == (10_000_000_000, 3)
    assert (plan.policy_stale_max, plan.policyd, plan.path) == (1_000_000_000, None, ())
    assert (plan.state_dir, plan.runtime_dir, plan.log_dir) == (None, None, None)
    assert (timed.backoff_max, timed.backoff_reset) == (5_000_000_000, 10_000_000_000)
    assert (timed.probe_misses, timed.late_max, timed.stop_max) == (1, 0, 1_000_000_000)
    assert timed.grants == Grants()
    assert (timed.entry, timed.double, timed.ordinary, timed.posts) == ("", "", False, ())
    assert plan.groups == (
        PlannedGroup(
            name="timed",
            strategy=Strategy.ONE,
            restarts=10,
            within=Nanos(60_000_000_000),
            exceeded=Exceeded.GIVE_UP,
            members=("timed",),
        ),
    )


def test_every_new_key_reaches_the_plan() -> None:
    plan = plan_of(
        HEAD
        + """stable = "20s"
safe_after = 0
policy_stale_max = "2s"
state_dir = "/var/lib/x"
runtime_dir = "/run/x"
log_dir = "/var/log/x"

[group.time]
strategy = "rest"
restarts = 2
within = "1min"
exceeded = "shut-down"
"""
        + TIMED_ENTRY
        + """
group = "time"
safe = true
threads = 4
ports = ["console"]
isolation = "exec"
devices.serial = { path = "/dev/ttyS0", writable = true }
devices.clock = { path = "/dev/rtc0" }
listen.web = { port = 8080 }
connect = [1883, 8883]
restart = { backoff = "20ms", backoff_max = "2s", reset = "3s" }
health = { deadline = "4s", every = "500ms", misses = 3, late_max = 9 }
stop = "5s"
"""
        + CLIENT
        + 'group = "time"\nsafe = true\nuses = { timed = { sync = false } }\n'
    )

    timed, client = plan.services
    assert (plan.stable, plan.safe_after, plan.policy_stale_max) == (20 * 10**9, 0, 2 * 10**9)
    assert (plan.state_dir, plan.runtime_dir, plan.log_dir) == (
        "/var/lib/x",
        "/run/x",
        "/var/log/x",
    )
    assert plan.groups == (
        PlannedGroup(
            name="time",
            strategy=Strategy.REST,
            restarts=2,
            within=Nanos(60_000_000_000),
            exceeded=Exceeded.SHUT_DOWN,
            members=("timed", "client"),
        ),
    )
    assert timed.grants == Grants(
        isolation=Isolation.EXEC,
        threads=4,
        ports=("console",),
        devices=(
            DeviceGrant("serial", "/dev/ttyS0", writable=True),
            DeviceGrant("clock", "/dev/rtc0", writable=False),
        ),
        listen=(ListenGrant("web", "127.0.0.1", 8080),),
        connect=(1883, 8883),
    )
    assert (timed.backoff, timed.backoff_max, timed.backoff_reset) == (
        20_000_000,
        2_000_000_000,
        3_000_000_000,
    )
    assert (timed.health_deadline, timed.probe_every, timed.probe_answer) == (
        4_000_000_000,
        500_000_000,
        4_000_000_000,
    )
    assert (timed.probe_misses, timed.late_max, timed.stop_max) == (3, 9, 5_000_000_000)
    assert timed.safe
    assert client.posts == ("timed",)
    assert not plan.links[0].sync


def test_devices_of_the_machine_are_granted_by_name() -> None:
    plan = plan_of(
        HEAD
        + """
[device.disk]
kind = "block"
size = "16MiB"
path = "/dev/disk/by-label/state"

[device.rng]
kind = "entropy"

[device.spare]
kind = "empty"

[device.old]
kind = "block"
size = "64KiB"
legacy = true
"""
        + TIMED_ENTRY
        + 'hardware = ["spare", "disk"]\nisolation = "exec"\nsecret = "keyring"\n'
        + CLIENT
    )

    assert plan.hardware == (
        Hardware("disk", HardwareKind.BLOCK, 16 * 1024**2, "/dev/disk/by-label/state"),
        Hardware("rng", HardwareKind.ENTROPY),
        Hardware("spare", HardwareKind.EMPTY),
        Hardware("old", HardwareKind.BLOCK, 64 * 1024, legacy=True),
    )
    timed, client = plan.services
    assert timed.grants.hardware == (
        HardwareGrant("spare", HardwareKind.EMPTY),
        HardwareGrant("disk", HardwareKind.BLOCK),
    )
    assert timed.grants.secret is SecretBackend.KEYRING
    assert client.grants == Grants()
    check_bus(plan.hardware)


def test_the_longest_backoff_follows_a_longer_first_one() -> None:
    plan = plan_of(HEAD + TIMED_ENTRY + 'restart = { backoff = "20s" }\n')

    assert plan.services[0].backoff_max == 20_000_000_000


def test_every_service_is_in_exactly_one_group() -> None:
    plan = plan_of(HEAD + "[group.pair]\n" + TIMED_ENTRY + 'group = "pair"\n' + CLIENT + POLICYD)

    members = [name for group in plan.groups for name in group.members]
    assert sorted(members) == ["client", "policyd", "timed"]
    assert {service.name: service.group for service in plan.services} == {
        "policyd": "policyd",
        "timed": "pair",
        "client": "client",
    }
    assert {group.name for group in plan.groups} == {"pair", "policyd", "client"}
    assert plan.groups[0].exceeded is Exceeded.SAFE_MODE


def test_posts_may_go_in_circles_and_waiting_may_not() -> None:
    posts = HEAD + TIMED_ENTRY + "uses = { client = { sync = false } }\n"
    posts += CLIENT + "uses = { timed = {} }\n"

    assert [link.sync for link in plan_of(posts).links] == [False, True]
    assert "timed -> client -> timed" in error_of(posts.replace("{ sync = false }", "{}")).found


def test_a_cycle_behind_a_long_way_is_named_without_the_way() -> None:
    chain = "".join(
        f'\n[service.s{index}]\nprogram = "timed"\nowner_size = "64KiB"\n'
        f"uses = {{ s{index + 1} = {{}}, s39 = {{}} }}\n"
        for index in range(38)
    )
    tail = '\n[service.s38]\nprogram = "timed"\nowner_size = "64KiB"\nuses = { s39 = {} }\n'
    tail += '\n[service.s39]\nprogram = "timed"\nowner_size = "2MiB"\nuses = { s38 = {} }\n'

    error = error_of(HEAD + 'total_size = "16MiB"\n' + chain + tail)

    assert error.found.startswith("s38 -> s39 -> s38 (lines ")


BASE = HEAD + TIMED_ENTRY + CLIENT
DISK = '[device.disk]\nkind = "block"\nsize = "1MiB"\n'
CHANGES = {
    "system": ("stable", "safe_after", "policy_stale_max", "state_dir", "runtime_dir", "log_dir"),
    "values": ('"9s"', "5", '"900ms"', '"/a"', '"/b"', '"/c"'),
}


@pytest.mark.parametrize(
    "text",
    [
        *(
            HEAD + f"{key} = {value}\n" + TIMED_ENTRY + CLIENT
            for key, value in zip(CHANGES["system"], CHANGES["values"], strict=True)
        ),
        HEAD + '[group.client]\nstrategy = "all"\n' + TIMED_ENTRY + CLIENT + 'group = "client"\n',
        BASE + 'stage = "core"\n',
        BASE + "safe = true\n",
        BASE + "threads = 1\n",
        BASE + 'ports = ["a"]\n',
        BASE + 'isolation = "exec"\n',
        BASE + 'isolation = "exec"\nconnect = [80]\n',
        BASE + 'isolation = "exec"\nlisten.a = { port = 80 }\n',
        BASE + 'isolation = "exec"\ndevices.a = { path = "/dev/a" }\n',
        HEAD + DISK + TIMED_ENTRY + CLIENT,
        HEAD + DISK.replace("1MiB", "2MiB") + TIMED_ENTRY + CLIENT,
        HEAD + DISK + 'path = "/dev/sda"\n' + TIMED_ENTRY + CLIENT,
        HEAD + DISK + "legacy = true\n" + TIMED_ENTRY + CLIENT,
        HEAD + DISK + TIMED_ENTRY + CLIENT + 'hardware = ["disk"]\n',
        BASE + 'isolation = "exec"\nsecret = "file"\n',
        BASE + 'isolation = "exec"\nsecret = "keyring"\n',
        BASE + 'restart = { backoff_max = "1s" }\n',
        BASE + 'restart = { reset = "1s" }\n',
        BASE + 'health = { every = "3s" }\n',
        BASE + 'health = { answer = "3s" }\n',
        BASE + "health = { misses = 2 }\n",
        BASE + "health = { late_max = 2 }\n",
        BASE + 'stop = "2s"\n',
        BASE + 'capabilities = ["proof.control"]\n',
        BASE + "uses = { timed = {} }\n",
        BASE + "uses = { timed = { sync = false } }\n",
    ],
)
def test_every_key_counts_for_the_digest(text: str) -> None:
    assert plan_of(text).digest != plan_of(BASE).digest
    assert plan_of(text).digest == plan_of(text + "# why\n").digest


def test_a_post_and_a_call_are_two_digests() -> None:
    call = BASE + "uses = { timed = {} }\n"

    assert plan_of(call).digest != plan_of(call.replace("{}", "{ sync = false }")).digest


def test_the_data_of_a_plan_is_json_with_the_names_of_its_fields() -> None:
    plan = plan_of(BASE + 'isolation = "exec"\nconnect = [80]\ncapabilities = ["a.b"]\n')

    data = json.loads(json.dumps(plan_data(plan)))

    assert data["services"][1]["grants"]["connect"] == [80]
    assert data["policy"]["allow"] == {"client": [["a.b", "test.toml", 11, ""]]}
    assert data["groups"][0]["strategy"] == "one"
    assert "by_name" not in data


def test_a_file_that_fills_its_bound_is_read_in_bounded_time() -> None:
    for text in (
        "a." * 60_000 + "a = 1\n",
        '"\\"".' + '"a".' * 60_000 + "a = 1\n",
        'x = { x = """\n""", ' + "a." * 100_000 + "a = 1 }\n",
        "".join(f"a{index} = 1\n" for index in range(20_000)),
        "a = [\n" + "1,\n" * 80_000 + "]\n",
        "a = " + "{a = " * 400 + "1" + "}" * 400,
    ):
        before = time.process_time()
        _ = error_of(text)
        assert time.process_time() - before < TIME_MAX
