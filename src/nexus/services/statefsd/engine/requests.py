"""Which requests were applied: the latest of each client, of the clients heard of last."""

from collections.abc import Iterator


class Requests:
    """At most `kept` request ids of each of `clients` clients."""

    def __init__(self, clients: int, kept: int) -> None:
        self._clients_max = clients
        self._kept = kept
        self._clients: dict[int, dict[int, int]] = {}  # client -> request id -> sequence

    def find(self, client: int, request_id: int) -> int | None:
        """The sequence with which a request was applied."""
        known = self._clients.get(client)
        return known.get(request_id) if known is not None else None

    def add(self, client: int, request_id: int, sequence: int) -> None:
        """A request was applied. The client counts as heard of last."""
        known = self._clients.pop(client, None)
        if known is None:
            known = {}
            if len(self._clients) >= self._clients_max:
                del self._clients[next(iter(self._clients))]
        self._clients[client] = known
        known[request_id] = sequence
        if len(known) > self._kept:
            del known[next(iter(known))]

    @property
    def count(self) -> int:
        """Request ids that are remembered."""
        return sum(map(len, self._clients.values()))

    def packed(self, kept: int) -> list[tuple[int, list[int]]]:
        """The latest `kept` of each client, as `load` takes them."""
        return [
            (client, [number for pair in list(known.items())[-kept:] for number in pair])
            for client, known in self._clients.items()
            if kept
        ]

    def load(self, packed: list[tuple[int, list[int]]]) -> None:
        """Take what `packed` gave."""
        for client, numbers in packed:
            for request_id, sequence in _pairs(numbers):
                self.add(client, request_id, sequence)


def _pairs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    return zip(numbers[::2], numbers[1::2], strict=False)
