"""A protocol with a number that is not for systems to give."""

from typing import Final

from nexus.wire import Message, Protocol, Request


class Done(Message):
    """That is all."""


class Do(Request[Done], op=1, idempotent=True):
    """Do it."""


PROTOCOL: Final = Protocol("low", number=999, version=1, requests=(Do,))
