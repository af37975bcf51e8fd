"""bench/state: what it costs to keep state, against SQLite (WAL, FULL), lmdb and the bare flush.

The engine in process and statefsd through IPC are reported apart: a caller of statefsd pays both.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench import state_ipc
from bench.measure import UnavailableError
from bench.pairing import Spread, WorkerError
from bench.report import StateResult, StateRow, Target
from bench.state_engine import Opened, Rounds
from bench.stores import STORES

FLUSH_RATIO_MAX: Final = 1.15
GET_RATIO_MAX: Final = 1.5
REOPEN_MS_MAX: Final = 30.0
OPENINGS: Final = 5
WORKER_SECONDS_MAX: Final = 120.0  # s beyond the measured time: filling four stores


def _worker(words: Sequence[str], timeout: float) -> bytes:
    command = (sys.executable, "-m", "bench.state_engine", *words)
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"state: no result after {error.timeout:.0f} s") from error
    if done.returncode != 0:
        raise WorkerError(f"state: {done.stderr.decode(errors='replace').strip()[-2000:]}")
    return done.stdout


def _forget(folder: Path, name: str) -> None:
    """Take a store's files out of the page cache, as after a boot."""
    for path in folder.glob(f"{name}*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _openings(folder: Path, name: str, *, cold: bool) -> list[Opened]:
    found = []
    for _ in range(OPENINGS):
        if cold:
            _forget(folder, name)
        words = ("open", name, str(folder))
        found.append(msgspec.json.decode(_worker(words, WORKER_SECONDS_MAX), type=Opened))
    return found


def run(
    *, rounds: int, seconds: float, progress: Callable[[str], None]
) -> tuple[StateResult, list[Target]]:
    """Measure the engine and its peers, then statefsd through IPC."""
    try:
        import lmdb  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise UnavailableError("lmdb is not installed: make .venv/.bench") from error
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        words = ("measure", name, str(rounds), str(seconds))
        span = rounds * seconds * 2 * len(STORES) + WORKER_SECONDS_MAX
        found = msgspec.json.decode(_worker(words, span), type=Rounds)
        progress(f"state: {rounds} rounds of {len(STORES)} stores")
        rows = [_row(folder, each, found) for each in STORES]
        progress("state: reopened")
        ipc = state_ipc.run(directory=folder, progress=progress)
    result = StateResult(rounds, seconds, rows, {way: list(each) for way, each in ipc.items()})
    return result, _targets(found, rows)


def _row(folder: Path, name: str, found: Rounds) -> StateRow:
    if name == "flush":
        put, group = (Spread.of(found[what][name]) for what in ("put", "group"))
        return StateRow(name, put, group, None, None, None, None)
    warm, cold = (_openings(folder, name, cold=cold) for cold in (False, True))
    return StateRow(
        name,
        Spread.of(found["put"][name]),
        Spread.of(found["group"][name]),
        Spread.of(found["get"][name]),
        Spread.of([each.ms for each in warm]),
        Spread.of([each.ms for each in cold]),
        Spread.of([float(each.pss) for each in warm]),
    )


def _ratio(found: Rounds, what: str, name: str, other: str) -> Spread:
    """How many times as long one takes as the other, by rounds."""
    pairs = zip(found[what][name], found[what][other], strict=True)
    return Spread.of([ours / theirs for ours, theirs in pairs])


def _targets(found: Rounds, rows: Sequence[StateRow]) -> list[Target]:
    reopen = next(row.warm_ms for row in rows if row.name == "ours")
    told = [
        ("durable put against the bare flush", FLUSH_RATIO_MAX, "put", "flush"),
        ("group of 64 against SQLite", 1.0, "group", "sqlite"),
        ("group of 64 against lmdb", 1.0, "group", "lmdb"),
        ("get against SQLite", 1.0, "get", "sqlite"),
        ("get against lmdb", GET_RATIO_MAX, "get", "lmdb"),
    ]
    targets = [
        Target(name, bound, at_most=True, measured=_ratio(found, what, "ours", other), unit=" x")
        for name, bound, what, other in told
    ]
    targets.append(
        Target("reopening 1e5 keys, warm", REOPEN_MS_MAX, at_most=True, measured=reopen, unit=" ms")
    )
    return targets
