"""Values that options have when nobody gives them, wherever the command line is read."""

from typing import Final

WAIT_DEFAULT: Final = 30.0  # seconds for a system to get ready in: a loaded machine's time, doubled
TRIES_DEFAULT: Final = 2  # boots of a trial; tests/unit compares it with updated's own
TRIES_MAX: Final = 16
ROOT_DAYS: Final = 1825  # of a root: five years, in which its keys should change anyway
RELEASE_DAYS: Final = 365  # of a release; a device that missed it that long takes the next one
VM_MEMORY: Final = 512  # MiB of a guest; tests/unit compares it with nexus.vm.qemu's own
