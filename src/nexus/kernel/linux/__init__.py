"""The Linux kernel backend: the same promises kept by processes, sockets and memfds.

Its names are imported when they are asked for: a service's own interpreter needs none of them.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from nexus.kernel.linux.kernel import LinuxKernel
    from nexus.kernel.linux.report import Guarantee, State, hardening_report

__all__ = ["Guarantee", "LinuxKernel", "State", "hardening_report"]

_HOMES: Final = {
    "Guarantee": "nexus.kernel.linux.report",
    "LinuxKernel": "nexus.kernel.linux.kernel",
    "State": "nexus.kernel.linux.report",
    "hardening_report": "nexus.kernel.linux.report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
