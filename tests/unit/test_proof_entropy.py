"""Ladder #98: a draw that stands in the clear somewhere is found, in whatever form."""

import base64
import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import pytest

from nexus.abi import Event, EventKind, HardwareKind, Nanos, Pid
from nexus.kernel.sim.chance import Chance
from nexus.proof.checks_devices import DRAW_SIZE, entropy_drawn
from nexus.proof.trace import Trace
from nexus.proof.verdict import Mismatch
from nexus.protocols.ladder import Ground

SEED: Final = 7
DELIVERED: Final = Chance(SEED).of_device("rng").randbytes(3 * DRAW_SIZE)
FIRST: Final = DELIVERED[DRAW_SIZE : 2 * DRAW_SIZE]
SECOND: Final = DELIVERED[2 * DRAW_SIZE :]


def _check(*, said: str = "", output: str = "", seed: int = SEED) -> None:
    device = SimpleNamespace(name="rng", kind=HardwareKind.ENTROPY)
    service = SimpleNamespace(grants=SimpleNamespace(hardware=[device]))
    plan = SimpleNamespace(by_name={"rngd": service}, hardware=[device])
    case: Any = SimpleNamespace(plan=plan, scope=SimpleNamespace(ground=Ground.SIM))
    line: Any = SimpleNamespace(
        place=9,
        evidence={
            "given": 2 * DRAW_SIZE,
            "delivered_total": 2 * DRAW_SIZE,
            "digests": [hashlib.sha256(draw).hexdigest() for draw in (FIRST, SECOND)],
        },
    )
    draw = {"name": "rng", "what": "draw", "size": 3 * DRAW_SIZE}
    events = [
        Event(Nanos(1), EventKind.DEVICE, Pid(5), fields=draw),
        Event(Nanos(2), EventKind.DEVICE, Pid(5), fields={"name": "x", "what": said}),
    ]
    entropy_drawn(case, Trace(events=events, output=output, seed=seed), line)


FORMS: Final[list[Callable[[bytes], str]]] = [
    bytes.hex,
    lambda draw: draw.hex().upper(),
    lambda draw: base64.b64encode(draw).decode(),
    lambda draw: draw[:16].hex(),
    repr,
]


def test_draws_that_stand_nowhere_pass() -> None:
    _check(said="of no interest", output="of no interest")


@pytest.mark.parametrize("form", FORMS)
def test_a_draw_in_the_clear_is_found(form: Callable[[bytes], str]) -> None:
    with pytest.raises(Mismatch, match=r"in the clear in the events$"):
        _check(said=form(FIRST))
    with pytest.raises(Mismatch, match=r"in the clear in the output$"):
        _check(output=form(SECOND))


def test_draws_that_the_device_never_delivered_are_found() -> None:
    with pytest.raises(Mismatch, match="draws that the entropy device delivered"):
        _check(seed=SEED + 1)
