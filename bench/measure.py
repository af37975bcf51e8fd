"""One run of one variant: pin, warm up, time every call, read the CPU time of all processes."""

import gc
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

WARMUP_NS: Final = 100_000_000  # interpreters specialise and queues are touched well within it
PAYLOAD_SIZE: Final = 64  # bytes; the message size


class Placement(msgspec.Struct, frozen=True):
    """Where the two ends run. Declared, never left to the scheduler."""

    client: int
    server: int

    @property
    def label(self) -> str:
        """As the report names it."""
        return "one CPU" if self.client == self.server else "two CPUs"


class Sample(msgspec.Struct, frozen=True, tag=True):
    """What one run measured. Times are nanoseconds of one call; `cpu_ns` is CPU time of all
    processes per message, `messages` how many requests one call carries."""

    count: int
    elapsed_ns: int
    p50_ns: int
    p99_ns: int
    cpu_ns: float
    messages: int = 1

    @property
    def rate(self) -> float:
        """Requests answered per second."""
        return self.count * self.messages * 1e9 / self.elapsed_ns


class Skipped(msgspec.Struct, frozen=True, tag=True):
    """A variant that could not run, and the sentence that says what is missing."""

    reason: str


class UnavailableError(Exception):
    """A peer is not installed; the text names what to install."""


def pin(cpu: int) -> None:
    """Run the calling process on `cpu` only."""
    os.sched_setaffinity(0, {cpu})


def cpu_time_ns(pids: Iterable[int]) -> int:
    """CPU time of processes with all their threads, in nanoseconds.

    The calling process is read by its own clock, as the scheduler's account of a running
    thread lags by up to a tick. Source: proc(5), /proc/PID/task/TID/schedstat.
    """
    total = 0
    for pid in pids:
        if pid == os.getpid():
            total += time.process_time_ns()
            continue
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total


def summarise(samples: list[int], elapsed_ns: int, cpu_ns: int, messages: int) -> Sample:
    """Condense the durations of all calls."""
    samples.sort()
    count = len(samples)
    return Sample(
        count=count,
        elapsed_ns=elapsed_ns,
        p50_ns=samples[count // 2],
        p99_ns=samples[count * 99 // 100],
        cpu_ns=cpu_ns / (count * messages),
        messages=messages,
    )


def time_calls(
    call: Callable[[], object], seconds: float, pids: Iterable[int], messages: int = 1
) -> Sample:
    """Time `call` until `seconds` have passed."""
    pids = tuple(pids)
    gc.collect()
    gc.freeze()
    clock = time.perf_counter_ns
    end = clock() + WARMUP_NS
    while clock() < end:
        call()
    samples: list[int] = []
    keep = samples.append
    cpu = cpu_time_ns(pids)
    start = last = clock()
    end = start + int(seconds * 1e9)
    while last < end:
        call()
        now = clock()
        keep(now - last)
        last = now
    return summarise(samples, last - start, cpu_time_ns(pids) - cpu, messages)
