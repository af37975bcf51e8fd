"""Devices of the bus map and secrets: who gets one, what it does, and that it comes back.

The kernel drives the devices here itself. Windows onto registers are the simulated bus's and the
virtual machine's, and tested there.
"""

from dataclasses import replace
from typing import Any, Final

from nexus.abi import (
    BLOCK_SIZE,
    BLOCK_TRANSFER_MAX,
    ENTROPY_SIZE_MAX,
    HARDWARE_MAX,
    NO_WAIT,
    SECRET_SIZE_MAX,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootImage,
    BusScan,
    CapClone,
    CapClose,
    CapDerive,
    CapKind,
    CapQuery,
    DeviceDma,
    DeviceMap,
    DeviceQuery,
    EntropyDraw,
    EventKind,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    Kill,
    Rights,
    SecretBackend,
    SecretQuery,
    SecretRead,
    SecretReplace,
    Send,
    Slot,
    Spawn,
    Spawned,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskStats,
    Trap,
    VmoMap,
)
from nexus.kernel.core import BOOT_BUDGET_SIZE, DEVICE_BUDGET_SIZE, Hardware
from nexus.testing.conformance.steps import (
    PAST,
    ended,
    ended_well,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.rig import Rig, program, reporting

BLOCKS: Final = 128
DISK: Final = Hardware("disk", HardwareKind.BLOCK, size=BLOCKS * BLOCK_SIZE)
ROM: Final = Hardware("rom", HardwareKind.BLOCK, size=BLOCKS * BLOCK_SIZE, read_only=True)
RNG: Final = Hardware("rng", HardwareKind.ENTROPY)

GRANT_DISK: Final = HardwareGrant("disk", HardwareKind.BLOCK)
GRANT_ROM: Final = HardwareGrant("rom", HardwareKind.BLOCK)
GRANT_RNG: Final = HardwareGrant("rng", HardwareKind.ENTROPY)
WITH_DISK: Final = Grants(hardware=(GRANT_DISK,))
WITH_BOTH: Final = Grants(hardware=(GRANT_RNG, GRANT_DISK))

NEVER_STARTED: Final = "never"  # the program of a spawn that must be refused

ONES: Final = b"\x11" * BLOCK_SIZE
TWOS: Final = b"\x22" * BLOCK_SIZE


# ---------------------------------------------------------------------- what a holder finds


def test_a_holder_finds_its_devices_in_the_order_of_the_grants(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        rng, disk = boot.hardware
        for slot, kind in ((rng, CapKind.ENTROPY), (disk, CapKind.BLOCK)):
            info = await CapQuery(slot)
            assert (info.kind, info.rights, info.length) == (kind, Rights.MAP, 0)
        block = await DeviceQuery(disk)
        assert (block.name, block.block_count, block.writable) == ("disk", BLOCKS, True)
        assert block.backing == "file"
        entropy = await DeviceQuery(rng)
        assert (entropy.name, entropy.block_count) == ("rng", 0)
        assert entropy.backing in ("hwrng", "getrandom")

    async def root(boot: BootImage) -> None:
        assert boot.hardware == ()
        await ended_well(await start(boot, "child", grants=WITH_BOTH))

    with rig.place() as place:
        place.hardware = (DISK, RNG)
        run = rig.observe(root, programs={"child": child}, place=place)

    (granted,) = [each for each in run.fields(EventKind.SPAWN) if each["name"] == "child"]
    grants = granted["grants"]
    assert isinstance(grants, dict)
    assert grants["hardware"] == [
        {"name": "rng", "kind": "entropy"},
        {"name": "disk", "kind": "block"},
    ]
    assert grants["secret"] == "none"


def test_only_the_root_task_scans_the_bus(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        before = await TaskStats()
        await refused(BusScan(), Status.PERMISSION_DENIED)
        assert await TaskStats() == before

    async def root(boot: BootImage) -> None:
        entries = await BusScan()
        assert [(each.name, each.kind) for each in entries] == [
            ("disk", HardwareKind.BLOCK),
            ("rng", HardwareKind.ENTROPY),
            ("rom", HardwareKind.BLOCK),
        ]
        for each in entries:
            assert each[3:] == (0, 0, 0, 0, 0), "there are no registers"
        await ended_well(await start(boot, "child", grants=WITH_DISK))
        assert await BusScan() == entries

    with rig.place() as place:
        place.hardware = (RNG, ROM, DISK)
        rig.run(root, programs={"child": child}, place=place)


def test_a_kernel_without_devices_has_an_empty_bus(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        assert await BusScan() == ()
        await _refused_start(boot, WITH_DISK)

    rig.run(root, programs={NEVER_STARTED: _never})


# ---------------------------------------------------------------------- block devices


def test_what_is_written_is_read_by_the_next_holder_and_after_the_next_boot(rig: Rig) -> None:
    async def writes(boot: BootImage) -> None:
        (disk,) = boot.hardware
        assert await BlockRead(disk, 0, BLOCKS, await soon()) == bytes(BLOCKS * BLOCK_SIZE)
        await BlockWrite(disk, 3, ONES + TWOS, await soon())
        assert await BlockRead(disk, 2, 3, await soon()) == bytes(BLOCK_SIZE) + ONES + TWOS
        await BlockFlush(disk, await soon())
        data = bytearray(TWOS)
        await BlockWrite(disk, BLOCKS - 1, memoryview(data), await soon(), durable=True)
        data[:] = ONES  # it was copied
        assert await BlockRead(disk, BLOCKS - 1, 1, await soon()) == TWOS

    async def reads(boot: BootImage) -> None:
        (disk,) = boot.hardware
        assert await BlockRead(disk, 2, 4, await soon()) == (
            bytes(BLOCK_SIZE) + ONES + TWOS + bytes(BLOCK_SIZE)
        )
        assert await BlockRead(disk, BLOCKS - 1, 1, await soon()) == TWOS

    async def first(boot: BootImage) -> None:
        for name in ("writes", "reads"):
            await ended_well(await start(boot, name, grants=WITH_DISK))

    async def second(boot: BootImage) -> None:
        await ended_well(await start(boot, "reads", grants=WITH_DISK))

    with rig.place() as place:
        place.hardware = (DISK,)
        for boot_main in (first, second):
            rig.run(boot_main, programs={"writes": writes, "reads": reads}, place=place)


def test_a_transfer_that_does_not_fit_is_refused_and_writes_nothing(rig: Rig) -> None:
    most = BLOCK_TRANSFER_MAX // BLOCK_SIZE

    async def child(boot: BootImage) -> None:
        (disk,) = boot.hardware
        for block, count in (
            (-1, 1),
            (BLOCKS, 1),
            (BLOCKS - 1, 2),
            (0, 0),
            (0, -1),
            (0, BLOCKS + 1),
            (0, most + 1),
            (1 << 55, 1),
        ):
            trap = BlockRead(disk, block, count, await soon())
            await refused(trap, Status.INVALID_ARGUMENT)
        for block, data in (
            (-1, ONES),
            (BLOCKS, ONES),
            (BLOCKS - 1, ONES + TWOS),
            (0, b""),
            (0, b"x"),
            (0, ONES[:-1]),
            (0, ONES + b"x"),
            (0, bytes(BLOCK_TRANSFER_MAX + BLOCK_SIZE)),
            (1 << 55, ONES),
        ):
            write = BlockWrite(disk, block, data, await soon())
            await refused(write, Status.INVALID_ARGUMENT)
        assert await BlockRead(disk, 0, BLOCKS, await soon()) == bytes(BLOCKS * BLOCK_SIZE)

    _with_child(rig, child, WITH_DISK, DISK)


def test_after_the_deadline_a_device_is_not_asked(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        (disk,) = boot.hardware
        for deadline in (PAST, NO_WAIT):
            await refused(BlockRead(disk, 0, 1, deadline), Status.TIMED_OUT)
            await refused(BlockWrite(disk, 0, ONES, deadline), Status.TIMED_OUT)
            await refused(BlockFlush(disk, deadline), Status.TIMED_OUT)
        assert await BlockRead(disk, 0, 1, await soon()) == bytes(BLOCK_SIZE)

    _with_child(rig, child, WITH_DISK, DISK)


def test_a_read_only_device_is_not_written(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        (rom,) = boot.hardware
        assert not (await DeviceQuery(rom)).writable
        for durable in (False, True):
            write = BlockWrite(rom, 0, ONES, await soon(), durable=durable)
            await refused(write, Status.PERMISSION_DENIED)
        assert await BlockRead(rom, 0, 1, await soon()) == bytes(BLOCK_SIZE)
        await BlockFlush(rom, await soon())

    _with_child(rig, child, Grants(hardware=(GRANT_ROM,)), ROM)


def test_a_block_that_cannot_be_read_is_a_failure_of_the_device(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        (disk,) = boot.hardware
        await BlockWrite(disk, 0, ONES, await soon())
        await tell(boot, b"written")
        assert (await take(boot.endpoint)).data == b"broken"
        await refused(BlockRead(disk, BLOCKS - 1, 1, await soon()), Status.DEVICE_FAILED)
        await refused(BlockRead(disk, 0, BLOCKS, await soon()), Status.DEVICE_FAILED)
        assert await BlockRead(disk, 0, 1, await soon()) == ONES

    with rig.place() as place:
        place.hardware = (DISK,)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DISK)
            assert (await take(boot.endpoint)).data == b"written"
            place.outside.break_disk("disk")
            await Send(spawned.slot, b"broken")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


# ---------------------------------------------------------------------- entropy


def test_entropy_comes_in_bounded_draws_that_differ(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        (rng,) = boot.hardware
        for size in (0, -1, ENTROPY_SIZE_MAX + 1, 1 << 40):
            await refused(EntropyDraw(rng, size), Status.INVALID_ARGUMENT)
        for size in (1, 32, ENTROPY_SIZE_MAX):
            assert len(await EntropyDraw(rng, size)) <= size
        drawn = [data for _ in range(8) if len(data := await EntropyDraw(rng, 32)) == 32]
        assert len(set(drawn)) == len(drawn)

    _with_child(rig, child, Grants(hardware=(GRANT_RNG,)), RNG)


# ---------------------------------------------------------------------- capabilities


def test_a_device_is_used_as_what_it_is(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        rng, disk = boot.hardware
        later = await soon()

        def uses(slot: Slot) -> tuple[Trap[Any], ...]:
            return (
                BlockRead(slot, 0, 1, later),
                BlockWrite(slot, 0, ONES, later),
                BlockFlush(slot, later),
                EntropyDraw(slot, 1),
                DeviceMap(slot),
                DeviceMap(slot, execute=True),
                DeviceDma(slot),
            )

        wrong: list[Trap[Any]] = [*uses(disk)[3:], *uses(rng)[:3], *uses(rng)[4:]]
        assert boot.control is not None
        for slot in (boot.endpoint, boot.control):
            wrong += uses(slot)
            await refused(DeviceQuery(slot), Status.INVALID_ARGUMENT)
        for trap in wrong:
            await refused(trap, Status.PERMISSION_DENIED)
        for slot in (Slot(70), Slot(-1), Slot(1 << 20)):
            for trap in (*uses(slot), DeviceQuery(slot)):
                await refused(trap, Status.INVALID_ARGUMENT)
        for slot in (rng, disk):
            await refused(VmoMap(slot), Status.INVALID_ARGUMENT)

    _with_child(rig, child, WITH_BOTH, DISK, RNG)


def test_a_task_without_a_grant_has_no_device(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        assert boot.hardware == ()
        for number in range(8):
            if number not in (boot.endpoint, boot.control):
                await refused(DeviceQuery(Slot(number)), Status.INVALID_ARGUMENT)

    _with_child(rig, child, Grants(), DISK, RNG)


def test_the_right_to_a_device_is_derived_downwards_only(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        rng, disk = boot.hardware
        later = await soon()
        for slot in (rng, disk):
            for more in (Rights.MAP | Rights.MANAGE, Rights.SEND):
                await refused(CapDerive(slot, more), Status.PERMISSION_DENIED)
        dull_disk, dull_rng = await CapDerive(disk, Rights(0)), await CapDerive(rng, Rights(0))
        traps: tuple[Trap[Any], ...] = (
            DeviceQuery(dull_disk),
            CapQuery(dull_disk),
            BlockRead(dull_disk, 0, 1, later),
            BlockWrite(dull_disk, 0, ONES, later),
            BlockFlush(dull_disk, later),
            EntropyDraw(dull_rng, 1),
        )
        for trap in traps:
            await refused(trap, Status.PERMISSION_DENIED)
        alias = await CapClone(disk)
        await BlockWrite(alias, 0, TWOS, later)
        await CapClose(disk)
        assert await BlockRead(alias, 0, 1, later) == TWOS

    _with_child(rig, child, WITH_BOTH, DISK, RNG)


def test_a_device_does_not_move(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        (disk,) = boot.hardware
        assert boot.control is not None
        await refused(Send(boot.control, b"yours", move=disk), Status.PERMISSION_DENIED)
        assert await BlockRead(disk, 0, 1, await soon()) == bytes(BLOCK_SIZE)

    _with_child(rig, child, WITH_DISK, DISK)


def test_devices_are_charged_to_their_holder(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        stats = await TaskStats()
        assert stats.slots == 4
        assert stats.budget_used == stats.budget_total == BOOT_BUDGET_SIZE + 2 * DEVICE_BUDGET_SIZE
        await CapClose(boot.hardware[0])
        assert (await TaskStats()).budget_free == DEVICE_BUDGET_SIZE

    async def root(boot: BootImage) -> None:
        before = await TaskStats()
        least = BOOT_BUDGET_SIZE + 2 * DEVICE_BUDGET_SIZE
        spec = SpawnSpec("child", "child", boot.endpoint, budget=least - 1, grants=WITH_BOTH)
        await refused(Spawn(spec), Status.INVALID_ARGUMENT)
        assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD
        assert (await TaskStats()).slots == before.slots
        await ended_well(await Spawn(spec._replace(budget=least)))

    with rig.place() as place:
        place.hardware = (DISK, RNG)
        rig.run(root, programs={"child": child}, place=place)


# ---------------------------------------------------------------------- one holder


def test_a_device_has_one_holder_and_comes_back_when_that_ends(rig: Rig) -> None:
    async def holds(boot: BootImage) -> int:
        (disk,) = boot.hardware
        await BlockWrite(disk, 0, ONES, await soon())
        return int((await take(boot.endpoint)).data)

    async def closes(boot: BootImage) -> None:
        await CapClose(boot.hardware[0])
        await tell(boot, b"closed")
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        for code in (0, 3):
            holder = await start(boot, "holds", grants=WITH_DISK)
            await _refused_start(boot, WITH_DISK)
            await _refused_start(boot, WITH_BOTH)
            await ended_well(await start(boot, "empty_handed"))
            await Send(holder.slot, str(code).encode())
            assert (await ended(holder)).code == code
        killed = await start(boot, "holds", grants=WITH_DISK)
        await Kill(killed.pid)
        await ended(killed)
        # The grant is what is exclusive, whatever its holder does with the slot.
        closer = await start(boot, "closes", grants=WITH_DISK)
        assert (await take(boot.endpoint, link=closer.link)).data == b"closed"
        await _refused_start(boot, WITH_DISK)
        await Send(closer.slot, b"end")
        await ended_well(closer)
        last = await start(boot, "holds", grants=WITH_BOTH._replace(hardware=(GRANT_DISK,)))
        await Send(last.slot, b"0")
        await ended_well(last)

    async def empty_handed(boot: BootImage) -> None:
        assert boot.hardware == ()

    with rig.place() as place:
        place.hardware = (DISK, RNG)
        programs = {
            "holds": holds,
            "closes": closes,
            "empty_handed": empty_handed,
            NEVER_STARTED: _never,
        }
        rig.run(root, programs=programs, place=place)


def test_devices_that_cannot_be_granted_are_refused_and_start_nothing(rig: Rig) -> None:
    wrong: tuple[tuple[HardwareGrant, ...], ...] = (
        (HardwareGrant("absent", HardwareKind.BLOCK),),
        (HardwareGrant("disk", HardwareKind.ENTROPY),),
        (HardwareGrant("rng", HardwareKind.BLOCK),),
        (HardwareGrant("rng", HardwareKind.EMPTY),),
        (HardwareGrant("disk", 7),),  # type: ignore[arg-type]
        (GRANT_DISK, GRANT_DISK),
        (HardwareGrant("Bad Name", HardwareKind.BLOCK),),
        (HardwareGrant("../disk", HardwareKind.BLOCK),),
        tuple(HardwareGrant(f"d{n}", HardwareKind.BLOCK) for n in range(HARDWARE_MAX + 1)),
    )

    async def holds(boot: BootImage) -> None:
        assert len(boot.hardware) == 2

    async def root(boot: BootImage) -> None:
        before = await TaskStats()
        for hardware in wrong:
            await _refused_start(boot, Grants(hardware=hardware))
        assert (await TaskStats()).slots == before.slots
        await ended_well(await start(boot, "holds", grants=WITH_BOTH))

    with rig.place() as place:
        place.hardware = (DISK, RNG)
        rig.run(root, programs={"holds": holds, NEVER_STARTED: _never}, place=place)


# ---------------------------------------------------------------------- secrets


async def _keeps(boot: BootImage) -> None:
    """Finds what its argument says was stored, and stores what its argument says."""
    backend, found, stores = boot.argument.split(b" ")
    assert (await SecretQuery()) is SecretBackend(int(backend))
    assert await SecretRead() == found
    for data in (b"", bytes(SECRET_SIZE_MAX + 1)):
        await refused(SecretReplace(data), Status.INVALID_ARGUMENT)
    assert await SecretRead() == found
    await SecretReplace(b"\xff" * SECRET_SIZE_MAX)
    assert await SecretRead() == b"\xff" * SECRET_SIZE_MAX
    await SecretReplace(stores)
    assert await SecretRead() == stores


async def _suffers(boot: BootImage) -> None:
    """Its secret is damaged while it has one."""
    await SecretReplace(b"sound")
    await tell(boot, b"stored")
    assert (await take(boot.endpoint)).data == b"damaged"
    await refused(SecretRead(), Status.DEVICE_FAILED)
    await refused(SecretReplace(b"other"), Status.DEVICE_FAILED)


keeps: Final = reporting(_keeps)
suffers: Final = reporting(_suffers)
KEEPS: Final = replace(program("keeps", keeps), entry=f"{__name__}:keeps")
SUFFERS: Final = replace(program("suffers", suffers), entry=f"{__name__}:suffers")


def test_a_secret_in_a_file_is_kept_for_its_service_alone(rig: Rig) -> None:
    _keep_secrets(rig, SecretBackend.FILE)


def test_a_secret_in_the_keyring_is_kept_for_its_service_alone(rig: Rig) -> None:
    _keep_secrets(rig, SecretBackend.KEYRING)


def _keep_secrets(rig: Rig, backend: SecretBackend) -> None:
    rig.require_apart()

    async def session(boot: BootImage, name: bytes, found: bytes, stores: bytes) -> None:
        argument = b"%d %s %s" % (backend, found, stores)
        spawned = await _start_keeping(boot, name.decode(), KEEPS.name, backend, argument)
        await ended_well(spawned)

    async def first(boot: BootImage) -> None:
        await session(boot, b"one", b"", b"first")
        await session(boot, b"two", b"", b"another")
        await session(boot, b"one", b"first", b"second")

    async def second(boot: BootImage) -> None:
        await session(boot, b"two", b"another", b"x")
        await session(boot, b"one", b"second", b"third")

    with rig.place() as place:
        for boot_main in (first, second):
            rig.run(boot_main, programs={"keeps": KEEPS}, place=place)


def test_a_damaged_secret_is_a_failure_and_not_an_empty_one(rig: Rig) -> None:
    rig.require_apart()
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            spawned = await _start_keeping(boot, "suffers", "suffers", SecretBackend.FILE, b"")
            assert (await take(boot.endpoint)).data == b"stored"
            place.outside.damage_secret("suffers")
            await Send(spawned.slot, b"damaged")
            await ended_well(spawned)

        rig.run(root, programs={"suffers": SUFFERS}, place=place)


def test_without_the_grant_there_is_no_secret(rig: Rig) -> None:
    async def has_none() -> None:
        before = await TaskStats()
        assert (await SecretQuery()) is SecretBackend.NONE
        await refused(SecretRead(), Status.PERMISSION_DENIED)
        for data in (b"x", b"", bytes(SECRET_SIZE_MAX + 1)):
            await refused(SecretReplace(data), Status.PERMISSION_DENIED)
        assert await TaskStats() == before

    async def child(boot: BootImage) -> None:
        await has_none()

    async def root(boot: BootImage) -> None:
        await has_none()
        await ended_well(await start(boot, "child"))

    with rig.place() as place:
        rig.run(root, programs={"child": child}, place=place)


def test_a_secret_is_granted_only_to_an_interpreter_of_its_own(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        for backend in (SecretBackend.FILE, SecretBackend.KEYRING, 7):
            await _refused_start(boot, Grants(secret=backend))  # type: ignore[arg-type]

    with rig.place() as place:
        rig.run(root, programs={NEVER_STARTED: _never}, place=place)


# ---------------------------------------------------------------------- steps


def _with_child(rig: Rig, child: Any, grants: Grants, *hardware: Hardware) -> None:
    """Run a child with these grants, in a place with this bus."""

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "child", grants=grants))

    with rig.place() as place:
        place.hardware = hardware
        rig.run(root, programs={"child": child}, place=place)


async def _never(boot: BootImage) -> None:
    raise AssertionError(f"{boot.name} must not start")


async def _refused_start(boot: BootImage, grants: Grants) -> None:
    """Grants that are wrong on their face, or of what another one has."""
    spec = SpawnSpec("refused", NEVER_STARTED, boot.endpoint, grants=grants)
    await refused(Spawn(spec), Status.INVALID_ARGUMENT)
    assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD, grants


async def _start_keeping(
    boot: BootImage, name: str, run: str, backend: SecretBackend, argument: bytes
) -> Spawned:
    grants = Grants(isolation=Isolation.EXEC, secret=backend)
    return await start(boot, name, program=run, grants=grants, argument=argument)
