"""The devices of the machine, looked at before one is granted: is each what the bus map says?

What is behind a device is the kernel's to decide (ADR 13): registers that the service drives, or a
device that the kernel drives. Registers are told apart by what they read as, and only those of a
modern transport with the declared device behind it are granted; a transport of the old register
layout is listed as refused. A bus without registers has no empty transports: there a service goes
without, for it could do nothing with one but look.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from nexus.abi import BusEntry, BusScan, Grants, HardwareGrant, HardwareKind
from nexus.drivers.virtio import BACKING, MAGIC, VERSION
from nexus.init.plan import PlannedService

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor


class Found(NamedTuple):
    """What of a plan's grants can be given: the grants themselves, empty transports that are not
    there, and devices that are not as declared, each with what is wrong."""

    grants: Grants
    absent: tuple[str, ...] = ()
    wrong: tuple[tuple[str, str], ...] = ()


def compare(grants: Grants, entries: Mapping[str, BusEntry]) -> Found:
    """Compare the devices that are to be granted with those that were found."""
    absent = tuple(
        each.name
        for each in grants.hardware
        if each.kind is HardwareKind.EMPTY and each.name not in entries
    )
    present = tuple(each for each in grants.hardware if each.name not in absent)
    told = ((each.name, problem_of(each, entries.get(each.name))) for each in present)
    wrong = tuple((name, problem) for name, problem in told if problem)
    return Found(grants._replace(hardware=present), absent, wrong)


def problem_of(grant: HardwareGrant, entry: BusEntry | None) -> str:
    """Why the device is not the declared one, or ""."""
    if entry is None:
        return "not on the bus"
    if entry.kind is not grant.kind:
        return f"a device of kind {entry.kind.name.lower()}"
    if entry.backing != BACKING:
        return ""
    if entry.magic != MAGIC:
        return f"magic 0x{entry.magic:08x}"
    if entry.version != VERSION:
        return f"register version {entry.version}"
    if entry.device_id != grant.kind:
        return f"device id {entry.device_id}"
    return ""


class Bus:
    """The devices of the plan, as the kernel finds them."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init

    async def find(self, planned: PlannedService) -> Found:
        """What a service can be granted now."""
        if not planned.grants.hardware:
            return Found(planned.grants)
        return compare(planned.grants, {each.name: each for each in await BusScan()})

    async def say_refused(self) -> None:
        """List the transports of another register version, and that nobody has one."""
        if not self._init.plan.hardware:
            return
        refused = [
            each
            for each in await BusScan()
            if each.backing == BACKING and each.magic == MAGIC and each.version != VERSION
        ]
        if not refused:
            return
        names = {each.name for each in refused}
        granted = [
            [device, record.name]
            for record in self._init.records.values()
            for device in record.hardware
            if device in names
        ]
        verdict = f"FAIL {granted[0][0]} is granted to {granted[0][1]}" if granted else "ok"
        await self._init.say(
            f"init: legacy transport refused {verdict}",
            transports=[[each.name, each.version] for each in refused],
            granted=granted,
        )
