"""init judges the trial of a slot: when it reports, what fails it, and what it leaves behind."""

import itertools
from hashlib import sha256
from typing import Any, Final

import msgspec
import pytest

from nexus.abi import (
    BOOT_MEMORY_SIZE_MAX,
    INIT_NAME,
    BootImage,
    BootMemoryReplace,
    Nanos,
    Now,
    SleepUntil,
    Status,
)
from nexus.bootctl.handover import (
    EXIT_ENDED,
    EXIT_REBOOT,
    EXIT_SLOT_FAILED,
    EXIT_STOPPED,
    SlotBoot,
    TrialFailure,
    TrialReason,
    read_failure,
)
from nexus.init.memory import Memory, decode_memory, encode_memory
from nexus.init.trial import AGAIN, ENDS_MAX
from nexus.ipc import Refused
from nexus.kernel.sim.faults import Faults, NthFailure
from nexus.kernel.sim.faults import Plan as FaultPlan
from nexus.protocols.init import (
    GetSystem,
    InitStatus,
    Reboot,
    Rebooting,
    Shutdown,
    ShuttingDown,
    SystemInfo,
    SystemState,
    TrialState,
)
from nexus.protocols.meta import Health as Probe
from nexus.protocols.meta import Healthy
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.protocols.updated import Committed, ReportHealth, UpdatedStatus
from nexus.protocols.updated import Slot as UpdatedSlot
from nexus.runtime import Call, Server, ServiceConfig, serve
from nexus.wire import Request, encode
from tests.fakes.initrig import (
    DRIVER,
    MS,
    SECOND,
    SYSTEM,
    Boot,
    Driver,
    Main,
    Nothing,
    Run,
    boot,
    healthy,
    idle,
    play,
    status,
)

__all__ = ["boot"]  # the fixture

DIGEST: Final = "ab" * 32
SETTLE: Final = 300  # ms
TRIAL: Final = SlotBoot(
    slot="b", version=7, name="1.7.0", digest=DIGEST, trial=True, attempt=2, deadline=5 * SECOND
)
NO_TRIAL: Final = SlotBoot(slot="a", version=6, name="1.6.0", digest=DIGEST, trial=False)
LASTING: Final = SYSTEM.replace('name = "test"', f'name = "test"\ntrial_settle = "{SETTLE}ms"')
QUIET: Final = DRIVER + 'health = { every = "0s" }\n'  # the driver does not serve its endpoint
UPDATER: Final = '\n[service.updated]\nprogram = "updated"\n'
OTHER: Final = """
[service.other]
program = "other"
restart = { backoff = "30ms", backoff_max = "30ms" }
health = { deadline = "400ms", every = "50ms", answer = "40ms", misses = 2 }
"""
WHOLE: Final = LASTING + QUIET + UPDATER + OTHER
HEALTH_OK: Final = "init: health ok (slot b)"
SLOT_FAILED: Final = "init: slot failed (slot b)"


class Updater:
    """updated, as far as init asks it: commits what it is told, after these refusals."""

    def __init__(
        self,
        *refusals: UpdatedStatus,
        nonce_off: int = 0,
        slot: UpdatedSlot | None = None,
        version: int = TRIAL.version,
    ) -> None:
        self.heard: list[tuple[int, ReportHealth]] = []
        self._refusals = list(refusals)
        self._nonce_off = nonce_off
        self._slot = slot
        self._version = version

    def handle(self, call: Call, request: Any) -> Committed:
        assert isinstance(request, ReportHealth)
        self.heard.append((call.now, request))
        if self._refusals:
            raise call.refuse(self._refusals.pop(0))
        slot = request.slot if self._slot is None else self._slot
        return Committed(request.nonce ^ self._nonce_off, slot, self._version, 12, False)


async def until_judged(driver: Driver) -> SystemInfo:
    """Serve until the trial is over; how the system was then."""
    for _ in range(400):
        info = await driver.reply(GetSystem(), SystemInfo)
        if info.trial is not TrialState.JUDGING or info.state is SystemState.STOPPING:
            return info
        _ = await driver.server.step(await driver.ahead(20 * MS))
    raise AssertionError("nobody judged")


def tried(boot: Boot, updater: Updater, other: Main = idle, **kinds: Any) -> Run:
    """Boot a system with this updater and this service, on trial unless `kinds` say otherwise."""

    async def main(image: BootImage) -> int:
        return await serve(updater, UPDATED, image)

    mains: dict[str, Main] = {"updated": main, **kinds.pop("mains", {})}
    given: dict[str, Any] = {
        "driver": until_judged,
        "text": WHOLE,
        "slot_boot": TRIAL,
        "ready": False,
        "memory": b"",
        **kinds,
    }
    return boot(mains=mains, other=other, **given)


def failure(run: Run) -> TrialFailure:
    """What the run left for the loader; its exit code says the same, and so does its line."""
    found = read_failure(run.memory)
    assert found is not None
    assert run.ended.code == EXIT_SLOT_FAILED
    said = run.evidence(SLOT_FAILED)
    assert (said["service"], said["reason"]) == (found.service, found.reason)
    assert (said["detail"], said["trace"]) == (found.detail, found.trace)
    assert not run.lines(HEALTH_OK)
    return found


def lives(span: int, *, first: int = 1000) -> Main:
    """A service whose `first` instances are well for so long and end with code 5."""

    async def main(image: BootImage) -> int:
        if image.generation > first:
            return await idle(image)
        server = Server(Nothing(), TESTSVC, image)
        until = Nanos(image.now + span)
        while await Now() < until and not server.stopping:
            _ = await server.step(until)
        return 0 if server.stopping else 5

    return main


def probed(answer: Any, *, well: int) -> Main:
    """A service that answers `well` health probes rightly, and then as `answer` says."""

    async def main(image: BootImage) -> int:
        def script(request: Request[Any], count: int) -> bytes | int | None:
            if not isinstance(request, Probe):
                return status(image)
            given: bytes | None = (healthy if count <= well else answer)(image)
            return given

        return await play(image, script)

    return main


def silent(_image: BootImage) -> None:
    """No answer."""


def of_another_start(image: BootImage) -> bytes:
    """An answer that comes at once, and is not that of a healthy instance."""
    return encode(Healthy(image.generation, sha256(b"").hexdigest(), 0, 0, 0, ""))


# ---------------------------------------------------------------- it goes well


def test_a_system_that_stays_healthy_is_reported_once_and_committed(boot: Boot) -> None:
    updater = Updater()

    run = tried(boot, updater)

    said = run.evidence(HEALTH_OK)
    ((at, request),) = updater.heard
    assert request == ReportHealth(said["nonce"], UpdatedSlot.B, bytes.fromhex(DIGEST))
    assert said["sequence"] == 12
    assert {"timed", "updated", "other"} <= set(said["services"])
    well = max(run.time(f"init: health {name} ok") for name in ("timed", "updated", "other"))
    assert at >= well + SETTLE * MS
    assert run.result.trial is TrialState.COMMITTED
    assert read_failure(run.memory) is None
    assert run.ended.code == EXIT_STOPPED


def test_nothing_is_reported_before_the_last_service_has_answered(boot: Boot) -> None:
    late = 350 * MS
    updater = Updater()

    async def slow(image: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, image)
        _ = await server.step(Nanos(image.now + SECOND))  # its echo, and then it thinks
        _ = await SleepUntil(Nanos(image.now + late))
        return await server.run()

    run = tried(boot, updater, slow)

    ((at, _),) = updater.heard
    assert at >= run.spawns("other")[0].time + late + SETTLE * MS


def test_a_boot_that_is_no_trial_is_neither_reported_nor_judged(boot: Boot) -> None:
    updater = Updater()

    async def look(driver: Driver) -> SystemInfo:
        await driver.pause(2 * SECOND)
        return await driver.reply(GetSystem(), SystemInfo)

    run = tried(boot, updater, probed(silent, well=0), slot_boot=NO_TRIAL, driver=look)

    info = run.result
    assert (info.slot, info.set_version, info.set_digest) == ("a", 6, DIGEST)
    assert info.trial is TrialState.NONE
    assert not updater.heard
    assert not run.lines("init: health ok")
    assert not run.lines("init: slot failed")


def test_services_learn_which_slot_and_set_they_come_from(boot: Boot) -> None:
    told: list[ServiceConfig] = []

    async def other(image: BootImage) -> int:
        told.append(ServiceConfig.of(image))
        return await idle(image)

    _ = tried(boot, Updater(), other)

    (config,) = told
    assert (config.slot, config.set_version, config.set_digest) == ("b", 7, DIGEST)


def test_a_refused_report_is_repeated_with_the_same_nonce_and_said_once(boot: Boot) -> None:
    updater = Updater(UpdatedStatus.IO_ERROR, UpdatedStatus.IO_ERROR)

    run = tried(boot, updater)

    times = [at for at, _ in updater.heard]
    assert len(times) == 3
    assert len({request.nonce for _, request in updater.heard}) == 1
    assert all(later - sooner >= AGAIN for sooner, later in itertools.pairwise(times))
    assert run.evidence("init: health not taken")["why"] == "updated refused it: io_error"
    assert run.lines(HEALTH_OK)


def test_one_crash_is_forgiven_and_the_wait_begins_anew(boot: Boot) -> None:
    updater = Updater()

    run = tried(boot, updater, lives(SETTLE * MS - 50 * MS, first=1))

    ((at, _),) = updater.heard
    assert at >= run.spawns("other")[1].time + SETTLE * MS
    assert run.lines(HEALTH_OK)


# ---------------------------------------------------------------- it fails


def test_a_service_that_never_becomes_ready_fails_the_trial_at_its_deadline(boot: Boot) -> None:
    updater = Updater()

    run = tried(boot, updater, probed(silent, well=0))

    found = failure(run)
    assert (found.service, found.reason) == ("other", TrialReason.NOT_READY)
    assert found.detail == "other was not ready within its deadline of 400 ms"
    assert (found.slot, found.version, found.attempt) == ("b", 7, 2)
    took = run.time(SLOT_FAILED) - run.spawns("other")[0].time
    assert abs(took - 400 * MS) < 10 * MS
    assert not updater.heard


def test_the_service_to_blame_is_the_one_that_the_others_wait_for(boot: Boot) -> None:
    waits = """
[service.a]
program = "a"
health = { deadline = "100ms" }
uses = [{ name = "other" }]
"""
    unready = probed(silent, well=0)

    run = tried(boot, Updater(), unready, text=WHOLE + waits, mains={"a": unready})

    assert failure(run).service == "other"


def test_a_service_that_keeps_crashing_fails_the_trial_with_how_it_ended(boot: Boot) -> None:
    run = tried(boot, Updater(), lives(20 * MS))

    found = failure(run)
    assert (found.service, found.reason) == ("other", TrialReason.CRASHED)
    assert found.detail == f"other ended {ENDS_MAX + 1} times, the last by exit, code 5"
    assert len(run.spawns("other")) == ENDS_MAX + 1


@pytest.mark.parametrize("exceeded", ["safe-mode", "give-up", "shut-down"])
def test_a_group_that_is_exceeded_in_a_trial_fails_it_whatever_is_declared(
    boot: Boot, exceeded: str
) -> None:
    group = f'\n[group.g]\nrestarts = 1\nwithin = "10s"\nexceeded = "{exceeded}"\n'
    text = LASTING + QUIET + group + UPDATER + OTHER + 'group = "g"\n'

    run = tried(boot, Updater(), lives(20 * MS), text=text)

    found = failure(run)
    assert (found.service, found.reason) == ("other", TrialReason.CRASHED)
    assert "more than 1 restarts of its group" in found.detail
    assert not run.lines("init: safe mode")
    assert decode_memory(run.memory).unstable == 0


@pytest.mark.parametrize(
    ("answer", "reason", "word"),
    [
        (of_another_start, TrialReason.UNHEALTHY, "not ready"),
        (silent, TrialReason.HUNG, "hang"),
    ],
)
def test_a_service_that_was_well_and_is_not_any_more_fails_the_trial(
    boot: Boot, answer: Any, reason: TrialReason, word: str
) -> None:
    run = tried(boot, Updater(), probed(answer, well=3))

    found = failure(run)
    assert (found.service, found.reason) == ("other", reason)
    assert found.detail == f"other ended {ENDS_MAX + 1} times, the last by {word}, signal 9"


def test_what_the_watchdog_of_a_busy_machine_does_once_is_forgiven(boot: Boot) -> None:
    async def other(image: BootImage) -> int:
        main = probed(silent, well=3) if image.generation == 1 else idle
        return int(await main(image) or 0)

    run = tried(boot, Updater(), other)

    assert len(run.spawns("other")) == 2
    assert run.lines(HEALTH_OK)


def test_a_set_without_updated_is_never_committed(boot: Boot) -> None:
    run = tried(boot, Updater(), text=LASTING + QUIET + OTHER)

    found = failure(run)
    assert (found.service, found.reason) == ("", TrialReason.DEADLINE)
    assert "there is no updated" in found.detail
    assert 0 <= run.time(SLOT_FAILED) - run.time("init: start") - TRIAL.deadline < 20 * MS


@pytest.mark.parametrize("other", [{"nonce_off": 1}, {"slot": UpdatedSlot.A}, {"version": 6}])
def test_an_answer_about_another_report_commits_nothing(boot: Boot, other: dict[str, Any]) -> None:
    updater = Updater(**other)

    run = tried(boot, updater)

    assert failure(run).reason == TrialReason.DEADLINE
    assert len(updater.heard) > 1


def test_a_service_whose_turn_never_comes_is_named_at_the_deadline(boot: Boot) -> None:
    absent = '\n[service.b]\nprogram = "absent"\n'

    run = tried(boot, Updater(), text=WHOLE + absent)

    found = failure(run)
    assert (found.service, found.reason) == ("b", TrialReason.NOT_READY)
    assert "spawn refused" in found.detail


# ---------------------------------------------------------------- what it leaves


def test_the_cause_is_stored_before_anything_is_stopped_for_it(boot: Boot) -> None:
    """The power fails right behind the verdict: nothing was ended in order."""
    whole = tried(boot, Updater(), probed(silent, well=0))
    verdict = whole.time(SLOT_FAILED) - whole.events[0].time

    run = tried(boot, Updater(), probed(silent, well=0), cut=verdict + MS // 100)

    assert run.lines(SLOT_FAILED)
    assert not run.lines("init: stopped")
    found = read_failure(run.memory)
    assert found is not None
    assert found.service == "other"


def test_a_cause_that_cannot_be_stored_is_said_and_ends_the_boot_all_the_same(boot: Boot) -> None:
    failing = NthFailure(trap=BootMemoryReplace, nth=2, status=Status.NO_SPACE, task=INIT_NAME)

    run = tried(boot, Updater(), probed(silent, well=0), faults=Faults(FaultPlan(nth=(failing,))))

    assert run.evidence("init: boot memory not stored") == {"status": "NO_SPACE"}
    assert run.lines(SLOT_FAILED)
    assert run.ended.code == EXIT_SLOT_FAILED


def test_the_trace_of_a_failed_trial_is_of_that_boot_alone(boot: Boot) -> None:
    first = tried(boot, Updater(), probed(silent, well=0), seed=1)
    second = tried(boot, Updater(), probed(silent, well=0), seed=2)

    traces = {failure(run).trace for run in (first, second)}
    assert len(traces) == 2
    assert all(len(trace) == 32 and int(trace, 16) for trace in traces)


def test_a_failed_trial_does_not_count_as_an_unstable_boot_and_is_told_once(boot: Boot) -> None:
    before = encode_memory(Memory(boots=4, unstable=2))

    run = tried(boot, Updater(), probed(silent, well=0), memory=before)
    after = tried(boot, Updater(), slot_boot=NO_TRIAL, driver=until_judged, memory=run.memory)

    left = decode_memory(run.memory)
    assert (left.boots, left.unstable) == (5, 2)
    assert left.trial is not None
    assert left.trial.boot == 4
    assert read_failure(after.memory) is None
    assert not after.lines("init: safe mode")


def test_a_trial_is_a_whole_boot_however_many_were_unstable(boot: Boot) -> None:
    before = encode_memory(Memory(boots=9, unstable=7, why="crashes"))

    run = tried(boot, Updater(), memory=before)

    assert not run.lines("init: safe mode")
    assert run.lines(HEALTH_OK)
    assert decode_memory(run.memory).unstable == 0


def test_a_memory_with_what_a_later_init_knows_is_understood() -> None:
    data = encode_memory(Memory(boots=4)).replace(b'"boots":4', b'"boots":4,"later":[1]')

    assert decode_memory(data).boots == 4


DEEP = b'{"later":' + b"[" * 2000 + b"]" * 2000 + b"}"
"""A memory within its limit that is deeper than a decoder goes: any set's init may leave it."""


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"trial":7}', b"\xff", b'{"trial":{"slot":"c"}}', DEEP]
)
def test_what_is_no_memory_tells_of_no_failure(data: bytes) -> None:
    assert read_failure(data) is None


def test_a_memory_too_deep_to_decode_counts_as_nothing() -> None:
    assert len(DEEP) <= BOOT_MEMORY_SIZE_MAX
    with pytest.raises(msgspec.DecodeError):
        _ = decode_memory(DEEP)


# ---------------------------------------------------------------- restore and reboot


@pytest.mark.parametrize(
    ("trial", "restore", "settings"),
    [
        (False, True, {"restore": 3}),
        (True, False, {"refresh": 3}),
        (False, False, {}),
    ],
)
def test_statefsd_alone_is_told_what_to_do_with_the_snapshot(
    boot: Boot, trial: bool, restore: bool, settings: dict[str, int]
) -> None:
    told: dict[str, Any] = {}

    async def note(image: BootImage) -> int:
        told[image.name] = ServiceConfig.of(image).settings
        return await idle(image)

    text = WHOLE + '\n[service.statefsd]\nprogram = "statefsd"\n'
    slot_boot = msgspec.structs.replace(TRIAL, trial=trial, snapshot=3, restore=restore)

    _ = tried(boot, Updater(), note, text=text, mains={"statefsd": note}, slot_boot=slot_boot)

    assert told == {"other": {}, "statefsd": settings}


def test_a_statefsd_that_starts_after_the_commit_is_not_told_of_the_copy_that_is_gone(
    boot: Boot,
) -> None:
    told: list[dict[str, Any]] = []

    async def ends_once(image: BootImage) -> int | None:
        told.append(ServiceConfig.of(image).settings)
        return await lives(2 * SECOND, first=1)(image)

    async def wait(driver: Driver) -> SystemInfo:
        info = await until_judged(driver)
        await driver.pause(3 * SECOND)
        return info

    text = WHOLE + '\n[service.statefsd]\nprogram = "statefsd"\n'
    slot_boot = msgspec.structs.replace(TRIAL, snapshot=3)

    run = tried(
        boot, Updater(), text=text, mains={"statefsd": ends_once}, slot_boot=slot_boot, driver=wait
    )

    assert run.result.trial is TrialState.COMMITTED
    assert told == [{"refresh": 3}, {}]


def test_a_reboot_ends_everything_in_order_and_asks_the_loader_for_another_boot(
    boot: Boot,
) -> None:
    async def reboot(driver: Driver) -> Rebooting:
        return await driver.reply(Reboot(), Rebooting)

    run = tried(boot, Updater(), slot_boot=NO_TRIAL, driver=reboot)

    assert run.ended.code == EXIT_REBOOT
    assert run.evidence("init: stopped")["dirty"] == []
    assert run.result.services == 4


def test_a_system_of_no_slot_is_not_rebooted(boot: Boot) -> None:
    async def reboot(driver: Driver) -> object:
        return await driver.ask(Reboot())

    run = tried(boot, Updater(), slot_boot=None, driver=reboot)

    assert run.result == Refused(InitStatus.NO_SLOTS)
    assert run.ended.code == 0


@pytest.mark.parametrize(
    ("slot_boot", "code"), [(TRIAL, EXIT_ENDED), (NO_TRIAL, EXIT_ENDED), (None, 1)]
)
def test_the_loader_can_tell_an_end_that_was_wished_from_a_crash(
    boot: Boot, slot_boot: SlotBoot | None, code: int
) -> None:
    """A service that does not stop makes the end dirty; booting again would be against the wish."""

    async def stubborn(image: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, image)
        while True:
            _ = await server.step(Nanos(await Now() + SECOND))

    run = tried(boot, Updater(), stubborn, slot_boot=slot_boot, driver=shut_down)

    assert run.evidence("init: stopped")["dirty"] == ["other"]
    assert run.ended.code == code


def test_a_trial_that_is_told_to_end_is_not_judged_on_its_way_down(boot: Boot) -> None:
    """`other` is not well, and takes longer to end than it had to become ready."""

    async def unready_and_stubborn(image: BootImage) -> int:
        def script(request: Request[Any], _count: int) -> bytes | int | None:
            return None if isinstance(request, Probe) else status(image)

        while True:
            _ = await play(image, script)

    run = tried(boot, Updater(), unready_and_stubborn, driver=shut_down)

    ended = run.time("init: stopped") - run.spawns("other")[0].time
    assert ended > 400 * MS, "its deadline has passed"
    assert not run.lines(SLOT_FAILED)
    assert not run.lines(HEALTH_OK)
    assert run.ended.code == EXIT_ENDED


async def shut_down(driver: Driver) -> ShuttingDown:
    return await driver.reply(Shutdown(), ShuttingDown)
