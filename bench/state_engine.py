"""The measurements of bench/state, in processes of their own.

    python -m bench.state_engine measure FOLDER ROUNDS SECONDS
    python -m bench.state_engine open NAME FOLDER

Both print one line of JSON. The stores take turns within a round, and within each turn one puts a
few times before the next does, so that all see the same disk and the same neighbours.
"""

import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.memory import memory_of
from bench.stores import GROUP, KEYS, STORES, VALUE_SIZE, Peer, key_of

TURN: Final = 16  # puts of a store before the next one's turn
READS: Final = 20_000
SEED: Final = 1


class Opened(msgspec.Struct, frozen=True):
    """One opening: ms, and the bytes of memory the process has more than before, once every key
    was read."""

    ms: float
    pss: int


Rounds = dict[str, dict[str, list[float]]]
"""By what was measured and by store: the median of each round, us."""


def measure(folder: Path, rounds: int, seconds: float) -> Rounds:
    """Fill each store, then measure them in turns."""
    pairs = [(key_of(number), b"v" * VALUE_SIZE) for number in range(KEYS)]
    stores = {name: make(folder / name) for name, make in STORES.items()}
    for store in stores.values():
        for start in range(0, KEYS, 1024):
            store.group(pairs[start : start + 1024])
            store.tidy()
    found: Rounds = {"put": {}, "group": {}, "get": {}}
    source = random.Random(SEED)
    for _ in range(rounds):
        for what, count in (("put", 1), ("group", GROUP)):
            for name, us in _turns(stores, pairs, count, seconds, source).items():
                found[what].setdefault(name, []).append(us)
        keys = [key_of(source.randrange(KEYS)) for _ in range(READS)]
        for name, store in stores.items():
            if name != "flush":
                reads = store.reads(keys)
                before = time.perf_counter_ns()
                reads()
                us = (time.perf_counter_ns() - before) / READS / 1000
                found["get"].setdefault(name, []).append(us)
    for store in stores.values():
        store.close()
    return found


def _turns(
    stores: dict[str, Peer],
    pairs: Sequence[tuple[bytes, bytes]],
    count: int,
    seconds: float,
    source: random.Random,
) -> dict[str, float]:
    taken: dict[str, list[int]] = {name: [] for name in stores}
    end = time.perf_counter() + seconds * len(stores)
    while time.perf_counter() < end:
        for name, store in stores.items():
            for _ in range(TURN):
                start = source.randrange(len(pairs) - count)
                group = pairs[start : start + count]
                before = time.perf_counter_ns()
                store.group(group)
                taken[name].append(time.perf_counter_ns() - before)
            store.tidy()
    return {name: statistics.median(each) / count / 1000 for name, each in taken.items()}


def open_once(name: str, folder: Path) -> Opened:
    """Open a filled store, read a key, then all of them."""
    make = STORES[name]
    reads_one = [key_of(7)]
    before = memory_of(_own())
    assert before is not None, "a process may read its own"
    start = time.perf_counter_ns()
    store = make(folder / name)
    store.reads(reads_one)()
    ms = (time.perf_counter_ns() - start) / 1e6
    store.reads([key_of(number) for number in range(0, KEYS, 7)])()
    after = memory_of(_own())
    assert after is not None
    store.close()
    return Opened(ms, after.pss - before.pss)


def _own() -> int:
    return int(Path("/proc/self").resolve().name)


def main(words: Sequence[str]) -> int:
    """Measure as the words say, print JSON."""
    answer: Rounds | Opened
    if words[0] == "measure":
        answer = measure(Path(words[1]), int(words[2]), float(words[3]))
    else:
        answer = open_once(words[1], Path(words[2]))
    print(msgspec.json.encode(answer).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
