"""sd_notify(3): what the root task tells the service manager that started the run."""

import socket
from typing import Final

ABSTRACT: Final = "@"  # first character of a name outside the file system


class ServiceManager:
    """The socket of NOTIFY_SOCKET. A manager that does not listen is no fault of the system:
    what it did not take is counted."""

    __slots__ = ("_address", "missed", "told")

    def __init__(self, name: str | None) -> None:
        self._address: str | None = None
        if name:
            self._address = "\0" + name[1:] if name.startswith(ABSTRACT) else name
        self.told = 0  # notices taken
        self.missed = 0  # notices that nobody took

    def tell(self, notice: bytes) -> None:
        """Send a notice without waiting; nothing happens without a service manager, or where
        nothing is said."""
        if self._address is None or not notice:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                _ = sock.sendto(notice, flags, self._address)
        except OSError:
            self.missed += 1
        else:
            self.told += 1
