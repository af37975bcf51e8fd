"""Mutated system files and policy files against their loaders.

Any bytes give a plan, a policy, or SystemFileError with one printable line, never another
exception, and each within SPAN_MAX. One line per loader with the counts of accepted and refused;
a loader that accepted or refused nothing was not tested and is a fault.

    python -m fuzz.files --files 5000 --seed 1
"""

import argparse
import random  # noqa: TID251 (a fuzzer has a seeded generator of its own)
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuzz.decoders import mutate
from nexus.init.errors import SystemFileError
from nexus.init.plan import canonical, make_plan
from nexus.init.policy import merge, parse_layer
from nexus.init.system import parse

FILES_DEFAULT: Final = 5_000  # per loader
SPAN_MAX: Final = 2.0  # s of CPU for one file; the slowest that fits the bound takes half of it
SYSTEM_SEEDS: Final = (
    b"""[system]
name = "fuzzed"
smp = 2
total_size = "4MiB"
owner_size = "256KiB"
link = { depth = 4 }
ends_with = "client"
stable = "10s"
safe_after = 3
policy_stale_max = "1s"
state_dir = "/var/lib/fuzzed"

[group.pair]
strategy = "rest"
restarts = 5
within = "30s"
exceeded = "safe-mode"

[device.disk]
kind = "block"
size = "1MiB"
path = "/dev/sda"

[device.rng]
kind = "entropy"

[device.old]
kind = "empty"
legacy = true

[service.policyd]
program = "policyd"
uses = { logd = { depth = 64, sync = false } }
health = { deadline = "2s", every = "250ms", answer = "500ms" }

[service.logd]
program = "logd"
stage = "core"
safe = true
uses = [{ name = "policyd", depth = 8 }]

[service.logd.settings]
records = 1024
core = "policyd"
lossy = false

[service.timed]
program = "timed"
group = "pair"

[service.client] # a comment
program = "demo.interactive"
group = "pair"
qos = "interactive"
cpu = 1
endpoints = 16
isolation = "exec"
threads = 2
ports = ["console"]
connect = [1883, 80]
devices.serial = { path = "/dev/ttyS0", writable = true }
hardware = ["rng", "disk"]
secret = "file"
capabilities = ["proof.control", "log.read:/plant/", "log.read"]
restart = { backoff = "50ms", backoff_max = "5s", reset = "10s" }
stop = "1s"

[service.client.listen]
web = { address = "127.0.0.1", port = 8080 }

[service.client.uses]
timed = { delegations = 2, size = "16KiB" }
logd = { sync = false }
""",
    b"""[system]
name = "plant"
path = ["."]

[service.valve]
module = "nexus.nowhere:Valve"
protocol = "nexus.protocols.timed"
ordinary = true
double = "nexus.nowhere:Double"
isolation = "exec"
""",
)
POLICY_SEEDS: Final = (
    b"""# who may do what
[allow]
timed = ["ipc.core"]
"demo.testsvc" = [
  "ipc.core",
  "log.read", # why
]
client = ["a.b:/x/", "a.b:/y z", "a.b"]

[route]
timed = "time.use"
""",
    b'allow = { timed = ["a.b-c"], client = ["x"] }\nroute.client = "y"\n',
)
NAMES: Final = ("timed", "demo.testsvc", "client")
VALUES: Final = (
    "-1", "0", "1", "65536", "1e9", "nan", "0x" + "f" * 40, "9" * 5000, '""', '"x"', "true",
    '"' + "x" * 5000 + '"', '"\\u0000"', "'\x1b[31m'", '"""a\nb"""', "[]", "{}", "[[]]", "[1, 1]",
    '["a", "a"]', "{ a = 1 }", "1979-05-27T07:32:00Z", '"1ms"', '"60min"', '"999999999min"',
    '"16KiB"', '"exec"', '"fork"', '"core"', '"timed"', '"client"', '"policyd"', '"logd"',
    '["policyd"]', '{ policyd = {}, logd = {} }', '[{ name = "client" }]', '"::1"', "a.b.c.d",
    '["rng"]', '["old"]', '"block"', '"empty"', '"keyring"', '"/dev/sda"', '["a:b"]', '["a: b"]',
)  # fmt: skip
"""What a value is replaced with."""


@dataclass(slots=True)
class Counts:
    """What became of the inputs of one loader; `slowest` is s of CPU."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0


def load_system(data: bytes) -> None:
    """The system loader, the plan and its digest."""
    _ = canonical(make_plan(parse(data, Path("fuzzed.toml"))))


def load_policy(data: bytes) -> None:
    """The policy loader, and the bytes that travel."""
    layer = parse_layer(data, Path("fuzzed.toml"), "fuzzed.toml")
    _ = merge((layer,), NAMES).encoded()


LOADERS: Final[dict[str, tuple[Callable[[bytes], None], Sequence[bytes]]]] = {
    "system": (load_system, SYSTEM_SEEDS),
    "policy": (load_policy, POLICY_SEEDS),
}


def mutate_file(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, changed in its values, its lines, or its bytes."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutate(rng, seeds)
    lines = rng.choice(seeds).decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        key, equals, _ = lines[at].partition("=")
        if kind == 1 or (kind == 2 and not equals):
            _change_lines(rng, lines, at)
        elif equals:
            lines[at] = f"{key}= {rng.choice(VALUES)}"
    return "\n".join(lines).encode()


def _change_lines(rng: random.Random, lines: list[str], at: int) -> None:
    match rng.randrange(4):
        case 0 if len(lines) > 1:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            lines[at] = lines[at].replace("timed", rng.choice(("client", "logd", "policyd", "x")))


def fuzz_files(
    load: Callable[[bytes], None], seeds: Sequence[bytes], rng: random.Random, count: int
) -> Counts:
    """Feed `count` mutated files; what became of them."""
    counts = Counts()
    for _ in range(count):
        data = mutate_file(rng, seeds)
        before = time.process_time()
        try:
            load(data)
        except SystemFileError as error:
            assert str(error).isprintable(), str(error)
            counts.refused += 1
        except BaseException:
            print(f"fuzz: the input was {data!r}", file=sys.stderr)
            raise
        else:
            counts.accepted += 1
        counts.slowest = max(counts.slowest, time.process_time() - before)
        assert counts.slowest < SPAN_MAX, f"{counts.slowest:.1f} s for {data[:200]!r}"
    return counts


def campaign(count: int, seed: int) -> dict[str, Counts]:
    """Every loader, by name."""
    return {
        name: fuzz_files(load, seeds, random.Random(f"{seed} {name}"), count)
        for name, (load, seeds) in LOADERS.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if a loader accepted or refused nothing."""
    parser = argparse.ArgumentParser(prog="fuzz.files", description=__doc__)
    parser.add_argument("--files", type=int, default=FILES_DEFAULT, help="inputs per loader")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    idle = 0
    for name, counts in campaign(options.files, options.seed).items():
        fault = "" if counts.accepted and counts.refused else "  NOT TESTED"
        idle += bool(fault)
        tally = f"accepted {counts.accepted:7d}  refused {counts.refused:7d}"
        print(f"{name:44s} {tally}  slowest {counts.slowest * 1000:.0f} ms{fault}")
    return 1 if idle else 0


if __name__ == "__main__":
    sys.exit(main())
