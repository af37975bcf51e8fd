"""Every command of `nexus` against real processes, as root and as an ordinary user."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.machine import NOBODY, Machine, machine, python_of

pytestmark = pytest.mark.linux

MINIMAL = Path(__file__).parents[2] / "systems" / "minimal.toml"
SERVICES = ["policyd", "logd", "timed", "operator", "demo.interactive"]


@pytest.fixture(params=["root", "user"])
def host(request: pytest.FixtureRequest) -> Iterator[Machine]:
    uid = os.getuid() if request.param == "root" else NOBODY
    if request.param == "user" and os.getuid() != 0:
        pytest.skip("the tester is an ordinary user already, and was the first case")
    python = python_of(uid)
    if python is None:
        pytest.skip("no Python here that an ordinary user may run with our packages")
    with machine(uid, python) as made:
        yield made


@pytest.fixture
def own() -> Iterator[Machine]:
    python = python_of(os.getuid())
    assert python is not None
    with machine(os.getuid(), python) as made:
        yield made


def pid_of(host: Machine, service: str) -> int | None:
    rows = host.ok("status", "--json").json["services"]
    (pid,) = [row["pid"] for row in rows if row["service"] == service]
    assert pid is None or isinstance(pid, int)
    return pid


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds soon; each look is a command of its own, which is pause enough."""
    until = time.monotonic_ns() + 20 * 10**9
    while time.monotonic_ns() < until:
        if holds():
            return True
    return False


def test_a_system_is_started_asked_followed_and_ended(host: Machine) -> None:
    up = host.ok("up", "-d", str(MINIMAL))
    assert "minimal is up" in up.out
    assert up.err == ""

    table = host.ok("status").out.splitlines()
    assert table[0].startswith("minimal: ready, process ")
    assert [line.split()[0] for line in table[2:]] == SERVICES
    assert all(line.split()[1] == "up" for line in table[2:])
    document = host.ok("status", "--json").json
    assert document["state"] == "ready"
    assert document["policy"]["available"] is True
    for row in document["services"]:
        assert row["since_seconds"] is not None
        assert Path(f"/proc/{row['pid']}").exists()

    timer = host.ok("call", "timed", "register", "deadline=+30s", "--json").json
    assert host.ok("call", "timed", "cancel", f"timer_id={timer['timer_id']}").out
    refused = host.run("call", "timed", "cancel", f"timer_id={timer['timer_id']}")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == "nexus: timed refused Cancel: NOT_FOUND\n"

    audits = [json.loads(line) for line in host.ok("logs", "--json").out.splitlines()]
    mine = [each for each in audits if each["fields"].get("target") == "timed"]
    assert {each["fields"]["peer_uid"] for each in mine} == {str(host.uid)}
    assert {each["service"] for each in mine} == {"operator"}

    down = host.ok("down")
    assert "has ended after" in down.out
    assert host.run("status").err.startswith("nexus: no system runs here")
    assert host.ok("status", "--all", "--json").json == []


def test_the_door_is_closed_to_other_users(own: Machine) -> None:
    python = python_of(NOBODY) if os.getuid() == 0 else None
    if python is None:
        pytest.skip("needs root, and a Python that others may run")
    _ = own.ok("up", "-d", str(MINIMAL))
    for path in (own.home, own.home / "r", own.home / "r" / "minimal"):
        path.chmod(0o755)
    (own.home / "r" / "minimal" / "operator.sock").chmod(0o777)  # only the kernel's word is left
    (own.home / "r" / "minimal" / "up.lock").chmod(0o644)
    other = Machine(own.home, NOBODY, python)
    answer = other.run("status")
    assert answer.code == 1
    assert "operator of minimal ended the connection" in answer.err
    assert own.ok("status").out
    _ = own.ok("down")


def test_a_second_start_is_refused_and_a_second_instance_is_not(host: Machine) -> None:
    first = host.ok("up", "-d", str(MINIMAL), "--json").json
    again = host.run("up", "-d", str(MINIMAL))
    assert again.code == 1
    assert again.err == (
        f"nexus: minimal runs already, as process {first['pid']}: end it with `nexus down`, "
        "or give this one a name of its own with --instance\n"
    )
    _ = host.ok("up", "-d", str(MINIMAL), "--instance", "b")
    both = host.run("status")
    assert both.code == 2
    assert both.err.startswith("nexus: several systems run here, name one with --name: minimal, ")
    if host.uid == 0:
        ids = [
            {Path(f"/proc/{pid}").stat().st_uid for pid in pids}
            for pids in (pids_of(host, "minimal"), pids_of(host, "minimal@b"))
        ]
        assert len(ids[0]) == len(ids[1]) == len(SERVICES)
        assert ids[0].isdisjoint(ids[1])
    _ = host.ok("down", "--name", "minimal@b")
    assert host.ok("status").out.startswith("minimal: ready")
    _ = host.ok("down")


def pids_of(host: Machine, title: str) -> list[int]:
    rows = host.ok("status", "--json", "--name", title).json["services"]
    return [row["pid"] for row in rows]


def test_in_the_foreground_ctrl_c_ends_it_in_order(own: Machine) -> None:
    process = own.start("up", str(MINIMAL))
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "init: ready\n":
            break
    assert "timed: ready\n" in lines
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "minimal is up after" in err
    assert "ending minimal" in err
    assert err.endswith("minimal has ended\n")
    assert "Traceback" not in out + err
    assert "init: stopped\n" in out


def test_when_the_command_is_killed_its_system_ends_too(own: Machine) -> None:
    process = own.start("up", str(MINIMAL))
    assert process.stdout is not None
    for line in process.stdout:
        if line == "init: ready\n":
            break
    process.kill()
    _ = process.communicate(timeout=30)
    assert eventually(lambda: own.ok("status", "--all", "--json").json == [])


def test_a_system_that_does_not_get_ready_is_ended_and_says_who(own: Machine) -> None:
    text = MINIMAL.read_text().replace('    "port.operator",\n', "")
    file = own.write("broken.toml", text)
    answer = own.run("up", "-d", file, "--wait", "2")
    assert answer.code == 1
    assert "was not ready after 2 s and was ended (operator: has not said that it is ready)" in (
        answer.err
    )
    assert answer.err.count("\n") == 1
    assert own.ok("status", "--all", "--json").json == []


def test_a_wrong_system_file_starts_nothing(own: Machine) -> None:
    file = own.write("wrong.toml", '[system]\nname = "x"\nspeed = 3\n')
    for words in (("up", "-d", file), ("up", file), ("up", "--exec", file), ("unit", file)):
        answer = own.run(*words)
        assert answer.code == 2, words
        assert answer.err.startswith(f"nexus: {file}:3: expected one of the keys")
        assert answer.err.count("\n") == 1


def test_as_a_service_it_is_the_process_that_was_started(own: Machine) -> None:
    process = own.start("up", "--exec", str(MINIMAL))
    assert process.stdout is not None
    for line in process.stdout:
        if "init: ready" in line:
            break
    assert own.ok("status", "--json").json["pid"] == process.pid
    process.send_signal(signal.SIGTERM)
    _ = process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_killed_service_is_seen_in_the_table(own: Machine) -> None:
    _ = own.ok("up", "-d", str(MINIMAL))
    before = pid_of(own, "timed")
    assert str(before) in own.ok("restart", "timed").out
    assert eventually(lambda: pid_of(own, "timed") not in (None, before))
    (row,) = [
        row for row in own.ok("status", "--json").json["services"] if row["service"] == "timed"
    ]
    assert (row["restarts"], row["generation"], row["exit_signal"]) == (1, 2, 9)
    assert own.run("restart", "nobody").err.startswith("nexus: there is no service nobody")
    _ = own.ok("down")


def test_the_journal_is_followed_until_ctrl_c(own: Machine) -> None:
    _ = own.ok("up", "-d", str(MINIMAL))
    following = own.start("logs", "-f", "--json", "--field", "target=timed")
    _ = own.ok("call", "timed", "register", "deadline=+1s")
    assert following.stdout is not None
    record = json.loads(following.stdout.readline())
    assert record["fields"]["target"] == "timed"
    assert record["level"] == "info"
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=30)
    assert (following.returncode, err) == (1, "nexus: interrupted\n")
    assert own.run("logs", "--level", "loud").code == 2
    assert own.run("logs", "--field", "x").code == 2
    assert own.ok("logs", "--level", "error").out == ""
    _ = own.ok("down")


def test_a_policy_is_reloaded_while_it_runs(own: Machine) -> None:
    file = own.write("system.toml", MINIMAL.read_text())
    _ = own.ok("up", "-d", file)
    assert own.ok("logs").out
    _ = own.write("system.toml", MINIMAL.read_text().replace('    "log.read",\n', ""))
    before = own.ok("status", "--json").json["policy"]["generation"]
    done = own.ok("policy", "reload", "--json").json
    assert done["generation"] > before
    denied = own.run("logs")
    assert denied.code == 1
    assert "logd refused Query: DENIED" in denied.err
    assert own.run("explain", "operator", "logd", "log.read").code == 1
    _ = own.write("system.toml", MINIMAL.read_text())
    _ = own.ok("policy", "reload")
    assert own.ok("logs").out
    _ = own.write("system.toml", "nonsense")
    assert own.run("policy", "reload").code == 2
    _ = own.ok("down")


def test_safe_mode_is_not_left_when_it_is_not_entered(own: Machine) -> None:
    _ = own.ok("up", "-d", str(MINIMAL))
    answer = own.run("safe", "leave")
    assert (answer.code, answer.err) == (1, "nexus: minimal is not in safe mode\n")
    _ = own.ok("down")


def test_down_falls_back_to_a_signal_without_an_operator(own: Machine) -> None:
    file = own.write("bare.toml", '[system]\nname = "bare"\n[service.timed]\nprogram = "timed"\n')
    _ = own.ok("up", "-d", file)
    status = own.run("status")
    assert status.code == 1
    assert status.err.startswith("nexus: bare has no operator")
    down = own.ok("down", "--json")
    assert down.json["how"] == "signalled"
    assert "sending SIGTERM instead" in down.err


def test_down_says_so_when_a_system_does_not_end(own: Machine) -> None:
    file = own.write("bare.toml", '[system]\nname = "bare"\n[service.timed]\nprogram = "timed"\n')
    pid = own.ok("up", "-d", file, "--json").json["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        answer = own.run("down", "--timeout", "0.5")
        assert answer.code == 1
        assert f"bare (process {pid}) has not ended after 0.5 s" in answer.err
    finally:
        os.kill(pid, signal.SIGCONT)
    assert eventually(lambda: own.ok("status", "--all", "--json").json == [])


def test_doctor_and_bugreport_tell_what_they_found(own: Machine) -> None:
    rows = own.ok("doctor", "--json").json["guarantees"]
    assert {row["state"] for row in rows} <= {"held", "degraded", "absent"}
    assert all(row["why"] for row in rows if row["state"] != "held")
    assert own.ok("doctor").out.startswith("GUARANTEE")
    _ = own.ok("up", "-d", str(MINIMAL))
    report = own.ok("bugreport", "--json").json
    assert {"status.json", "logs.jsonl", "console.log", "doctor.json"} <= set(report["parts"])
    assert (own.home / report["file"]).stat().st_mode & 0o777 == 0o600
    _ = own.ok("down")
