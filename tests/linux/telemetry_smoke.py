"""Killed writers on the machine that runs this, with the kernel's barrier: a smoke test.

`tools/aarch64.py` runs it on an emulated aarch64. Writer and reader are two processes that share
memory. Prints what was counted; 1 if anything read was never written, if what is to be tested did
not happen, or if a broken writer is not found.
"""

import platform
import sys
from collections import Counter
from typing import Final

from nexus.kernel.linux.native import (
    MEMBARRIER_GLOBAL_EXPEDITED,
    MEMBARRIER_REGISTER_GLOBAL_EXPEDITED,
    membarrier,
)
from tests.linux.killed_writers import (
    NEEDED,
    PageWatch,
    Plan,
    RingWatch,
    WatchOf,
    Write,
    Wrong,
    campaign,
    write_page,
    write_page_count_last,
    write_page_state_first,
    write_ring,
    write_ring_commit_first,
)

HONEST: Final[dict[str, tuple[Write, WatchOf]]] = {
    "ring": (write_ring, RingWatch),
    "page": (write_page, PageWatch),
}
BROKEN: Final[dict[str, tuple[Write, WatchOf]]] = {
    "ring, commit before the record": (write_ring_commit_first, RingWatch),
    "page, count of a group last": (write_page_count_last, PageWatch),
    "page, state before the span": (write_page_state_first, PageWatch),
}


def fence() -> None:
    """A barrier on every CPU that a registered process runs on; the writers inherit that."""
    _ = membarrier(MEMBARRIER_GLOBAL_EXPEDITED)


PLAN: Final = Plan(kills=200, life_least=0.005, life_most=0.050, seed=1, fence=fence)


def tell(line: str) -> None:
    """Print it at once: whoever is forked later has nothing left to print."""
    _ = sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def honest(name: str) -> bool:
    """Whether all that was read is true, and all that is needed happened."""
    counts: Counter[str] = Counter()
    try:
        campaign(*HONEST[name], PLAN, counts)
    except Wrong as fault:
        tell(f"{name}: WRONG after {counts['writers']} kills: {fault}")
        return False
    missing = [each for each in NEEDED[name] if not counts[each]]
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    tell(f"{name}: {told}: {f'NOT TESTED: {missing}' if missing else 'all true, in order'}")
    return not missing


def broken(name: str) -> bool:
    """Whether the same watch finds the broken writer."""
    counts: Counter[str] = Counter()
    try:
        campaign(*BROKEN[name], PLAN, counts)
    except Wrong as fault:
        tell(f"broken writer ({name}): found after {counts['writers']} kills: {fault}")
        return True
    tell(f"broken writer ({name}): NOT FOUND after {counts['writers']} kills")
    return False


def main() -> int:
    """Run all of it."""
    _ = membarrier(MEMBARRIER_REGISTER_GLOBAL_EXPEDITED)
    version = f"{platform.python_implementation()} {platform.python_version()}"
    tell(f"inside: {platform.machine()}, {version}, {' '.join(platform.libc_ver())}; membarrier(2)")
    results = [*map(honest, HONEST), *map(broken, BROKEN)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
