"""A device under test is booted again: what it kept is there, and what was not durable is not."""

from pathlib import Path

import pytest

from nexus.kernel.sim.clock import WALL_START
from nexus.protocols.policy import AUTHORITY
from nexus.testing.device import Device, Run, simulate
from tests.fakes.keeper import Keep, Kept, Look

SYSTEM = f"""
[system]
name = "keeper"
total_size = "4MiB"

[device.disk]
kind = "block"
size = "64KiB"

[service.policyd]
program = "policyd"
capabilities = ["{AUTHORITY}"]

[service.keeper]
module = "tests.fakes.keeper:Keeper"
protocol = "tests.fakes.keeper"
stage = "core"
hardware = ["disk"]
capabilities = ["device.mmio.blk:window disk"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "system.toml"
    _ = file.write_text(SYSTEM)
    return file


def looked(file: Path, after: Run, seed: int) -> Kept:
    """What the next boot finds."""
    found: list[Kept] = []

    async def scenario(device: Device) -> None:
        found.append(await device.call("keeper", Look()))

    _ = simulate(file, scenario, seed=seed, after=after)
    return found[0]


def test_a_blank_device_keeps_what_it_is_given_over_an_orderly_restart(file: Path) -> None:
    first: list[Kept] = []

    async def scenario(device: Device) -> None:
        first.append(await device.call("keeper", Look()))
        _ = await device.call("keeper", Keep(7, durable=False))

    run = simulate(file, scenario, seed=1)
    second = looked(file, run, seed=2)

    assert (first[0].value, first[0].boot) == (0, 0)
    assert (second.value, second.boot) == (7, 1)
    assert first[0].boot_id != second.boot_id
    assert (run.exit_code, run.cut) == (0, "")


def test_a_power_cut_leaves_what_was_durable_and_takes_the_rest(file: Path) -> None:
    async def scenario(device: Device) -> None:
        _ = await device.call("keeper", Keep(7, durable=True))
        assert (await device.call("keeper", Keep(8, durable=False))).value == 8
        await device.cut_power()

    run = simulate(file, scenario, seed=1)
    after = looked(file, run, seed=2)

    assert run.cut == "the test cut it"
    assert (after.value, after.boot) == (7, 1)


def test_the_machines_clock_goes_on_from_boot_to_boot(file: Path) -> None:
    walls: list[int] = []

    async def scenario(device: Device) -> None:
        clock = device.kernel.mapped_clock
        walls.append(clock.wall())
        since = clock.monotonic()
        await device.sleep("30min")
        walls.append(clock.wall())
        assert walls[-1] - walls[-2] == clock.monotonic() - since >= HALF_HOUR

    async def cut(device: Device) -> None:
        await scenario(device)
        await device.cut_power()

    first = simulate(file, cut, seed=1, within="60min")
    second = simulate(file, scenario, seed=2, within="60min", after=first)
    again = simulate(file, scenario, seed=2, within="60min", after=first)

    assert walls[0] >= WALL_START
    assert sorted(set(walls[:4])) == walls[:4], "each boot begins after the earlier one has ended"
    assert walls[4:] == walls[2:4], "a function of the seed"
    assert first.wall < second.wall == again.wall


HALF_HOUR = 1_800_000_000_000  # nanoseconds


def test_one_run_may_be_followed_by_several(file: Path) -> None:
    async def scenario(device: Device) -> None:
        _ = await device.call("keeper", Keep(7, durable=True))

    async def other(device: Device) -> None:
        _ = await device.call("keeper", Keep(9, durable=True))

    run = simulate(file, scenario, seed=1)
    _ = simulate(file, other, seed=2, after=run)

    assert looked(file, run, seed=3).value == 7


def test_the_same_seeds_give_the_same_boots(file: Path) -> None:
    async def scenario(device: Device) -> None:
        _ = await device.call("keeper", Keep(7, durable=True))
        await device.cut_power()

    def boots() -> list[tuple[str, ...]]:
        first = simulate(file, scenario, seed=1)
        return [first.log, simulate(file, scenario, seed=2, after=first).log]

    assert boots() == boots()


def test_who_lacks_the_right_to_its_window_does_not_start(file: Path) -> None:
    """A right is bound to one window, not to those whose names begin with its name."""

    async def scenario(_device: Device) -> None:
        raise AssertionError("the system has become ready")

    _ = file.write_text(SYSTEM.replace("window disk", "window disk2"))

    with pytest.raises(AssertionError, match="no start of keeper"):
        _ = simulate(file, scenario, seed=1)
