"""What a saboteur breaks where the boot-control record is written: in the loader and in updated."""

# ruff: noqa: SLF001 (saboteurs break what is private)

from nexus.bootctl import BlockBoot, BootRecord
from nexus.bootctl.anchor import write_back
from nexus.bootctl.block import COPIES, encode_record
from nexus.proof.sabotage import replace


def one_copy() -> None:
    """#138: the record is written to the first copy alone, by whoever writes it."""

    async def put(boot: BlockBoot, _first: int, record: BootRecord) -> BootRecord:
        await write_back(boot._device, COPIES[0], encode_record(record))
        boot._loaded = (0, record.sequence)
        return record

    _ = replace(BlockBoot, "_put", put)
