"""A service of one's own that keeps a number on a disk: the smallest there is."""

from typing import Annotated, Final, assert_never

from nexus.abi import BLOCK_SIZE
from nexus.drivers import VirtioBlock, open_block
from nexus.drivers.kernel_block import KernelBlock
from nexus.runtime import Call
from nexus.runtime.program import Context
from nexus.wire import U32, Blob, Message, Protocol, Request


class Kept(Message):
    """What is on the disk, and which boot this is."""

    value: Annotated[int, U32()]
    boot: Annotated[int, U32()]
    boot_id: Annotated[bytes, Blob(size_max=16)]


class Look(Request[Kept], op=1, idempotent=True):
    """What is kept."""


class Keep(Request[Kept], op=2, idempotent=True):
    """Write a number down; it outlives a power cut if `durable`."""

    value: Annotated[int, U32()]
    durable: bool


KeeperRequest = Look | Keep
PROTOCOL: Final = Protocol("keeper", number=1901, version=1, requests=(Look, Keep))


class Keeper:
    """Serves PROTOCOL."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._disk: VirtioBlock | KernelBlock

    async def start(self) -> None:
        (slot,) = self._context.boot.hardware
        self._disk = await open_block(slot)

    async def handle(self, _call: Call, request: KeeperRequest) -> Kept:
        match request:
            case Look():
                pass
            case Keep():
                data = request.value.to_bytes(BLOCK_SIZE, "little")
                await self._disk.write(0, data, durable=request.durable)
            case _:
                assert_never(request)
        block = await self._disk.read(0, 1)
        config = self._context.config
        return Kept(int.from_bytes(block[:4], "little"), config.boot, config.boot_id)
