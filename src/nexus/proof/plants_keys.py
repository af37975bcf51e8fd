"""Saboteurs of keystored's rungs and of delegated decisions: 17, 18, 35, 52, 74, 81-83, 107-110."""

# ruff: noqa: SLF001 (saboteurs break what is private)

from functools import partial
from typing import Any, Final, NoReturn

from nexus.abi import ServiceId, service_id
from nexus.init.authority import Authority as Page
from nexus.init.programs import PROGRAMS
from nexus.kernel.linux import kernel as linux_kernel
from nexus.proof.plants_init import missing, withheld
from nexus.proof.plants_policy import route_to_logd
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.ladder import Ground
from nexus.runtime.authority import Authority
from nexus.services.policyd.judge import Judge, Ruling

BOTH: Final = frozenset(Ground)
SIM: Final = frozenset({Ground.SIM})
LINUX: Final = frozenset({Ground.LINUX, Ground.VM})
KEYSTORED: Final = "keystored"
INSIDE: Final = (35, 74, 107, 108, 109, 110)  # broken in keystored itself: planted_keystored
ENTRY: Final = "nexus.proof.planted_keystored:sabotaged"


def _inside_sim(number: int) -> None:
    """The simulator runs keystored in this process."""
    from nexus.proof.planted_keystored import plant  # which imports what init must not

    plant(number)


def _inside_linux(number: int) -> None:
    execute_instead(KEYSTORED, f"{ENTRY} {number}")


def execute_instead(name: str, other: str) -> None:
    """init executes this sabotaged program in the place of its own."""
    entry = f"{PROGRAMS[name].module}:main"

    def execute(wanted: str, *rest: Any, **options: Any) -> NoReturn:
        original(other if wanted == entry else wanted, *rest, **options)
        raise AssertionError("execute does not return")

    original = replace(linux_kernel, "execute", execute)


class _AsPolicy:
    """A log whose records blame the policy."""

    def __init__(self, log: Any) -> None:
        self._log = log

    def write(self, level: Any, text: str, fields: dict[str, Any], **options: Any) -> Any:
        return self._log.write(level, text, {**fields, "reason": "policy"}, **options)


def _unavailable_is_policy() -> None:
    """#81: in the record that a service writes in policyd's place."""

    def audit(authority: Any, key: Any, word: Any) -> None:
        log, authority._log = authority._log, _AsPolicy(authority._log)
        try:
            original(authority, key, word)
        finally:
            authority._log = log

    original = replace(Authority, "_audit", audit)


def _unknown_is_keystored() -> None:
    """#82."""

    def ruling(judge: Judge, subject: ServiceId, right: str, target: str) -> Ruling:
        known = subject in judge._names
        subject = subject if known else service_id(KEYSTORED)
        found: Ruling = original(judge, subject, right, target)
        return found

    original = replace(Judge, "_ruling", ruling)


def _generation_kept() -> None:
    """#83: only the end and the return of policyd raise the page."""

    async def raised(page: Page, *, available: bool) -> None:
        if available is not page.is_available:
            await original(page, available=available)

    original = replace(Page, "_raise", raised)


SABOTEURS: Final = (
    Saboteur(rung=17, grounds=BOTH, plant=partial(missing, KEYSTORED)),
    Saboteur(rung=18, grounds=BOTH, plant=partial(withheld, KEYSTORED)),
    Saboteur(rung=52, grounds=BOTH, plant=partial(route_to_logd, KEYSTORED)),
    Saboteur(rung=81, grounds=BOTH, plant=_unavailable_is_policy),
    Saboteur(rung=82, grounds=BOTH, plant=_unknown_is_keystored),
    Saboteur(rung=83, grounds=BOTH, plant=_generation_kept),
    *(Saboteur(rung=each, grounds=SIM, plant=partial(_inside_sim, each)) for each in INSIDE),
    *(Saboteur(rung=each, grounds=LINUX, plant=partial(_inside_linux, each)) for each in INSIDE),
)
