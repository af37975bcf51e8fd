"""`nexus doctor` shows what happened: each row is compared with services of its kind, and a step
or a wall that is not there is not shown as held."""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    HEAP_SIZE,
    MEMORY_SIZE_DEFAULT,
    AbiError,
    BootImage,
    EventKind,
    Fence,
    QosClass,
    Send,
    SetTaskQos,
    Status,
    Trap,
    VmoCreate,
    VmoShare,
)
from nexus.kernel.linux import (
    State,
    escapes,
    harden,
    hardening_report,
    hardware,
    identity,
    landlock,
    report,
    trespass,
)
from nexus.kernel.linux.escapes import ATTEMPTS, DONE, MANY_OBJECTS, OBJECTS_MANY, Attempt
from nexus.kernel.linux.harden import Hardening
from nexus.kernel.linux.kernel import NICE
from nexus.kernel.linux.report import (
    SECRETS,
    SERVICES,
    STEPS,
    Guarantee,
    Service,
    device_rows,
    secret_rows,
    step_rows,
    tried_rows,
)
from nexus.testing import rig as rigs
from nexus.testing.conformance.steps import ended_well, start
from nexus.testing.rig import Outcome, Rig, linux_rig
from tests.attack.grounds import FORK, in_new_interpreters, with_programs
from tests.attack.test_escapes import HOSTILE, tried

pytestmark = pytest.mark.linux

IS_ROOT: Final = os.geteuid() == 0
NO_SEAL_OF_LINUX: Final = 1 << 20  # refused as on a machine that is too old for one of ours
Rows = dict[str, Guarantee]


def told(rig: Rig, ask: Callable[[], Any]) -> Any:
    """What a function of the report tells the user of a rig."""
    outcome = rigs._in_a_fork(lambda: Outcome(result=ask()), user=rig.user)
    assert outcome.failures == []
    return outcome.result


def rows_of(rig: Rig, ask: Callable[[], Any] = step_rows) -> Rows:
    return {row.name: row for row in told(rig, ask)}


def as_root(rig: Rig) -> bool:
    return IS_ROOT and rig.user is None


# ---- in the good direction, and in whichever this machine has


def started(rig: Rig) -> dict[str, Any]:
    """Init's record of the start of a service without grants, and of its classes."""
    classes: list[bool] = []

    async def root(boot: BootImage) -> bool:
        spawned = await start(boot, "seen", program="hostile", grants=FORK)
        for qos in (QosClass.IDLE, QosClass.INTERACTIVE):
            with suppress(AbiError):  # a class that Linux cannot be told of
                await SetTaskQos(spawned.pid, qos)
            classes.append(os.getpriority(os.PRIO_PROCESS, spawned.pid) == NICE[qos])
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return all(classes)

    run = with_programs(rig, HOSTILE).observe(root)
    (event,) = (fields for fields in run.fields(EventKind.SPAWN) if fields["name"] == "seen")
    return {**event, "classes": run.result}


def kept(report: dict[str, Any], **granted: str) -> bool:
    """Whether every attempt of a service ended as the table or a grant says."""
    names = {name.replace("_", " "): outcome for name, outcome in granted.items()}
    expected = {one.name: one.refusal for one in ATTEMPTS} | names
    return bool(report["outcomes"] == expected)


def delivers() -> bool:
    """Whether this machine has a hardware generator that answers, looked at by its own node."""
    try:
        with open("/dev/hwrng", "rb", buffering=0) as node:  # noqa: PTH123 (unbuffered)
            return bool(node.read(1))
    except OSError:
        return False


def has_keyrings() -> bool:
    """What Linux itself says of CONFIG_KEYS."""
    return Path("/proc/key-users").exists()


def _got(trap: Trap[Any]) -> Callable[[BootImage], Any]:
    """A task that awaits a trap, and tells whether it was refused as Unsupported."""

    async def main(boot: BootImage) -> bool:
        try:
            _ = await trap
        except AbiError as refusal:
            assert refusal.status is Status.UNSUPPORTED
            return False
        return True

    return main


def rig_shares(rig: Rig) -> bool:
    """Whether a task of this user shared a memory object."""

    async def root(boot: BootImage) -> bool:
        return bool(await _got(VmoShare(await VmoCreate(1)))(boot))

    return bool(rig.run(root))


def rig_fences(rig: Rig) -> bool:
    """Whether a task of this user had a fence."""
    return bool(rig.run(_got(Fence())))


def test_a_machine_without_the_seal_shares_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SHARED_SEALS", NO_SEAL_OF_LINUX)

    (memory, _) = report.sharing_rows()

    assert memory.state is State.ABSENT
    assert "VmoShare is refused" in memory.why


def test_a_seal_that_leaves_a_way_to_write_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    monkeypatch.setattr(report, "SHARED_SEALS", seals)

    (memory, _) = report.sharing_rows()

    assert memory.state is State.ABSENT
    assert memory.why == "map it to write: done, write it: done, seal it: done"


@pytest.mark.parametrize(
    ("machine", "state"), [("x86_64", State.DEGRADED), ("aarch64", State.ABSENT)]
)
def test_without_membarrier_only_a_strict_processor_keeps_the_order(
    machine: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "membarrier", lambda _command: 1)
    monkeypatch.setattr(report, "MACHINE", machine)

    (_, fences) = report.sharing_rows()

    assert fences.state is state
    assert "a Fence is refused" in fences.why


def test_the_doctor_agrees_with_what_happened(linux: Rig) -> None:
    """Every row: the report of this user next to services that this user has started."""
    rows = rows_of(linux, hardening_report)
    reports = {name: tried(linux, grants) for name, grants in SERVICES.items()}
    event = started(linux)
    forked, executed = reports["fork"], reports["exec"]

    held = {name: name not in event["degraded"] for name, _, _ in STEPS}
    held |= {
        "memory_objects": False,
        "environment": forked["environment"] == [],
        "identity_table": forked["outcomes"]["write the identity table"] == "EACCES",
        "policy_page": forked["outcomes"]["write the policy page"] == "EACCES",
        "credentials": forked["sender"] == "" and kept(forked),
        "threads": kept(reports["threads"], thread=DONE) and as_root(linux),
        "streams": kept(reports["streams"], stream_pair=DONE),
        "network": kept(reports["network"], TCP_connection="EACCES", reconnect_a_pair="ENOENT"),
        "qos": event["classes"],
        "descriptors": "descriptors" not in event["degraded"],
        "cgroup_memory": False,
        "cgroup_tasks": False,
        "cgroup_cpu": False,
        "pidfd": True,
        "secret_directory": as_root(linux),
        "keyring": as_root(linux) and has_keyrings(),
        "entropy": as_root(linux) and delivers(),
        "durable_writes": True,  # since Linux 4.7
        "shared_memory": rig_shares(linux),
        "fences": rig_fences(linux),
    }
    differ = all(forked[what] != executed[what] for what in ("hash", "layout"))
    reading = rows["exec_isolation"].state is State.DEGRADED
    assert (rows["exec_isolation"].state is not State.ABSENT) is (kept(executed) and differ)
    assert not reading or "only root may read" in rows["exec_isolation"].why
    looked_up = ("exec_isolation", "pid_reuse")
    shown = {name: row.state is State.HELD for name, row in rows.items() if name not in looked_up}
    assert shown == held
    assert (event["outside"]["seccomp"] == 2) is held["seccomp"]
    assert all(bool(row.why) is (row.state is not State.HELD) for row in rows.values())


def test_a_share_of_the_processor_that_nobody_holds_is_in_the_record_of_the_start(
    linux: Rig,
) -> None:
    async def root(boot: BootImage) -> None:
        for name, share in (("bounded", 20), ("unbounded", None)):
            spawned = await start(boot, name, program="hostile", grants=FORK, cpu_share=share)
            await Send(spawned.slot, b"end")
            await ended_well(spawned)

    run = with_programs(linux, HOSTILE).observe(root)

    starts = run.fields(EventKind.SPAWN)
    lacks = {str(fields["name"]): str(fields.get("degraded")) for fields in starts}
    assert rows_of(linux, hardening_report)["cgroup_cpu"].state is State.ABSENT
    assert "cpu_share" in lacks["bounded"]
    assert "cpu_share" not in lacks["unbounded"]


# ---- a step that is not taken


def none(*_: object) -> None:
    """A step that does nothing."""


def refused(*_: object) -> None:
    raise OSError("not on this machine")


METHODS: Final = {
    "limits": "_limits",
    "memory": "_memory",
    "namespaces": "_namespaces",
    "ids": "_ids",
    "not_dumpable": "_not_dumpable",
    "landlock": "_landlock",
    "seccomp": "_seccomp",
}


def replace(monkeypatch: pytest.MonkeyPatch, step: str, by: Callable[..., None]) -> None:
    if step == "capabilities":
        monkeypatch.setattr(harden, "drop_capabilities", by)
    else:
        monkeypatch.setattr(Hardening, METHODS[step], by)


@pytest.mark.parametrize("step", [*METHODS, "capabilities"])
def test_a_step_that_is_refused_is_not_held(
    step: str, linux: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, step, refused)

    row = rows_of(linux)[step]

    left = {name: state for name, _, state in STEPS}[step]
    assert row.state is left
    assert row.why.startswith("not on this machine") or "not on this machine" in row.why


@pytest.mark.parametrize("step", METHODS)
def test_a_step_that_does_nothing_is_not_held(
    step: str, linux: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing reports it: what the child tried or what Linux shows of it must."""
    if step == "landlock" and landlock.version() == 0:
        pytest.skip("this Linux kernel has no Landlock")
    if step == "namespaces" and not as_root(linux):
        pytest.skip("there are none to enter, and only root may look")
    replace(monkeypatch, step, none)

    rows = rows_of(linux)

    if step == "not_dumpable" and as_root(linux):
        assert rows[step].state is State.HELD, "a change of ids has done it"
        return
    assert rows[step].state is not State.HELD
    assert rows[step].why
    if step == "landlock":
        assert rows["landlock_scope"].state is State.ABSENT


def test_a_landlock_without_scopes_is_not_held_as_one(
    linux: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if landlock.version() < landlock.SCOPE_SINCE:
        pytest.skip("this Linux kernel has no scopes")
    monkeypatch.setattr(landlock, "SCOPES", 0)

    rows = rows_of(linux)

    assert rows["landlock"].state is State.HELD
    assert rows["landlock_scope"].state is State.DEGRADED
    assert "signal a sibling: done" in rows["landlock_scope"].why


def test_capabilities_that_are_left_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of ids takes root's too, so both steps do nothing."""
    if not IS_ROOT:
        pytest.skip("an ordinary user has none")
    for step in ("ids", "capabilities"):
        replace(monkeypatch, step, none)

    rows = rows_of(linux_rig())

    assert rows["capabilities"].state is State.ABSENT
    assert "cap_eff is" in rows["capabilities"].why
    assert "it has init's id" in rows["ids"].why


def test_groups_that_are_left_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IS_ROOT:
        pytest.skip("only root joins a group")

    def of_a_group() -> list[Guarantee]:
        os.setgroups([4])  # in the process of the report
        monkeypatch.setattr(os, "setgroups", none)
        return step_rows()

    row = rows_of(linux_rig(), of_a_group)["ids"]

    assert (row.state, row.why) == (State.DEGRADED, "it is in groups ['4']")


# Which attempt shows each step, alone: without the filter, or with.
SHOWN: Final = {True: report.FILTERED, False: report.UNFILTERED}


@pytest.mark.parametrize("filtered", [True, False])
def test_each_attempt_that_is_not_refused_shows_in_its_row(
    filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time succeeds in the child that is to show it; then its step is not held."""
    good = {
        True: report.Found({}, {one.name: one.refusal for one in ATTEMPTS}, {}),
        False: report.Found({}, {one.name: one.beyond for one in ATTEMPTS}, {}),
    }
    found = dict(good)
    monkeypatch.setattr(report, "_try_in_a_child", lambda _sibling, *, filtered: found[filtered])
    steps = {name for name, _, _ in STEPS}
    assert {row.state for row in step_rows() if row.name in steps} == {State.HELD}

    for step, names in SHOWN[filtered].items():
        for name in names:
            outcomes = good[filtered].outcomes | {name: "by nobody"}
            found[filtered] = good[filtered]._replace(outcomes=outcomes)
            rows = {row.name: row for row in step_rows()}
            assert rows[step].state is not State.HELD, (step, name)
            assert f"{name}: by nobody" in rows[step].why


# ---- what whole services found


@pytest.fixture(scope="module")
def found() -> dict[str, Service]:
    """What services found that were started by whoever runs the tests."""
    services: dict[str, Service] = told(linux_rig(), report._try_in_a_run)
    return services


def altered(services: dict[str, Service], name: str, **fields: Any) -> Rows:
    """The rows, had one service reported something else."""
    service = services[name]
    changed = service._replace(report={**service.report, **fields})
    return {row.name: row for row in tried_rows({**services, name: changed})}


# Each row, the service that shows it, and the attempts of it that do.
ROWS: Final = [
    ("identity_table", "fork", ("write the identity table",)),
    ("policy_page", "fork", ("write the policy page",)),
    ("credentials", "fork", ("forge credentials",)),
    ("exec_isolation", "exec", tuple(one.name for one in ATTEMPTS)),
    ("threads", "threads", ("thread", "fork")),
    ("streams", "streams", ("stream pair", "datagram to a path", "UDP socket")),
    ("network", "network", ("TCP connection", "UDP socket")),
]


@pytest.mark.parametrize(("row", "service", "names"), ROWS, ids=[row for row, _, _ in ROWS])
def test_an_attempt_that_ends_otherwise_is_not_held(
    row: str, service: str, names: tuple[str, ...], found: dict[str, Service]
) -> None:
    outcomes = found[service].report["outcomes"]
    for name in names:
        rows = altered(found, service, outcomes={**outcomes, name: "otherwise"})

        assert rows[row].state is State.ABSENT, name
        assert rows[row].why == f"{name}: otherwise"


def test_each_other_thing_a_service_found_is_not_held(found: dict[str, Service]) -> None:
    before = {row.name: row for row in tried_rows(found)}
    assert before["environment"].state is before["credentials"].state is State.HELD

    seen = altered(found, "fork", environment=["HOME=/root"])["environment"]
    assert (seen.state, seen.why) == (State.ABSENT, "HOME=/root")
    forged = altered(found, "fork", sender="sent by nobody")["credentials"]
    assert (forged.state, forged.why) == (State.ABSENT, "sent by nobody")
    for what in ("hash", "layout"):
        same = altered(found, "exec", **{what: found["fork"].report[what]})["exec_isolation"]
        assert (same.state, same.why) == (State.ABSENT, "layout and hash seed are init's")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_cannot_be_started_is_not_held(name: str, found: dict[str, Service]) -> None:
    failed = {**found, name: Service("there is no room", (), {})}
    mine = {row for row, service, _ in ROWS if service == name}
    mine |= {"environment", "exec_isolation"} if name == "fork" else set()

    rows = {row.name: row for row in tried_rows(failed)}

    assert {row for row in rows if rows[row].why == "there is no room"} == mine
    assert {rows[row].state for row in mine} == {State.ABSENT}


def test_walls_that_are_gone_show_in_what_services_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: the table not sealed, the environment left, no filter after an import."""
    monkeypatch.setenv("NEXUS_SECRET", "kept")
    monkeypatch.setattr(identity, "F_SEAL_FUTURE_WRITE", 0)
    monkeypatch.setattr(Hardening, "_environment", none)
    in_new_interpreters(monkeypatch, "unwalled.without('_seccomp', '_landlock')")

    rows = rows_of(linux_rig(), lambda: tried_rows(report._try_in_a_run()))

    assert "NEXUS_SECRET=kept" in rows["environment"].why
    assert rows["credentials"].state is State.HELD, "the filter of a forked service is there"
    assert "lift a limit: done" in rows["exec_isolation"].why
    for row, attempt in (
        ("identity_table", "write the identity table"),
        ("policy_page", "write the policy page"),
    ):
        assert (rows[row].state, rows[row].why) == (State.ABSENT, f"{attempt}: done")


def test_an_interpreter_that_does_not_start_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_new_interpreters(monkeypatch, "raise LookupError('no such pump')")

    rows = rows_of(linux_rig(), lambda: tried_rows(report._try_in_a_run()))

    for name in ("exec_isolation", "streams", "network"):
        assert rows[name].state is State.ABSENT
        assert "cannot import nexus: LookupError: no such pump" in rows[name].why
    assert rows["environment"].state is State.HELD


# ---- secrets and devices


@pytest.fixture(scope="module")
def kept_secrets() -> dict[str, Service]:
    """What the holders of secrets found, and somebody who is after them."""
    services: dict[str, Service] = told(linux_rig(), report._try_secrets)
    return services


@pytest.mark.parametrize("row", ["secret_directory", "keyring"])
def test_a_secret_that_anything_opens_is_not_held(
    row: str, kept_secrets: dict[str, Service]
) -> None:
    assert {each.name: each for each in secret_rows(kept_secrets)}[row].state is not State.ABSENT
    backend = SECRETS[row]
    words = {"secret_directory": "secret", "keyring": "key"}[row]
    names = [(row, one.name) for one in trespass.BY[backend]]
    names += [
        ("stranger", one.name) for one in trespass.STRANGER if f"another's {words}" in one.name
    ]
    assert len(names) > len(trespass.BY[backend])

    for service, name in names:
        found = kept_secrets[service]
        changed = {**found.report, "outcomes": {**found.report["outcomes"], name: DONE}}
        services = {**kept_secrets, service: found._replace(report=changed)}
        rows = {each.name: each for each in secret_rows(services)}
        assert (rows[row].state, rows[row].why) == (State.ABSENT, f"{name}: {DONE}")


@pytest.mark.parametrize("row", ["secret_directory", "keyring"])
def test_a_secret_that_cannot_be_kept_is_not_held(
    row: str, kept_secrets: dict[str, Service]
) -> None:
    found = kept_secrets[row]
    lost = found._replace(report={**found.report, "kept": "DEVICE_FAILED: no keys"})

    rows = {each.name: each for each in secret_rows({**kept_secrets, row: lost})}
    unstarted = Service("there is no room", (), {})
    stopped = {each.name: each for each in secret_rows({**kept_secrets, row: unstarted})}

    assert (rows[row].state, rows[row].why) == (State.ABSENT, "DEVICE_FAILED: no keys")
    assert (stopped[row].state, stopped[row].why) == (State.ABSENT, "there is no room")


def test_a_kernel_without_keyrings_shows_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_keyrings(_name: str) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(harden, "take_key", no_keyrings)
    monkeypatch.setattr(report, "find_key", no_keyrings)

    rows = rows_of(linux_rig(), lambda: secret_rows(report._try_secrets()))

    assert rows["keyring"].state is State.ABSENT
    assert "DEVICE_FAILED" in rows["keyring"].why
    assert rows["secret_directory"].state is not State.ABSENT


def test_entropy_without_hardware_and_writes_without_the_flag_are_degraded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "pwritev", refuse)
    monkeypatch.setattr(hardware, "HWRNG_PATH", "/dev/nexus-has-none")

    rows = {row.name: row for row in device_rows()}

    assert rows["entropy"].state is State.DEGRADED
    assert rows["entropy"].why.endswith("the source is getrandom")
    assert rows["durable_writes"].state is State.DEGRADED
    assert "not supported" in rows["durable_writes"].why


# ---- what is not bounded


def test_memory_objects_are_not_bounded_together_and_the_doctor_says_so(linux: Rig) -> None:
    """promises.md says it; were it ever refused, the row would say that."""
    row = rows_of(linux)["memory_objects"]

    assert row.state is State.DEGRADED
    assert "each of 1 MiB at most, as many as a task has descriptors" in row.why
    assert "for the holder of a disk's image each as long as the image" in row.why
    assert "RLIMIT_FSIZE" in row.why
    assert OBJECTS_MANY * (1 << 20) > 2 * (MEMORY_SIZE_DEFAULT + 2 * HEAP_SIZE)


@pytest.mark.parametrize(
    ("error", "state"), [(None, State.DEGRADED), (errno.ENOMEM, State.HELD)], ids=["taken", "not"]
)
def test_the_row_of_memory_objects_is_tried(
    error: int | None, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(_target: escapes.Target) -> None:
        if error is not None:
            raise OSError(error, os.strerror(error))

    attempt: Attempt = MANY_OBJECTS._replace(run=act)
    monkeypatch.setattr(report, "MANY_OBJECTS", attempt)

    assert rows_of(linux_rig())["memory_objects"].state is state
