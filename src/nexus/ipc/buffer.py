"""Replies that arrived before somebody asked for them, bounded in number and in bytes."""

from typing import NamedTuple

from nexus.abi import Message


class Push(NamedTuple):
    """What became of a pushed reply. Whoever pushes owns the capabilities of `evicted`."""

    kept: bool
    evicted: tuple[Message, ...]


class ReplyBuffer:
    """Keeps replies by nonce. The oldest give way; each that is lost counts one drop.

    A second reply for a nonce is refused (the first is kept), and so is one larger than the
    whole buffer.
    """

    __slots__ = ("_replies", "_size", "count_max", "drops", "size_max")

    def __init__(self, count_max: int, size_max: int) -> None:
        assert count_max >= 1
        self.count_max = count_max
        self.size_max = size_max
        self.drops = 0
        self._replies: dict[int, Message] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._replies)

    def __contains__(self, nonce: int) -> bool:
        return nonce in self._replies

    @property
    def size(self) -> int:
        """Bytes kept now."""
        return self._size

    def push(self, nonce: int, reply: Message) -> Push:
        """Keep `reply` until it is taken, evicting the oldest ones if there is no room."""
        size = len(reply.data)
        if nonce in self._replies or size > self.size_max:
            self.drops += 1
            return Push(kept=False, evicted=())
        evicted = []
        while len(self._replies) >= self.count_max or self._size + size > self.size_max:
            evicted.append(self._evict())
        self._replies[nonce] = reply
        self._size += size
        return Push(kept=True, evicted=tuple(evicted))

    def take(self, nonce: int) -> Message | None:
        """The reply kept for `nonce`, which leaves the buffer; None if there is none."""
        reply = self._replies.pop(nonce, None)
        if reply is not None:
            self._size -= len(reply.data)
        return reply

    def _evict(self) -> Message:
        oldest = next(iter(self._replies))
        self.drops += 1
        reply = self.take(oldest)
        assert reply is not None
        return reply
