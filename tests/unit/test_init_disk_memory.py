"""The memory that a plan gives the holder of a disk is what the engine may need of it."""

import pytest

from nexus.abi import BLOCK_SIZE, Grants, HardwareGrant, HardwareKind
from nexus.init.system import memory_of
from nexus.kernel.core import Hardware
from nexus.services.statefsd.engine.layout import memory_needed

PYTHON_ROOM = 24 << 20  # bytes that an interpreter takes beside the store


@pytest.mark.parametrize("mib", [1, 4, 16, 64, 256, 1024])
def test_the_plan_leaves_room_for_the_store_of_any_disk(mib: int) -> None:
    size = mib << 20
    grants = Grants(hardware=(HardwareGrant("disk", HardwareKind.BLOCK),))
    planned = memory_of(grants, {"disk": Hardware("disk", HardwareKind.BLOCK, size)})

    assert planned >= memory_needed(size // BLOCK_SIZE) + PYTHON_ROOM
