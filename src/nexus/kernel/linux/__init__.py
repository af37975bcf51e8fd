"""The Linux kernel backend: the same promises kept by processes, sockets and memfds."""

from nexus.kernel.linux.kernel import LinuxKernel

__all__ = ["LinuxKernel"]
