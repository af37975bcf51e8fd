"""What `nexus check` shows of a plan."""

from pathlib import Path

import pytest

from nexus.cli.check import describe
from nexus.init.plan import make_plan
from nexus.init.system import parse

SYSTEM = """[system]
name = "shown"
total_size = "2MiB"

[group.pair]
strategy = "rest"
restarts = 3
within = "1min"
exceeded = "shut-down"

[service.client]
program = "demo.interactive"
group = "pair"
isolation = "exec"
threads = 2
ports = ["console"]
connect = [1883]
capabilities = ["proof.control", "log.read"]
health = { every = "0s" }
restart = { backoff = "20ms", backoff_max = "2s" }

[service.client.devices]
serial = { path = "/dev/ttyS0", writable = true }

[service.client.listen]
web = { port = 8080 }

[service.client.uses]
timed = { sync = false }

[service.timed]
program = "timed"
group = "pair"
stage = "core"
safe = true
health = { misses = 2, late_max = 7 }

[service.policyd]
program = "policyd"
"""


@pytest.fixture
def lines() -> list[str]:
    return describe(make_plan(parse(SYSTEM.encode(), Path("shown.toml"))))


def rows(lines: list[str], head: str) -> list[list[str]]:
    """The cells of the table whose first column is `head`, two spaces between them."""
    start = next(at for at, line in enumerate(lines) if line.startswith(f"{head} "))
    end = next(at for at in range(start, len(lines)) if not lines[at])
    return [[cell.strip() for cell in line.split("  ") if cell] for line in lines[start + 1 : end]]


def test_services_are_shown_in_the_order_of_their_start(lines: list[str]) -> None:
    assert [row[:3] for row in rows(lines, "SERVICE")] == [
        ["policyd", "policy", "policyd"],
        ["timed", "core", "timed"],
        ["client", "rest", "demo.interactive"],
    ]
    assert [row[5] for row in rows(lines, "SERVICE")] == ["yes", "yes", "no"]


def test_how_a_service_is_watched_and_started_again_is_shown(lines: list[str]) -> None:
    table = rows(lines[lines.index("") + 5 :], "SERVICE")

    assert table[1] == ["timed", "2s", "1s", "2s, 2 missed", "7", "50ms to 5s", "10s", "1s"]
    assert table[2] == ["client", "2s", "first only", "-", "-", "20ms to 2s", "10s", "1s"]


def test_a_post_is_told_from_a_call(lines: list[str]) -> None:
    assert rows(lines, "CLIENT")[0][:3] == ["client", "timed", "post"]


def test_declared_groups_are_shown_and_a_services_own_is_not(lines: list[str]) -> None:
    assert rows(lines, "GROUP") == [["pair", "rest", "3 in 1min", "shut-down", "timed, client"]]


def test_grants_are_shown_for_those_who_have_any(lines: list[str]) -> None:
    start = next(at for at, line in enumerate(lines) if "ISOLATION" in line)

    assert [line.split("  ")[0] for line in lines[start + 1 : lines.index("", start)]] == ["client"]
    assert lines[start + 1].endswith(
        "port console; device serial /dev/ttyS0 writable;"
        " listens web 127.0.0.1 port 8080; connects to port 1883"
    )


def test_the_policy_says_which_line_gives_a_right(lines: list[str]) -> None:
    assert rows(lines, "SUBJECT") == [["client", "proof.control, log.read", "shown.toml:18"]]


def test_a_small_system_has_no_empty_tables() -> None:
    small = b'[system]\nname = "small"\n[service.timed]\nprogram = "timed"\n'

    lines = describe(make_plan(parse(small, Path("small.toml"))))

    assert sum(line.startswith("SERVICE ") for line in lines) == 2
    assert not any(line.startswith(("CLIENT", "GROUP", "SUBJECT")) for line in lines)
