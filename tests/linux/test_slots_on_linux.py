"""What runs is what the active slot holds, across real restarts of the whole system."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus.bootctl import (
    EXIT_ENDED,
    EXIT_REBOOT,
    EXIT_SLOT_FAILED,
    EXIT_STOPPED,
    Cause,
    SlotName,
    SlotState,
)
from nexus.loader import main as loader
from tests.fakes.machine import NOBODY, Machine, machine, python_of
from tests.linux.slotted import (
    SERVICES,
    TITLE,
    WAIT,
    Device,
    Set,
    changed,
    eventually,
    first_set,
    stamp_of,
)

pytestmark = pytest.mark.linux

LOADER_PRIVATE_MAX = 8 * 1024  # KiB of memory that only the loader has; init has 20 MiB
MUTE = b'"""An init that says nothing."""\nimport signal\n\nwhile True:\n    signal.pause()\n'
BROKEN = b"raise SystemExit(9)\n"
INIT = "python/nexus/cli/boot.py"
SHORT = 3_000_000_000  # ns of a trial


@pytest.fixture
def host() -> Iterator[Machine]:
    python = python_of(os.getuid())
    assert python is not None
    with machine(os.getuid(), python) as made:
        yield made


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a device that was up once: its first set is unpacked and compiled."""
    python = python_of(os.getuid())
    assert python is not None
    state = tmp_path_factory.mktemp("booted") / "state"
    with machine(os.getuid(), python) as host:
        made = Device(host, first_set())
        made.up()
        made.down()
        _ = shutil.copytree(made.state, state)
    return state


@pytest.fixture
def device(host: Machine, booted: Path) -> Iterator[Device]:
    made = Device(host, first_set(), booted)
    yield made
    for running in host.run("status", "--all", "--json").json or []:
        _ = host.run("down", "--name", running["system"])


def has_ended(pid: int) -> bool:
    """Whether a process runs no more, reaped by whoever has to or not yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def update_to(device: Device, made: Set, *words: str) -> int:
    """Stage a set and have it tried; where the console ended before."""
    before = device.size()
    _ = device.host.ok("ota", "stage", device.write_update(made))
    _ = device.host.ok("ota", "switch", "--reboot", *words)
    return before


def test_after_a_switch_every_running_process_is_of_the_new_set(device: Device) -> None:
    device.up()
    first, second, third = first_set(), first_set().as_version(2), first_set().as_version(3)
    old = device.stamps()

    before = update_to(device, second)
    _ = device.says("init: health ok (slot b)", before)

    assert old.all == {stamp_of(first)}
    new = device.stamps()
    assert new.all == {stamp_of(second)}
    assert set(new.services) == set(SERVICES)
    assert not old.pids & new.pids, "the whole system was restarted"
    assert device.record().active is SlotName.B
    assert device.running().file.startswith(str(device.state / "slots" / "b-"))

    before = update_to(device, third)
    _ = device.says("init: health ok (slot a)", before)

    assert device.stamps().all == {stamp_of(third)}
    digests = {"a": third, "b": second}
    assert device.trees() == [f"{name}-{of.digest.hex()[:12]}" for name, of in digests.items()]
    device.down()
    assert device.content(SlotName.B, len(second.data)) == second.data, "the old set is as it was"


def test_an_ordinary_user_boots_slots_and_updates_them_too() -> None:
    python = python_of(NOBODY) if os.getuid() == 0 else None
    if python is None:
        pytest.skip("the tester is an ordinary user already, or there is no Python for one")
    with machine(NOBODY, python) as host:
        device = Device(host, first_set())
        device.up()
        second = first_set().as_version(2)

        before = update_to(device, second)
        _ = device.says("init: health ok (slot b)", before)

        assert device.stamps().all == {stamp_of(second)}
        device.down()


def test_an_init_that_says_nothing_is_killed_and_the_old_set_boots_again(device: Device) -> None:
    device.up()
    mute = changed(first_set().as_version(2, SHORT), {INIT: MUTE})

    before = update_to(device, mute, "--tries", "1")
    back = device.says("slot a, version 1 (1.0.0)", before)
    _ = device.says("updated: ready (statefs)", back)

    record = device.record()
    assert record.slot(SlotName.B).state is SlotState.BAD
    causes = [reason.cause for reason in record.reasons]
    assert causes[-3:] == [Cause.SWITCHED, Cause.INIT_HUNG, Cause.ROLLED_BACK]
    assert device.stamps().all == {stamp_of(first_set())}
    device.down()


def test_an_init_that_crashes_costs_its_tries_and_no_more(device: Device) -> None:
    device.up()
    broken = changed(first_set().as_version(2), {INIT: BROKEN})

    before = update_to(device, broken, "--tries", "2")
    back = device.says("slot a, version 1 (1.0.0)", before)
    _ = device.says("updated: ready (statefs)", back)

    text = device.console.read_text()
    assert "slot b, version 2 (2.0.0), " + broken.digest.hex()[:12] + ", trial 2, 0 tries" in text
    assert "trial 3" not in text
    reasons = device.record().reasons
    assert [reason.cause for reason in reasons[-3:]] == [
        Cause.INIT_ENDED,
        Cause.INIT_ENDED,
        Cause.ROLLED_BACK,
    ]
    assert reasons[-1].detail == "init_ended: init ended with exit code 9"
    device.down()


def test_an_init_that_ends_at_once_and_calls_it_a_success_is_not_kept(device: Device) -> None:
    device.up()
    broken = changed(first_set().as_version(2), {INIT: b"raise SystemExit(0)\n"})

    before = update_to(device, broken, "--tries", "1")
    back = device.says("slot a, version 1 (1.0.0)", before)
    _ = device.says("updated: ready (statefs)", back)

    record = device.record()
    assert record.slot(SlotName.B).state is SlotState.BAD
    assert record.reasons[-1].cause is Cause.ROLLED_BACK
    assert record.reasons[-1].detail == "init_ended: init ended with exit code 0"
    device.down()


def test_a_tree_that_was_changed_is_not_what_boots(device: Device) -> None:
    device.up()
    device.down()
    (tree,) = device.trees()
    source = device.state / "slots" / tree / INIT
    _ = source.write_bytes(BROKEN)
    (compiled,) = (source.parent / "__pycache__").glob("boot.*")
    compiled.unlink()

    device.up()

    assert device.stamps().all == {stamp_of(first_set())}
    assert compiled.exists()
    device.down()


def test_the_end_of_a_system_on_trial_is_no_crash_and_its_loader_ends_too(device: Device) -> None:
    device.up()
    update = update_to(device, first_set().as_version(2))
    began = device.says("slot b, version 2", update)
    _ = device.says("init: start", began)
    running = device.running()

    device.down()

    assert eventually(lambda: has_ended(running.loader))
    assert device.host.ok("status", "--all", "--json").json == []
    assert device.console.read_text().count("loader [booting]") == 2


def test_the_loader_is_small_beside_init(device: Device) -> None:
    device.up()
    running = device.running()

    text = Path(f"/proc/{running.loader}/status").read_text()
    (private,) = [int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")]

    assert private <= LOADER_PRIVATE_MAX
    device.down()


def test_when_the_loader_is_killed_its_system_ends_in_order(device: Device) -> None:
    device.up()
    running = device.running()

    os.kill(running.loader, signal.SIGKILL)

    _ = device.says("init: stopped")
    assert eventually(lambda: has_ended(running.pid))


def test_under_a_service_manager_the_loader_becomes_init(device: Device) -> None:
    def start() -> "subprocess.Popen[str]":
        since = device.size()
        process = device.host.start("up", "--exec", "--slots", TITLE)
        _ = device.says("updated: ready (statefs)", since)
        return process

    first = start()
    assert device.running().pid == first.pid
    assert device.running().loader == 0
    before = update_to(device, first_set().as_version(2))
    assert first.wait(WAIT) == EXIT_REBOOT, "and its manager starts it again"
    _ = first.communicate()

    second = start()
    _ = device.says("init: health ok (slot b)", before)
    assert device.stamps().all == {stamp_of(first_set().as_version(2))}
    device.down()
    assert second.wait(WAIT) == EXIT_STOPPED, "and it leaves it at that"
    _ = second.communicate()


def test_the_status_names_the_set(device: Device) -> None:
    device.up()

    headline = device.host.ok("status").out.splitlines()[0]
    told = device.host.ok("status", "--json").json["set"]

    assert headline.endswith(", set 1.0.0 out of slot a")
    digest = first_set().digest.hex()
    assert told == {"slot": "a", "name": "1.0.0", "version": 1, "digest": digest}
    device.down()


def test_a_second_loader_of_one_device_is_refused(device: Device) -> None:
    device.up()

    again = device.host.run("up", "-d", "--slots", TITLE)

    assert again.code == 1
    assert again.err.startswith(f"nexus: {TITLE} runs already, as process ")
    device.down()


def test_a_device_that_was_never_provisioned_says_what_to_do(host: Machine) -> None:
    nothing = host.run("up", "--slots")
    named = host.run("up", "--slots", "pump")

    assert nothing.code == 2
    assert "none is provisioned" in nothing.err
    assert named.code == 1
    assert named.err.endswith("is not there: provision the device with `nexus ota provision`\n")


def test_a_device_whose_record_is_gone_boots_nothing_and_says_so(device: Device) -> None:
    with (device.state / "boot.img").open("r+b") as file:
        _ = file.write(bytes(32 * 1024))

    answer = device.host.run("up", "-d", "--slots", TITLE)

    assert answer.code == 1
    assert "nothing can be booted: no record" in answer.err
    assert answer.err.count("\n") == 1


def test_the_loader_and_init_mean_the_same_by_an_exit_code() -> None:
    assert (loader.EXIT_REBOOT, loader.EXIT_SLOT_FAILED) == (EXIT_REBOOT, EXIT_SLOT_FAILED)
    assert loader.EXIT_ENDED == EXIT_ENDED
    assert loader.EXIT_STOPPED == EXIT_STOPPED
