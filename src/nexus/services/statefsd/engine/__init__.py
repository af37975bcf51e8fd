"""The storage engine of statefsd: keys and values on a block device, through every power cut.

No clock, no randomness, no I/O but the device's: docs/reference/statefs-format.md says what
stands where.
"""

from nexus.services.statefsd.engine.checkpoint import Entry
from nexus.services.statefsd.engine.errors import (
    Damaged,
    Lost,
    OverQuota,
    ReadOnly,
    StoreFull,
    Unopenable,
)
from nexus.services.statefsd.engine.layout import FORMAT_VERSION, memory_needed
from nexus.services.statefsd.engine.limits import Quota, StoreLimits
from nexus.services.statefsd.engine.store import Applied, Change, Store, Usage

__all__ = [
    "FORMAT_VERSION",
    "Applied",
    "Change",
    "Damaged",
    "Entry",
    "Lost",
    "OverQuota",
    "Quota",
    "ReadOnly",
    "Store",
    "StoreFull",
    "StoreLimits",
    "Unopenable",
    "Usage",
    "memory_needed",
]
