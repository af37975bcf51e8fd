"""Why updated declines, on its way to being a status."""

from collections.abc import Mapping
from typing import Final

from nexus.bootctl import BootStatus
from nexus.drivers import DeviceFault
from nexus.protocols.updated import DETAIL_SIZE_MAX, UpdatedStatus
from nexus.trust import TrustStatus


class Declined(Exception):
    """What was asked for is not done; `detail` is one sentence for people."""

    def __init__(self, status: UpdatedStatus, detail: str) -> None:
        super().__init__(f"{status.name}: {detail}")
        self.status = status
        self.detail = detail[:DETAIL_SIZE_MAX]


OF_TRUST: Final[Mapping[TrustStatus, UpdatedStatus]] = {
    TrustStatus.MALFORMED: UpdatedStatus.MALFORMED_METADATA,
    TrustStatus.TRUNCATED: UpdatedStatus.METADATA_TRUNCATED,
    TrustStatus.TOO_LARGE: UpdatedStatus.METADATA_TOO_LARGE,
    TrustStatus.TOO_MANY: UpdatedStatus.METADATA_TOO_MANY,
    TrustStatus.DUPLICATE: UpdatedStatus.METADATA_DUPLICATE,
    TrustStatus.WRONG_KEY: UpdatedStatus.WRONG_KEY,
    TrustStatus.BAD_SIGNATURE: UpdatedStatus.BAD_SIGNATURE,
    TrustStatus.THRESHOLD: UpdatedStatus.THRESHOLD,
    TrustStatus.MIXED: UpdatedStatus.MIXED,
    TrustStatus.REPLAYED: UpdatedStatus.REPLAYED,
    TrustStatus.ROLLED_BACK: UpdatedStatus.ROLLED_BACK,
    TrustStatus.EXPIRED: UpdatedStatus.EXPIRED_METADATA,
    TrustStatus.BELOW_FLOOR: UpdatedStatus.BELOW_FLOOR,
    TrustStatus.DEVELOPMENT_KEY: UpdatedStatus.DEVELOPMENT_KEY,
    TrustStatus.NO_SET: UpdatedStatus.NO_SET,
    TrustStatus.DEVICE: UpdatedStatus.NO_ANCHOR,
}
"""Each kind of untrusted metadata has a status of its own."""

OF_BOOT: Final[Mapping[BootStatus, UpdatedStatus]] = {
    BootStatus.TRIAL_PENDING: UpdatedStatus.PENDING,
    BootStatus.UNPROVEN: UpdatedStatus.UNPROVEN,
    BootStatus.RESTORING: UpdatedStatus.RESTORING,
    BootStatus.NOT_STAGED: UpdatedStatus.NOT_STAGED,
    BootStatus.NOT_TRYING: UpdatedStatus.NOT_ON_TRIAL,
    BootStatus.OTHER_SLOT: UpdatedStatus.NOT_ON_TRIAL,
    BootStatus.BELOW_FLOOR: UpdatedStatus.BELOW_FLOOR,
    BootStatus.NO_SLOT: UpdatedStatus.NO_TARGET,
}
"""What is missing here is a bug of ours where it comes up."""

assert set(OF_TRUST) == set(TrustStatus)


def device_failed(what: str, fault: DeviceFault) -> Declined:
    """A slot or the boot device failed."""
    return Declined(UpdatedStatus.IO_ERROR, f"{what}: {fault}")
