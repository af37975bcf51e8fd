"""What boot device and slots hold between the boots of a run, as the runner itself reads them."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nexus.bootctl import BlockBoot, BootRecord, NoBootRecord, SlotName
from nexus.drivers import BlockDevice, DeviceFault, finished
from nexus.init.plan import Plan
from nexus.kernel.core import Hardware
from nexus.loader.devices import opened
from nexus.proof.remains import image_of
from nexus.services.selftest.stick import STICK

BOOT: Final = "boot"
SLOTS: Final = {name: f"slot-{name.value}" for name in SlotName}
UPDATED: Final = "updated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A set that the runner has made."""

    version: int
    name: str
    digest: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BootRemains:
    """What boot device and slots hold, as the runner reads them.

    `copies` are the two of the record, None where there is none. `digests` are of as many bytes of
    each slot as the record says that its set has, `whole` of all its bytes.
    """

    problem: str = ""
    copies: tuple[BootRecord | None, BootRecord | None] = (None, None)
    record: BootRecord | None = None
    digests: Mapping[SlotName, str] = field(default_factory=dict)
    whole: Mapping[SlotName, str] = field(default_factory=dict)


def slot_devices(plan: Plan) -> Mapping[str, Hardware] | None:
    """The boot device, the slots and the stick of a plan by name; None if it is not updatable."""
    wanted = {BOOT, *SLOTS.values()}
    found = {each.name: each for each in plan.hardware if each.name in {*wanted, STICK}}
    return found if UPDATED in plan.by_name and wanted <= found.keys() else None


@contextmanager
def held_devices(
    state: Path, devices: Mapping[str, Hardware], *, writable: bool = True
) -> Iterator[Mapping[str, BlockDevice]]:
    """The devices as files, each held alone."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(opened(image_of(state, device), writable=writable))
            for name, device in devices.items()
        }


def boot_remains(plan: Plan, state: Path) -> BootRemains | None:
    """What is on boot device and slots; None if the system has none."""
    devices = slot_devices(plan)
    if devices is None:
        return None
    try:
        with held_devices(state, devices, writable=False) as held:
            return _read(held)
    except DeviceFault as fault:
        return BootRemains(problem=f"it cannot be read: {fault}")


def _read(held: Mapping[str, BlockDevice]) -> BootRemains:
    control = BlockBoot(held[BOOT])
    first, second = [
        each if isinstance(each, BootRecord) else None for each in finished(control.copies())
    ]
    whole = {name: held[device] for name, device in SLOTS.items()}
    contents = {name: finished(each.read(0, each.block_count)) for name, each in whole.items()}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    try:
        record = finished(control.load())
    except NoBootRecord as error:
        return BootRemains(problem=str(error), copies=(first, second), whole=sums)
    digests = {
        name: hashlib.sha256(contents[name][: record.slot(name).size]).hexdigest()
        for name in SlotName
    }
    return BootRemains(copies=(first, second), record=record, digests=digests, whole=sums)


def boot_entry(left: BootRemains) -> Mapping[str, object]:
    """What the runner read, for the run's record."""
    record = left.record
    return {
        "problem": left.problem,
        "sequences": [None if copy is None else copy.sequence for copy in left.copies],
        "digests": {name.value: digest for name, digest in left.digests.items()},
        "record": None
        if record is None
        else {
            "sequence": record.sequence,
            "active": record.active.value,
            "trying": record.trying and record.trying.value,
            "boots": record.boots,
            "floor": record.floor,
            "slots": {
                name.value: [
                    record.slot(name).state.name.lower(),
                    record.slot(name).version,
                    record.slot(name).tries_left,
                    record.slot(name).digest.hex(),
                ]
                for name in SlotName
            },
            "reasons": [
                [each.cause.name.lower(), each.slot.value, each.version, each.boot, each.service]
                for each in record.reasons
            ],
        },
    }
