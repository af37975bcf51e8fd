"""bench/ipc: calls between two processes, ours and the peers, in one run."""

import os
from collections.abc import Callable
from typing import Final

from bench.measure import Placement
from bench.pairing import C_CREDENTIALS, Spread, Variant, run_rounds
from bench.profile import layers, steps
from bench.report import IpcResult, Outcome, Step, Target
from bench.yardstick import Yardstick

VARIANTS: Final = (
    C_CREDENTIALS,
    "python_sockets",
    "bare",
    "typed",
    "pipelined",
    "connection_bytes",
    "connection_objects",
    "pyzmq",
    "dbus_fast",
    "dbus_fast_messages",
)
BARE_RATIO_MAX: Final = 1.3  # to the C round trip
TYPED_RATIO_MAX: Final = 2.2
DBUS_LEAD_MIN: Final = 5.0  # times faster than dbus-fast in its typed form, as ours is typed
PYZMQ_LEAD_MIN: Final = 2.5
PIPELINED_RATE_MIN: Final = 600_000.0  # calls per second


def placements() -> list[Placement]:
    """One CPU, and two if this process may use two."""
    cpus = sorted(os.sched_getaffinity(0))
    places = [Placement(client=cpus[0], server=cpus[0])]
    if len(cpus) > 1:
        places.append(Placement(client=cpus[0], server=cpus[1]))
    return places


def targets(variants: dict[str, Variant]) -> list[Target]:
    """Judge the runs on one CPU."""

    def judge(
        name: str, bound: float, spread_of: Callable[[], Spread | None], *needs: str, **form: object
    ) -> Target:
        lacking = [variants[need] for need in needs if not variants[need].pairs]
        return Target(
            name=name,
            bound=bound,
            at_most=bool(form.get("at_most")),
            measured=None if lacking else spread_of(),
            why_not="; ".join(f"{each.name}: {each.skipped}" for each in lacking),
            unit=str(form.get("unit", "")),
        )

    bare, typed, pipelined = variants["bare"], variants["typed"], variants["pipelined"]
    return [
        judge(
            "bare exchange, ratio to C",
            BARE_RATIO_MAX,
            lambda: bare.spread(lambda pair: pair.ratio),
            "bare",
            at_most=True,
            unit=" x",
        ),
        judge(
            "typed call, ratio to C",
            TYPED_RATIO_MAX,
            lambda: typed.spread(lambda pair: pair.ratio),
            "typed",
            at_most=True,
            unit=" x",
        ),
        judge(
            "typed call, times faster than dbus-fast",
            DBUS_LEAD_MIN,
            lambda: typed.against(variants["dbus_fast"]),
            "typed",
            "dbus_fast",
            unit=" x",
        ),
        judge(
            "typed call, times faster than pyzmq",
            PYZMQ_LEAD_MIN,
            lambda: typed.against(variants["pyzmq"]),
            "typed",
            "pyzmq",
            unit=" x",
        ),
        judge(
            "pipelined calls per second",
            PIPELINED_RATE_MIN,
            lambda: pipelined.spread(lambda pair: pair.sample.rate),
            "pipelined",
        ),
    ]


def run(
    *, rounds: int, seconds: float, progress: Callable[[str], None]
) -> tuple[IpcResult, list[Target]]:
    """Run all variants in all placements; profile the typed call if a target is missed."""
    variants: list[Variant] = []
    yardsticks: dict[str, Spread] = {}
    judged: list[Target] = []
    profile: list[Step] = []
    layered: list[Step] = []
    with Yardstick() as yardstick:
        for place in placements():
            found = run_rounds(
                yardstick, VARIANTS, place, rounds=rounds, seconds=seconds, progress=progress
            )
            variants += found.values()
            yardsticks[place.label] = Spread.of(
                [pair.c_p50_ns / 1000 for each in found.values() for pair in each.pairs]
            )
            if not judged:
                judged = targets(found)
                if any(target.outcome is Outcome.MISSED for target in judged):
                    layered, profile = layers(found, place.client), steps(place.client)
    return IpcResult(rounds, seconds, variants, yardsticks, layered, profile), judged
