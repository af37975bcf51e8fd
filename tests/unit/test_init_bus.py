"""Devices of the bus map: granted as declared or not at all, one holder at a time, and again."""

from typing import Any, Final

import pytest

from nexus.abi import (
    BootImage,
    BusEntry,
    DeviceInfo,
    DeviceQuery,
    EventKind,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    SecretBackend,
)
from nexus.init.bus import compare, problem_of
from nexus.init.grants import wanted_by
from nexus.init.plan import make_plan
from nexus.init.system import load
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.init import Restart, Restarting, TaskState
from tests.fakes.initrig import DRIVER, MS, SYSTEM, Boot, Driver, boot, idle

__all__ = ["boot"]  # the fixture

DISK: Final = HardwareGrant("disk", HardwareKind.BLOCK)
SPARE: Final = HardwareGrant("spare", HardwareKind.EMPTY)
WINDOW: Final = BusEntry(
    name="disk",
    kind=HardwareKind.BLOCK,
    backing="virtio-mmio",
    base=0x1000_1000,
    length=4096,
    magic=0x7472_6976,
    version=2,
    device_id=2,
)
IMAGE: Final = BusEntry("disk", HardwareKind.BLOCK, "file", 0, 0, 0, 0, 0)
DEVICES: Final = """
[device.disk]
kind = "block"
size = "64KiB"

[device.rng]
kind = "entropy"

[device.spare]
kind = "empty"
"""
OLD: Final = """
[device.old]
kind = "block"
size = "64KiB"
legacy = true

[device.older]
kind = "empty"
legacy = true
"""
CONTROL: Final = DRIVER + 'health = { every = "0s" }\n'  # the driver does not serve its endpoint
HOLDER: Final = """
[service.a]
program = "a"
restart = { backoff = "20ms" }
hardware = ["disk", "spare"]
capabilities = ["device.mmio.blk:window disk", "device.mmio.empty"]
"""


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (WINDOW, ""),
        (IMAGE, ""),
        (None, "not on the bus"),
        (WINDOW._replace(kind=HardwareKind.ENTROPY), "a device of kind entropy"),
        (IMAGE._replace(kind=HardwareKind.EMPTY), "a device of kind empty"),
        (WINDOW._replace(magic=0), "magic 0x00000000"),
        (WINDOW._replace(version=1), "register version 1"),
        (WINDOW._replace(version=3), "register version 3"),
        (WINDOW._replace(device_id=0), "device id 0"),
        (WINDOW._replace(device_id=4), "device id 4"),
    ],
)
def test_a_device_is_what_the_bus_map_declares_or_is_not_granted(
    entry: BusEntry | None, problem: str
) -> None:
    entries = {} if entry is None else {"disk": entry}

    found = compare(Grants(hardware=(DISK,)), entries)

    assert problem_of(DISK, entry) == problem
    assert found.wrong == ((("disk", problem),) if problem else ())
    assert found.absent == ()


def test_where_there_are_no_registers_a_service_goes_without_an_empty_transport() -> None:
    grants = Grants(threads=3, hardware=(SPARE, DISK))
    spare = WINDOW._replace(name="spare", kind=HardwareKind.EMPTY, device_id=0)

    without = compare(grants, {"disk": IMAGE})
    with_it = compare(grants, {"disk": WINDOW, "spare": spare})

    assert without == (Grants(threads=3, hardware=(DISK,)), ("spare",), ())
    assert with_it == (grants, (), ())


def test_a_right_is_wanted_for_each_device_and_for_a_secret(tmp_path: Any) -> None:
    file = tmp_path / "system.toml"
    entry = '[service.timed]\nprogram = "timed"\nisolation = "exec"\nsecret = "keyring"\n'
    hardware = 'hardware = ["rng", "disk", "spare"]\n'
    _ = file.write_text('[system]\nname = "x"\n' + DEVICES + entry + hardware)
    (planned,) = make_plan(load(file)).services

    assert planned.grants.isolation is Isolation.EXEC
    assert planned.grants.secret is SecretBackend.KEYRING
    assert wanted_by(planned) == [
        ("device.mmio.rng", "window rng"),
        ("device.mmio.blk", "window disk"),
        ("device.mmio.empty", "window spare"),
        ("secret.keyring", "secret of timed"),
    ]


def test_a_holder_gets_its_devices_in_their_order_and_every_grant_is_said(boot: Boot) -> None:
    seen: list[DeviceInfo] = []

    async def holder(image: BootImage) -> int:
        seen.extend([await DeviceQuery(slot) for slot in image.hardware])
        return await idle(image)

    run = boot(text=SYSTEM + DEVICES + CONTROL + HOLDER, mains={"a": holder})

    assert [device.name for device in seen] == ["disk", "spare"]
    assert run.evidence("init: ready")["grants"] == [
        ["a", "device.mmio.blk", "window disk", "allow"],
        ["a", "device.mmio.empty", "window spare", "allow"],
    ]
    assert not run.lines("init: legacy")


def test_a_device_comes_back_to_the_next_instance(boot: Boot) -> None:
    async def driver(driver: Driver) -> Any:
        for _ in range(3):
            _ = await driver.reply(Restart("a"), Restarting)
            await driver.pause(100 * MS)
        return await driver.record("a")

    run = boot(driver, text=SYSTEM + DEVICES + CONTROL + HOLDER, mains={"a": idle})

    assert (run.result.state, run.result.generation) == (TaskState.UP, 4)
    assert run.result.spawn_refused == 0
    changes = [
        str(event.fields["what"])
        for event in run.events
        if event.kind is EventKind.DEVICE and event.fields["name"] == "disk"
    ]
    assert changes.count("released") == 4


def test_a_device_that_is_not_as_declared_is_granted_once_it_is(boot: Boot) -> None:
    """Kept as the reason, said at each try, and not counted as a crash."""

    def age(kernel: SimKernel, version: int) -> None:
        transport = kernel.bus.units["disk"].transport
        assert transport is not None
        transport.version = version

    async def driver(driver: Driver) -> tuple[Any, Any]:
        await driver.pause(100 * MS)
        _ = await driver.reply(Restart("a"), Restarting)
        await driver.pause(300 * MS)
        refused = await driver.record("a")
        await driver.pause(900 * MS)
        return refused, await driver.record("a")

    run = boot(
        driver,
        text=SYSTEM + DEVICES + CONTROL + HOLDER,
        mains={"a": idle},
        at=[(80 * MS, lambda kernel: age(kernel, 1)), (700 * MS, lambda kernel: age(kernel, 2))],
    )

    refused, after = run.result
    assert (refused.state, refused.reason) == (TaskState.BACKING_OFF, "device")
    assert (after.state, after.generation, after.restarts) == (TaskState.UP, 2, 1)
    told = [event for event in run.events if event.fields.get("line") == "init: no start of a"]
    assert len(told) >= 2
    evidence: Any = told[0].fields["evidence"]
    assert (evidence["reason"], evidence["why"]) == ("device", "device disk: register version 1")
    assert run.ended.code == 0


def test_a_legacy_transport_is_listed_as_refused_after_ready(boot: Boot) -> None:
    run = boot(text=SYSTEM + DEVICES + OLD + CONTROL + HOLDER, mains={"a": idle})

    evidence = run.evidence("init: legacy transport refused ok")
    assert evidence == {"transports": [["old", 1], ["older", 1]], "granted": []}
    assert run.time("init: legacy transport refused ok") >= run.time("init: ready")
    lines = run.lines("init:")
    assert lines.index("init: legacy transport refused ok") > lines.index("init: ready")
