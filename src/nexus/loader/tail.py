"""What a boot that failed is remembered by: of its console as many lines as a record keeps.

The end of a console is how the system was stopped, and before that many services are started: the
last words of the one at fault would be pushed out. So they have a share of their own.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from nexus.bootctl import TAIL_SIZE_MAX

FAILED: Final = "init: slot failed"  # init's line about its verdict; the rest is the way down
OWN_SHARE: Final = TAIL_SIZE_MAX // 2  # bytes for the lines of the service at fault
LINE_SIZE_MAX: Final = 200  # bytes of one line, so that several have room


class ConsoleLine(NamedTuple):
    """A line of a console: who wrote it, and all of it."""

    name: str
    text: str


def last_words(lines: Iterable[ConsoleLine], service: str) -> str:
    """The lines to keep of a boot, in their order, at most TAIL_SIZE_MAX bytes of UTF-8.

    Up to OWN_SHARE of them are the last ones of `service` ("" for none), the others the last of
    all before init's verdict.
    """
    seen: list[ConsoleLine] = []
    for line in lines:
        seen.append(line)
        if FAILED in line.text:
            break
    sizes = [min(len(line.text.encode()), LINE_SIZE_MAX) + 1 for line in seen]
    kept: set[int] = set()
    room = TAIL_SIZE_MAX
    for at in reversed(range(len(seen))):
        if service and seen[at].name == service and room - sizes[at] >= TAIL_SIZE_MAX - OWN_SHARE:
            kept.add(at)
            room -= sizes[at]
    for at in reversed(range(len(seen))):
        if at in kept:
            continue
        if sizes[at] > room:
            break
        kept.add(at)
        room -= sizes[at]
    return "\n".join(_cut(seen[at].text) for at in sorted(kept))


def _cut(text: str) -> str:
    return text.encode()[:LINE_SIZE_MAX].decode("utf-8", "ignore")
