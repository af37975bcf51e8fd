"""Which backend a boot device has; what the system file need not say, the device does."""

from nexus.bootctl.block import BlockBoot
from nexus.bootctl.contract import BootControl, NoBootRecord
from nexus.bootctl.environment import EnvironmentBoot
from nexus.bootctl.record import BootRecord
from nexus.drivers import BlockDevice


async def open_boot(device: BlockDevice) -> tuple[BootControl, BootRecord]:
    """The boot control of a device and its record in force.

    Raises NoBootRecord, which says of both backends why there is none, and DeviceFault.
    """
    block = BlockBoot(device)
    try:
        return block, await block.load()
    except NoBootRecord as error:
        problem = f"no record: {error}"
    environment = EnvironmentBoot(device)
    try:
        return environment, await environment.load()
    except NoBootRecord as error:
        raise NoBootRecord(f"{problem}; no U-Boot environment with one: {error}") from error


async def new_boot(device: BlockDevice) -> BootControl:
    """The boot control that a device is provisioned with: the one whose record it has, else a
    U-Boot environment that stands there, so that its variables stay, else the block.
    """
    try:
        control, _ = await open_boot(device)
    except NoBootRecord:
        environment = EnvironmentBoot(device)
        return environment if await environment.is_there() else BlockBoot(device)
    return control
