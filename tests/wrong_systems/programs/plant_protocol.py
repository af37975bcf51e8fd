"""What a valve is asked."""

from typing import Annotated, Final

from nexus.wire import U8, Message, Protocol, Request


class Opened(Message):
    """How far it is open now."""

    percent: Annotated[int, U8(maximum=100)]


class Open(Request[Opened], op=1, idempotent=True):
    """Open it so far."""

    percent: Annotated[int, U8(maximum=100)]


PROTOCOL: Final = Protocol("plant", number=1000, version=1, requests=(Open,))
