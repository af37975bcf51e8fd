"""demo.exit0: a program that execd starts, and that ends as it should."""

import json
from typing import Final

from nexus.abi import BootImage, ConsoleWrite

LINE: Final = "child: exit0 start"
CODE: Final = 0


async def main(boot: BootImage) -> int:
    """Say that it runs, by the pid that the kernel gave it, and end."""
    evidence = {"pid": boot.pid, "generation": boot.generation}
    await ConsoleWrite(LINE, json.dumps(evidence).encode())
    return CODE
