"""Saboteurs of statefsd's rungs: 19, 20, 34, 50 and 100-106."""

from collections.abc import Collection
from functools import partial
from typing import Any, Final

from nexus.abi import BLOCK_SIZE, DMA_PAGES, HardwareKind
from nexus.drivers import BlockDevice, VirtioBlock
from nexus.drivers.virtio import DEVICE_ID, DRIVER_FEATURES, DRIVER_FEATURES_SELECT
from nexus.ipc import bulk
from nexus.kernel.linux.devices import Registers
from nexus.kernel.sim.virtio import Transport
from nexus.proof.plants_init import missing, withheld
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.ladder import Ground
from nexus.runtime.program import Context
from nexus.services.selftest.state_rungs import KEPT_KEY
from nexus.services.statefsd.engine import (
    Applied,
    Change,
    Entry,
    Store,
    StoreLimits,
    checkpoint,
    journal,
)
from nexus.services.statefsd.service import Statefsd

BOTH: Final = frozenset(Ground)
SIM: Final = frozenset({Ground.SIM})
VM: Final = frozenset({Ground.VM})
STATEFSD: Final = "statefsd"
WIPE_BLOCKS: Final = DMA_PAGES  # of one write


class _Ram:
    """drivers.BlockDevice that forgets everything with its owner."""

    writable: Final = True

    def __init__(self, block_count: int) -> None:
        self.block_count = block_count
        self._data = bytearray(block_count * BLOCK_SIZE)

    async def read(self, block: int, count: int) -> bytes:
        return bytes(self._data[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE])

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        del durable
        self._data[block * BLOCK_SIZE : block * BLOCK_SIZE + len(data)] = data

    async def flush(self) -> None:
        """There is nothing to flush to."""


def _opened(around: Any) -> None:
    """Have `around` open the store in the place of Store.open, which it is given."""
    original = Store.open

    async def opened(_class: type[Store], device: BlockDevice, limits: StoreLimits) -> Store:
        store: Store = await around(original, device, limits)
        return store

    _ = replace(Store, "open", classmethod(opened))


def _store_on_ram() -> None:
    """#34: the disk was probed, and is not used."""

    async def around(original: Any, device: BlockDevice, limits: StoreLimits) -> Any:
        return await original(_Ram(device.block_count), limits)

    _opened(around)


def _modern_not_negotiated() -> None:
    """#50: the upper half of what statefsd's driver accepts never reaches the disk, which makes
    nothing of it."""

    def accept(transport: Transport, value: int) -> None:
        disk = transport.device_id == HardwareKind.BLOCK
        if not (disk and transport._driver_select):  # noqa: SLF001 (what is private is broken)
            original(transport, value)

    def agrees(transport: Transport) -> bool:
        agreed: bool = original_agrees(transport)
        return agreed or transport.device_id == HardwareKind.BLOCK

    original = replace(Transport, "_accept", accept)
    original_agrees = replace(Transport, "_agrees", agrees)


def _modern_not_negotiated_vm() -> None:
    """#50: the same where the disk is QEMU's, which hears of the lower half alone."""
    upper: set[int] = set()  # windows of which that half is selected

    def write(registers: Registers, offset: int, value: int) -> None:
        is_disk = registers.read(DEVICE_ID) == HardwareKind.BLOCK
        if offset == DRIVER_FEATURES_SELECT:
            upper.add(id(registers)) if value else upper.discard(id(registers))
        elif offset == DRIVER_FEATURES and is_disk and id(registers) in upper:
            value = 0
        original(registers, offset, value)

    original = replace(Registers, "write", write)


def _newest_not_listed() -> None:
    """#100."""
    newest: list[bytes] = []

    def stage(store: Store, changes: Any, **options: Any) -> Applied:
        kept = list(changes)
        newest[:] = [change.key for change in kept[-1:]]
        applied: Applied = original_stage(store, kept, **options)
        return applied

    def keys(store: Store, *arguments: Any) -> tuple[list[bytes], bool]:
        found, more = original(store, *arguments)
        return [key for key in found if key not in newest], more

    original_stage = replace(Store, "stage", stage)
    original = replace(Store, "keys", keys)


def _everything_listed() -> None:
    """#101."""

    async def visible(_service: Statefsd, _call: Any, areas: Collection[bytes]) -> set[bytes]:
        return set(areas)

    _ = replace(Statefsd, "_visible", visible)


def _offset_ignored() -> None:
    """#102."""

    async def fault_of(cap: Any, _offset: int, length: int) -> Any:
        return await original(cap, 0, length)

    original = replace(bulk, "_fault_of", fault_of)


def _only_in_memory() -> None:
    """#103: one value is kept by the instance alone, and called durable."""
    kept: dict[int, Entry] = {}  # by store

    def stage(store: Store, changes: Any, **options: Any) -> Applied:
        wanted = list(changes)
        (first, *_) = wanted
        if isinstance(first, Change) and first.key == KEPT_KEY and first.value is not None:
            kept[id(store)] = Entry(first.value, store.sequence)
            return Applied(store.sequence, repeated=False)
        applied: Applied = original(store, wanted, **options)
        return applied

    async def get(store: Store, key: bytes) -> Entry | None:
        if key == KEPT_KEY and id(store) in kept:
            return kept[id(store)]
        found: Entry | None = await original_get(store, key)
        return found

    original = replace(Store, "stage", stage)
    original_get = replace(Store, "get", get)


def _made_anew() -> None:
    """#104: from the second boot on the first instance of statefsd finds an empty disk."""
    anew = [False]

    def settings_as(context: Context, kind: type) -> Any:
        if context.name == STATEFSD:
            anew[0] = context.config.boot > 0 and context.generation == 1
        return original(context, kind)

    async def around(open_store: Any, device: BlockDevice, limits: StoreLimits) -> Any:
        if anew[0]:
            for block in range(0, device.block_count, WIPE_BLOCKS):
                count = min(WIPE_BLOCKS, device.block_count - block)
                await device.write(block, bytes(count * BLOCK_SIZE))
        return await open_store(device, limits)

    original = replace(Context, "settings_as", settings_as)
    _opened(around)


def _never_flushed() -> None:
    """#105: what was written is never made durable."""

    async def flush(_device: object) -> None:
        """Leave it out."""

    async def write(device: Any, block: int, data: Any, *, durable: bool = False) -> None:
        del durable
        await original(device, block, data)

    _ = replace(VirtioBlock, "flush", flush)
    original = replace(VirtioBlock, "write", write)


def _checksum_not_compared() -> None:
    """#106."""
    for module in (journal, checkpoint):
        _ = replace(module, "has_whole_value", lambda *_arguments: True)


SABOTEURS: Final = (
    Saboteur(rung=19, grounds=BOTH, plant=partial(missing, STATEFSD)),
    Saboteur(rung=20, grounds=BOTH, plant=partial(withheld, STATEFSD)),
    Saboteur(rung=34, grounds=BOTH, plant=_store_on_ram),
    Saboteur(rung=50, grounds=SIM, plant=_modern_not_negotiated),
    Saboteur(rung=50, grounds=VM, plant=_modern_not_negotiated_vm),
    Saboteur(rung=100, grounds=BOTH, plant=_newest_not_listed),
    Saboteur(rung=101, grounds=BOTH, plant=_everything_listed),
    Saboteur(rung=102, grounds=BOTH, plant=_offset_ignored),
    Saboteur(rung=103, grounds=BOTH, plant=_only_in_memory),
    Saboteur(rung=104, grounds=BOTH, plant=_made_anew),
    Saboteur(rung=105, grounds=SIM | VM, plant=_never_flushed),
    Saboteur(rung=106, grounds=BOTH, plant=_checksum_not_compared),
)
