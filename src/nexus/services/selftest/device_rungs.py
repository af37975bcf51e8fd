"""Rungs about the device that this client was granted: an empty transport, in a page of its own."""

from typing import Final

from nexus.abi import (
    PAGE_SIZE,
    AbiError,
    CapClose,
    CapDerive,
    CapInfo,
    CapKind,
    CapQuery,
    DeviceMap,
    DeviceQuery,
    Rights,
    Slot,
    Status,
)
from nexus.services.selftest.climb import Climb
from nexus.services.selftest.rung import Evidence, RungAbsent, expect, refusal
from nexus.services.selftest.stick import device_named

SPARE: Final = "spare"
BACKING: Final = "virtio-mmio"
MAGIC: Final = 0x74726976  # "virt"
VERSION: Final = 2
MAGIC_AT, VERSION_AT, DEVICE_ID_AT = 0x000, 0x004, 0x008  # registers
NO_DEVICE: Final = 0


async def _window(climb: Climb) -> Slot:
    """The empty transport; a ground without a bus has none."""
    slot = await device_named(climb, SPARE)
    if slot is None:
        raise RungAbsent("no empty transport was granted")
    return slot


async def mmio_map(climb: Climb) -> Evidence:
    """#140: the transport that the bus map names, and nothing beside or behind its page."""
    slot = await _window(climb)
    info = await DeviceQuery(slot)
    if info.backing != BACKING:
        raise RungAbsent(f"{info.name} is {info.backing}")

    window = await DeviceMap(slot)
    found = [window.read(at) for at in (MAGIC_AT, VERSION_AT, DEVICE_ID_AT)]
    beyond = await refusal(DeviceMap(slot, PAGE_SIZE))
    executable = await refusal(DeviceMap(slot, execute=True))
    bare = await CapDerive(slot, Rights(0))
    unmapped = await refusal(DeviceMap(bare))
    await CapClose(bare)

    expect(found, [MAGIC, VERSION, NO_DEVICE], "magic, version and device id")
    expect(window.length, PAGE_SIZE, "bytes of the window")
    expect([beyond, executable, unmapped], [Status.PERMISSION_DENIED] * 3, "refusals")
    return {
        "device": info.name,
        "registers": found,
        "length": window.length,
        "refusals": [beyond.name, executable.name, unmapped.name],
    }


async def cap_query_mmio(climb: Climb) -> Evidence:
    """#141: a window is kind 2 and a page long, and where it is on the bus is not said."""
    slot = await _window(climb)
    try:
        info = await CapQuery(slot)
        device = await DeviceQuery(slot)
    except AbiError as error:
        expect(error.status, None, "query of the window")
        raise

    expect((info.kind, info.length), (CapKind.DEVICE, PAGE_SIZE), "kind and length")
    expect(CapInfo._fields, ("kind", "rights", "length"), "fields of an answer")
    return {"answer": list(info), "device": list(device)}
