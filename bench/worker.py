"""One variant in a process of its own: `python -m bench.worker NAME CLIENT SERVER SECONDS`.

Prints one JSON line, a Sample or a Skipped. A fresh process per run keeps one variant's
frozen heap, imports and hardening away from the next.
"""

import sys
from collections.abc import Callable

import msgspec

from bench.measure import Placement, Sample, Skipped, UnavailableError
from bench.peers import PEERS


def find(name: str) -> Callable[[Placement, float], Sample]:
    """The function that runs a variant. Ours are imported only when asked for."""
    if name in PEERS:
        return PEERS[name]
    from bench.ours import OURS

    return OURS[name]


def main(arguments: list[str]) -> int:
    """Run one variant and print what it measured."""
    name, client, server, seconds = arguments
    result: Sample | Skipped
    try:
        result = find(name)(Placement(client=int(client), server=int(server)), float(seconds))
    except UnavailableError as error:
        result = Skipped(str(error))
    print(msgspec.json.encode(result).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
