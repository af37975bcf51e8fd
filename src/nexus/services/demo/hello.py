"""demo.hello: a program that execd starts, and that answers for itself.

Owns nothing. It exists so that the proof ladder sees a child speak on its own line of the console
and over its own link; the line of the console is historical, the program is no ELF.
"""

import json
from typing import Final

from nexus.abi import BootImage, ConsoleWrite
from nexus.protocols.execd import Variable
from nexus.protocols.hello import PROTOCOL, Greeting, HelloRequest
from nexus.runtime import Call
from nexus.runtime.program import Context, program_of

LINE: Final = "child: hello-elf"


class Hello:
    """Serves nexus.protocols.hello."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._arguments: list[str] = context.settings.get("arguments", [])
        self._environment: dict[str, str] = context.settings.get("environment", {})
        self._has_spoken = False

    async def handle(self, _call: Call, _request: HelloRequest) -> Greeting:
        """The greeting; the first one is told on the console, by the pid that the kernel gave.

        Whoever asks knows from execd that this runs, and execd has said so before: told at the
        start, the two lines would race.
        """
        boot = self._context.boot
        if not self._has_spoken:
            self._has_spoken = True
            evidence = {
                "pid": boot.pid,
                "generation": boot.generation,
                "arguments": self._arguments,
            }
            await ConsoleWrite(LINE, json.dumps(evidence).encode())
        variables = [Variable(key, value) for key, value in self._environment.items()]
        return Greeting(boot.pid, boot.generation, self._arguments, variables)


async def main(boot: BootImage) -> int:
    """Serve until init says Stop."""
    return await program_of(Hello, PROTOCOL)(boot)
