"""What metadata may measure. Each limit is applied before what it bounds is parsed."""

from typing import Final

ROOT_SIZE_MAX: Final = 16 * 1024  # bytes; the area of the anchor on the boot device
TIMESTAMP_SIZE_MAX: Final = 8 * 1024  # bytes; it names one file
SNAPSHOT_SIZE_MAX: Final = 8 * 1024  # bytes; it names one file
TARGETS_SIZE_MAX: Final = 16 * 1024  # bytes; it names one set
ROOTS_MAX: Final = 32  # of one update file; a root changes when keys do, about once a year
KEYS_MAX: Final = 32  # of one root, for all four roles
SIGNATURES_MAX: Final = 16  # of one file; verified in tens of microseconds each
NAME_SIZE_MAX: Final = 48  # bytes of a set's name, as in the boot record
DEPTH_MAX: Final = 8  # of JSON in JSON; what TUF defines takes 5
NUMBER_MAX: Final = (1 << 62) - 1  # of versions and moments; the boot record counts as far
METADATA_SIZE_MAX: Final = 576 * 1024  # bytes of the section of an update file

assert (
    ROOTS_MAX * ROOT_SIZE_MAX + TIMESTAMP_SIZE_MAX + SNAPSHOT_SIZE_MAX + TARGETS_SIZE_MAX + 4096
    <= METADATA_SIZE_MAX
), "an update file with as much as may be in it"
assert METADATA_SIZE_MAX <= 1 << 20, "the section fits one VMO of updated's"
