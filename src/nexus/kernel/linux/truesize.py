"""What the kernel charges a sender for a queued message of each size (SIOCOUTQ)."""

import bisect
import fcntl
import socket
from typing import Final

from nexus.kernel.linux.frames import WIRE_SIZE_MAX
from nexus.kernel.linux.native import SIOCOUTQ

TRUESIZE_SLACK: Final = 1280  # bytes; a message of n bytes is charged at most 2 n plus this


class Truesize:
    """A step function from message size to charge, learned from the running kernel.

    Steps are found by bisection: the charge never falls when the size grows.
    """

    __slots__ = ("_charges", "_sizes")

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._charges: list[int] = []
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far:
            self._learn(near, far)

    def of(self, size: int) -> int:
        """The charge for a message of `size` bytes."""
        return self._charges[bisect.bisect_right(self._sizes, size) - 1]

    def _learn(self, near: socket.socket, far: socket.socket) -> None:
        zeros = bytes(WIRE_SIZE_MAX)
        answer = bytearray(4)

        def charge(size: int) -> int:
            _ = near.send(zeros[:size])
            _ = fcntl.ioctl(near.fileno(), SIOCOUTQ, answer)
            _ = far.recv(WIRE_SIZE_MAX)
            return int.from_bytes(answer, "little")

        size = 1
        top = charge(WIRE_SIZE_MAX)
        while True:
            step = charge(size)
            self._sizes.append(size)
            self._charges.append(step)
            if step == top:
                return
            low, high = size, WIRE_SIZE_MAX
            while high - low > 1:
                middle = (low + high) // 2
                if charge(middle) == step:
                    low = middle
                else:
                    high = middle
            size = high
