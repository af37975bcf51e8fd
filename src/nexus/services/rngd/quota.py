"""How much a client may draw: bytes in a window of time, for a bounded number of clients."""

from collections import OrderedDict

from nexus.abi import Nanos, ServiceId


class Quota:
    """The windows of the latest clients; the least recently seen is forgotten.

    A service is one client through all its restarts. A window begins with a client's first charge
    after its last window ended.
    """

    def __init__(self, window: Nanos, size_max: int, clients_max: int) -> None:
        self._window = window
        self._size_max = size_max
        self._clients_max = clients_max
        self._charged: OrderedDict[ServiceId, tuple[Nanos, int]] = OrderedDict()  # begin, bytes

    def __len__(self) -> int:
        return len(self._charged)

    def charge(self, client: ServiceId, size: int, now: Nanos) -> bool:
        """Take `size` bytes from what `client` has left; False takes nothing."""
        begin, spent = self._charged.get(client, (now, 0))
        if now - begin >= self._window:
            begin, spent = now, 0
        granted = spent + size <= self._size_max
        self._charged[client] = (begin, spent + size if granted else spent)
        self._charged.move_to_end(client)
        if len(self._charged) > self._clients_max:
            _ = self._charged.popitem(last=False)
        return granted
