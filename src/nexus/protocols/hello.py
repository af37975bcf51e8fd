"""demo.hello protocol: a started child answers for itself."""

from typing import Annotated, Final, TypeAlias

from nexus.protocols.execd import (
    ARGUMENT_SIZE_MAX,
    ARGUMENTS_MAX,
    ENVIRONMENT_MAX,
    Variable,
)
from nexus.wire import U32, List, Message, Protocol, Request, Text


class Greeting(Message):
    """Who the child is by the kernel's word, and what it was started with."""

    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    arguments: Annotated[
        list[Annotated[str, Text(size_max=ARGUMENT_SIZE_MAX)]], List(count_max=ARGUMENTS_MAX)
    ]
    environment: Annotated[list[Variable], List(count_max=ENVIRONMENT_MAX)]


class Greet(Request[Greeting], op=1, idempotent=True):
    """Who are you?"""


HelloRequest: TypeAlias = Greet
PROTOCOL: Final = Protocol("hello", number=15, version=1, requests=(Greet,))
