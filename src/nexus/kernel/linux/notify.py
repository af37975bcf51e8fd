"""sd_notify(3): what the root task tells the service manager that started the run, or, where there
is none above init, the watchdog of the machine.
"""

import os
import socket
from typing import Final

ABSTRACT: Final = "@"  # first character of a name outside the file system
ALIVE: Final = b"WATCHDOG=1"  # the notice that init works
KEEPALIVE: Final = b"\0"  # any byte but V, Documentation/watchdog/watchdog-api.rst


class ServiceManager:
    """The socket of NOTIFY_SOCKET, and an open /dev/watchdog (-1 for none), which only hears that
    init works. A manager that does not listen is no fault of the system: what it did not take is
    counted."""

    __slots__ = ("_address", "_watchdog", "missed", "told")

    def __init__(self, name: str | None, watchdog: int = -1) -> None:
        self._watchdog = watchdog
        self._address: str | None = None
        if name:
            self._address = "\0" + name[1:] if name.startswith(ABSTRACT) else name
        self.told = 0  # notices taken
        self.missed = 0  # notices that nobody took

    def tell(self, notice: bytes) -> None:
        """Send a notice without waiting; nothing happens without a service manager, or where
        nothing is said."""
        if self._watchdog >= 0 and notice == ALIVE:
            self._keep_alive()
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

    def _keep_alive(self) -> None:
        try:
            _ = os.write(self._watchdog, KEEPALIVE)
        except OSError:
            self.missed += 1
        else:
            self.told += 1
