"""One seed, one log: to the byte, in another process, under another hash seed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexus.abi import BootImage, Event, EventKind, Nanos, Now, Program
from nexus.kernel.sim import SimKernel, log

SCENE = """
import sys
from nexus.abi import *
from nexus.kernel.sim import FaultPoint, Faults, Plan, SimKernel

async def main(boot):
    names = {"alpha", "beta", "gamma", "delta"}  # a set: its order depends on the hash seed
    slots = {}
    for name in sorted(names):
        spawned = await Spawn(SpawnSpec(name, "worker", boot.endpoint, delegations=4,
                                        owner_size=32768, endpoints=4))
        slots[name] = spawned
    for name in sorted(names):
        link = await LinkCreate(slots[name].slot, LinkTerms(4, 2000, 0))
        await Send(slots["alpha"].slot, name.encode(), move=link.slot)
    now = await Now()
    while await Now() < now + 30_000_000:
        try:
            message = await Recv((boot.endpoint,), Nanos(await Now() + 1_000_000))
            await ConsoleWrite(message.sender.service.to_bytes(8, "big").hex(), b'{"b": 1, "a": 2}')
        except AbiError:
            pass
    await Entropy(16)
    return 0

async def worker(boot):
    caps = []
    while True:
        try:
            message = await Recv((boot.endpoint,), Nanos(await Now() + 300_000))
            if message.cap is not None:
                caps.append(message.cap)
        except AbiError:
            pass
        for cap in caps:
            try:
                await Send(cap, boot.name.encode(), deadline=Nanos(await Now() + 100_000))
            except AbiError:
                pass
        try:
            await Send(boot.control, b"x", deadline=Nanos(await Now() + 200_000))
        except AbiError:
            pass

faults = Faults(Plan(chances={point: 10_000 for point in FaultPoint}))
worker_program = Program(name="worker", main=worker, digest="w")
kernel = SimKernel({"worker": worker_program}, seed=int(sys.argv[1]), recorder=lambda event: None,
                   cpu_count=2, trace=True, faults=faults, selftest=True)
kernel.run(Program(name="root", main=main, digest="r"), b"", until=Nanos(kernel.now + 10**12))
for line in kernel.log_lines():
    print(line)
"""


def lines_of(seed: int, hash_seed: int) -> bytes:
    source = Path(log.__file__).parents[3]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", SCENE, str(seed)],
        env=environment,
        capture_output=True,
        check=True,
        timeout=100,
    )
    assert done.stderr == b""
    return done.stdout


def test_the_log_is_equal_to_the_byte_under_another_hash_seed() -> None:
    first, second, other = lines_of(5, 1), lines_of(5, 2), lines_of(6, 1)

    assert first.count(b"\n") > 1000
    assert first == second
    assert first != other


async def busy(boot: BootImage) -> None:
    for _ in range(3000):
        await Now()


def test_a_long_log_is_bounded_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SimKernel({}, seed=1, recorder=lambda _: None)
    whole.run(Program(name="r", main=busy, digest=""), b"", until=Nanos(whole.now + 10**10))
    monkeypatch.setattr(log, "KEPT_RECORDS_MAX", 100)
    short = SimKernel({}, seed=1, recorder=lambda _: None)
    short.run(Program(name="r", main=busy, digest=""), b"", until=Nanos(short.now + 10**10))

    full, cut = list(whole.log_lines()), list(short.log_lines())

    assert cut[-2].startswith("records kept=0 dropped=300")
    assert cut[-1] == full[-1], "the digest covers what was not kept"


def test_tracing_adds_an_event_for_each_trap_in_order() -> None:
    events: list[Event] = []
    kernel = SimKernel({}, seed=1, recorder=events.append, trace=True)

    kernel.run(Program(name="r", main=busy, digest=""), b"", until=Nanos(kernel.now + 10**10))

    traps = [event.fields for event in events if event.kind is EventKind.TRAP]
    assert len(traps) == 3000
    assert traps[0] == {
        "name": "init-lite",
        "generation": 1,
        "trap": "Now",
        "status": "OK",
        "size": 0,
    }
