"""Every check of a rung's evidence, by number."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from nexus.proof import (
    checks,
    checks_devices,
    checks_exec,
    checks_export,
    checks_keys,
    checks_observe,
    checks_ota,
    checks_state,
)
from nexus.proof.verdict import Check

EVERY_CHECK: Final[Mapping[int, Check]] = MappingProxyType(
    {
        **checks.CHECKS,
        **checks_devices.CHECKS,
        **checks_state.CHECKS,
        **checks_keys.CHECKS,
        **checks_exec.CHECKS,
        **checks_export.CHECKS,
        **checks_observe.CHECKS,
        **checks_ota.CHECKS,
    }
)
