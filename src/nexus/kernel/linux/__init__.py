"""The Linux kernel backend: the same promises kept by processes, sockets and memfds."""

from nexus.kernel.linux.kernel import LinuxKernel
from nexus.kernel.linux.report import Guarantee, State, hardening_report

__all__ = ["Guarantee", "LinuxKernel", "State", "hardening_report"]
