"""Echo protocol of the benchmark: a small read, 64-odd bytes of frame each way."""

from typing import Annotated, Final

from nexus.wire import U32, Blob, Bool, Message, Protocol, Request, Text

KEY_SIZE_MAX: Final = 32  # characters
DATA_SIZE_MAX: Final = 64  # bytes

BENCH_KEY: Final = "k" * 16
BENCH_DATA: Final = b"d" * 24


class Data(Message):
    """What was found."""

    ok: Annotated[bool, Bool()]
    data: Annotated[bytes, Blob(size_max=DATA_SIZE_MAX)]


class Read(Request[Data], op=1, idempotent=True):
    """Read `size` bytes at `offset` of `key`."""

    key: Annotated[str, Text(size_max=KEY_SIZE_MAX)]
    offset: Annotated[int, U32()]
    size: Annotated[int, U32()]


PROTOCOL: Final = Protocol("echo", number=4, version=1, requests=(Read,))
