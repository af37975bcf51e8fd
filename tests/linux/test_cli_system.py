"""Every command of `nexus` against real processes, as root and as an ordinary user."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from nexus.cli.places import Running
from nexus.proof.lock import start_of
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
    until = time.monotonic_ns() + 60 * 10**9
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
    out, err = process.communicate(timeout=60)
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
    _ = process.communicate(timeout=60)
    assert eventually(lambda: own.ok("status", "--all", "--json").json == [])


def test_a_system_that_does_not_get_ready_is_ended_and_says_who(own: Machine) -> None:
    text = MINIMAL.read_text().replace('    "port.operator",\n', "")
    file = own.write("broken.toml", text)
    start = time.monotonic_ns()
    answer = own.run("up", "-d", file, "--wait", "80")
    assert time.monotonic_ns() - start < 60 * 10**9, "nobody waits for what init will not start"
    assert answer.code == 1
    assert answer.err == (
        "nexus: minimal cannot get ready and was ended (operator: not started, the policy does not "
        f"allow what the system file grants it): see {own.home}/l/minimal/console.log\n"
    )
    assert own.ok("status", "--all", "--json").json == []


BROKEN = """
class Broken:
    def __init__(self, context):
        raise ValueError("out of order")

    async def handle(self, call, request):
        raise AssertionError
"""


def test_nobody_waits_for_a_service_that_init_gives_up(own: Machine) -> None:
    _ = own.write("broken.py", BROKEN)
    text = (
        '[system]\nname = "broken"\npath = ["."]\n[service.bad]\nmodule = "broken:Broken"\n'
        'protocol = "nexus.protocols.interactive"\n'
        '[group.own]\nrestarts = 1\nwithin = "30s"\nexceeded = "give-up"\n'
    )
    file = own.write(
        "broken.toml", text.replace("[service.bad]\n", '[service.bad]\ngroup = "own"\n')
    )
    start = time.monotonic_ns()
    answer = own.run("up", "-d", file, "--wait", "80")
    assert time.monotonic_ns() - start < 60 * 10**9
    assert answer.code == 1
    assert "nexus: broken cannot get ready and was ended (bad: init gave up on it: " in answer.err
    assert "more than 1 restarts of its group within 30000 ms" in answer.err
    assert "ValueError: out of order" in answer.err
    assert answer.err.count("\n") == 1
    assert own.ok("status", "--all", "--json").json == []


def test_a_service_that_only_takes_long_is_waited_for_to_the_end(own: Machine) -> None:
    slow = BROKEN.replace('raise ValueError("out of order")', "pass").replace(
        "    async def handle",
        "    async def start(self):\n        await Sleep()\n\n    async def handle",
    )
    slow = (
        "from nexus.abi import Now, Nanos, SleepUntil\n\n\nasync def Sleep():\n"
        "    await SleepUntil(Nanos(await Now() + 50_000_000_000))\n\n\n" + slow
    )
    _ = own.write("slow.py", slow)
    file = own.write(
        "slow.toml",
        '[system]\nname = "slow"\npath = ["."]\n[service.late]\nmodule = "slow:Broken"\n'
        'protocol = "nexus.protocols.interactive"\nhealth = { deadline = "60s" }\n',
    )
    answer = own.run("up", "-d", file, "--wait", "5")
    assert answer.code == 1
    assert "slow was not ready after 5 s and was ended (late: has not said that it is ready)" in (
        answer.err
    )
    assert answer.err.count("\n") == 1


def test_who_asks_a_system_that_has_ended_is_told_so(own: Machine) -> None:
    pid = own.ok("up", "-d", str(MINIMAL), "--json").json["pid"]
    following = own.start("logs", "-f", "--field", "target=timed")
    waiting = own.start("call", "timed", "sleep", "deadline=+30s", "--timeout", "40")
    assert following.stdout is not None
    assert "timed" in following.stdout.readline(), "operator has passed the request on"
    os.kill(pid, signal.SIGKILL)
    for process in (following, waiting):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert err == "nexus: minimal has ended, and runs no more: start it again with `nexus up`\n"


def test_systems_of_root_share_no_user_ids_wherever_they_keep_their_locks(own: Machine) -> None:
    if os.getuid() != 0:
        pytest.skip("only root gives services user ids")
    with machine(0, own.python) as other:
        for each in (own, other):
            _ = each.ok("up", "-d", str(MINIMAL))
        ids = [
            {Path(f"/proc/{pid}").stat().st_uid for pid in pids_of(each, "minimal")}
            for each in (own, other)
        ]
        for each in (own, other):
            _ = each.ok("down")
    assert [len(each) for each in ids] == [len(SERVICES), len(SERVICES)]
    assert ids[0].isdisjoint(ids[1])


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
    _ = process.communicate(timeout=60)
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
    _, err = following.communicate(timeout=60)
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


def test_a_second_init_is_refused_when_the_lock_files_are_gone(own: Machine) -> None:
    first = own.ok("up", "-d", str(MINIMAL), "--json").json["pid"]
    home = own.home / "r" / "minimal"
    (home / "up.lock").unlink()
    again = own.run("up", "-d", str(MINIMAL))
    assert again.code == 1
    assert again.err.startswith(f"nexus: minimal runs already, as process {first}: ")
    (home / "up.lock").unlink(missing_ok=True)
    record = (home / "system.json").read_bytes()
    (home / "system.json").unlink()
    again = own.run("up", "-d", str(MINIMAL))
    assert again.code == 1
    assert f"holds the state directory {own.home}/s/minimal: end it" in again.err
    assert again.err.count("\n") == 1
    _ = (home / "system.json").write_bytes(record)
    assert own.ok("status", "--json").json["pid"] == first
    assert own.ok("down", "--json").json["system"] == "minimal"
    assert own.ok("status", "--all", "--json").json == []


def test_another_users_directory_sends_no_signal_anywhere() -> None:
    python = python_of(NOBODY) if os.getuid() == 0 else None
    if python is None:
        pytest.skip("needs root, and a Python that others may run")
    with machine(NOBODY, python) as victim:
        process = subprocess.Popen(["sleep", "600"], user=NOBODY, group=NOBODY, extra_groups=[])
        base = victim.home / "r"
        home = base / "pump"
        home.mkdir(parents=True)
        for path in (base, home):
            os.chown(path, NOBODY - 1, NOBODY - 1)  # the attacker's, as /tmp/nexus-UID made first
            path.chmod(0o755)
        lock_file = home / "up.lock"
        started = start_of(process.pid)
        _ = lock_file.write_text(f"{process.pid} {started}\n")
        lock_file.chmod(0o644)
        running = Running(
            title="pump",
            file="f",
            digest="d",
            pid=process.pid,
            started=started,
            state=str(home),
            runtime=str(home),
            log=str(home),
            stop_ns=10**9,
        )
        _ = (home / "system.json").write_bytes(msgspec.json.encode(running))
        held = os.open(lock_file, os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)  # by the attacker, for as long as it takes
        try:
            for words in (("down",), ("down", "--name", "pump"), ("status",), ("status", "--all")):
                answer = victim.run(*words)
                assert answer.code == 1, words
                assert answer.err == (
                    f"nexus: {base} is not a directory that only this user can write: remove it, "
                    "or have it belong to you with mode 0700\n"
                )
            answer = victim.run("up", "-d", str(MINIMAL))
            assert (answer.code, "only this user can write" in answer.err) == (1, True)
            assert process.poll() is None
        finally:
            os.close(held)
            process.kill()
            _ = process.wait()
            shutil.rmtree(base)


CRASHING = """
class Probe:
    def __init__(self, context):
        raise ValueError(chr(1) * 3900 + "\\n9.000000 timed [console] timed: ready")
"""


def test_a_crash_full_of_control_characters_ends_no_foreground(own: Machine) -> None:
    file = own.write("system.toml", MINIMAL.read_text() + PROBE)
    own_code(own, CRASHING + HANDLE)
    process = own.start("up", file)
    console = own.home / "l" / "minimal" / "console.log"
    assert eventually(lambda: own.ok("status", "--all", "--json").json != [])
    assert eventually(lambda: console.exists() and console.read_text().count("probe [exit]") >= 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1), err  # 1: it was just crashing when it was to stop
    assert "minimal has ended" in err
    assert "Traceback" not in err
    text = console.read_text()
    assert "\x01" not in text
    assert "\n    9.000000 timed [console] timed: ready\n" in text


PROBE = """
[service.probe]
module = "probe_crash.probe:Probe"
protocol = "probe_crash.protocol"
"""
HANDLE = """
    async def handle(self, call, request):
        return None
"""
PROTOCOL = """
from typing import Final
from nexus.wire import Message, Protocol, Request

class Done(Message):
    "Done."

class Do(Request[Done], op=1, idempotent=True):
    "Do."

PROTOCOL: Final = Protocol("probe", number=1000, version=1, requests=(Do,))
"""


def own_code(host: Machine, probe: str) -> None:
    """A package of the system's own beside its file, in the folder of its import path."""
    file = host.home / "system.toml"
    _ = file.write_text(file.read_text().replace("[system]", '[system]\npath = ["code"]', 1))
    package = host.home / "code" / "probe_crash"
    package.mkdir(parents=True)
    _ = (package / "__init__.py").write_text("")
    _ = (package / "protocol.py").write_text(PROTOCOL)
    _ = (package / "probe.py").write_text(probe)


def test_an_init_that_dies_at_once_is_not_called_slow(own: Machine) -> None:
    file = own.write("system.toml", MINIMAL.read_text() + PROBE)
    dies = "import os, sys\nif sys.argv[0].endswith('boot.py'):\n"
    dies += "    os.write(2, b'gone wrong\\n')\n    os._exit(7)\n"
    own_code(own, dies + "class Probe:\n    def __init__(self, context): ..." + HANDLE)
    start = time.monotonic_ns()
    answer = own.run("up", "-d", file)
    assert answer.code == 1
    assert time.monotonic_ns() - start < 60 * 10**9
    assert "minimal ended while it started, exit code 7 (" in answer.err
    assert ", its last words: gone wrong: see " in answer.err
    assert answer.err.count("\n") == 1
