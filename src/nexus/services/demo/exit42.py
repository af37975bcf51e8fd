"""demo.exit42: a program that execd starts, and that crashes: it ends with a code of its own."""

import json
from typing import Final

from nexus.abi import BootImage, ConsoleWrite, Nanos
from nexus.ipc import deadline_after
from nexus.protocols.hello import PROTOCOL, HelloRequest
from nexus.runtime import Call, Refusal, Server, ServiceConfig
from nexus.runtime.program import Context
from nexus.wire import ReplyStatus

LINE: Final = "child: exit42 start"
LAST_WORDS: Final = "about to end with 42"
CODE: Final = 42
BIND_MAX: Final = Nanos(2_000_000_000)  # ns for init's Bind, so that it has a way to logd


class _Nothing:
    """It serves nobody; the runtime answers init's Bind."""

    def handle(self, _call: Call, _request: HelloRequest) -> None:
        """Every request is refused."""
        raise Refusal(ReplyStatus.BUSY)


async def main(boot: BootImage) -> int:
    """Say that it runs, write a last line into its log, and end as no program should."""
    context = Context(boot, ServiceConfig.of(boot))
    server = Server(_Nothing(), PROTOCOL, boot, context.peers.caller, log=context.log)
    _ = await server.step(deadline_after(boot.now, BIND_MAX))
    await context.take_links()
    await context.log.flush()
    evidence = {"pid": boot.pid, "generation": boot.generation}
    await ConsoleWrite(LINE, json.dumps(evidence).encode())
    context.log.error(LAST_WORDS, code=CODE)
    return CODE
