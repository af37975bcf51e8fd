"""Bytes that nobody prints, kept no longer than they are needed.

What CPython allows: a Secret is a bytearray, which is overwritten in place. What it does not: the
bytes objects that a frame, the kernel's reply or a library hands us cannot be overwritten; they
are dropped at once, and their memory is reused without being cleared first. What remains is
covered by the process: it leaves no core, and nobody but root may read its memory.
"""

from types import TracebackType
from typing import Final, NoReturn, Self

HIDDEN: Final = "Secret"


class Secret:
    """Wiped by `wipe`, or at the end of a `with`. It has no text, no copy and no pickle."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = bytearray(data)

    @property
    def data(self) -> bytearray:
        """The bytes themselves, for who computes with them; never kept, never shown."""
        return self._data

    def wipe(self) -> None:
        """Overwrite it. The size stays; whoever still uses it computes with zeros."""
        self._data[:] = bytes(len(self._data))

    def __len__(self) -> int:
        return len(self._data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return HIDDEN

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not copied")
