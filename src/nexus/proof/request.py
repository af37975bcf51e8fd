"""What a run was asked for: the command line and the mission's environment variables.

The command line wins over the environment. Whatever is not understood is a UsageError, one
sentence that says what to write instead.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from nexus.protocols.ladder import Ground, Phase

SMP_MAX: Final = 4  # CPUs of the simulated kernel (design.md section 3)
SEED_DEFAULT: Final = 0x6E65_7572_6F6E  # the reference scheduler's seed (core.md 1.1)
SEED_MAX: Final = (1 << 64) - 1
TIMEOUT_DEFAULT: Final = "190s"  # the mission's RUN_TIMEOUT
TIMEOUT_MAX: Final = 3600 * 10**9  # ns; a boot that takes an hour is not going to end
SYSTEM_DEFAULT: Final = Path("systems/selftest.toml")
SCENARIO_DEFAULT: Final = "ladder"  # boot, calls, denials, a crash, state, update, rollback

SWEEP_ALL, SWEEP_SAMPLE = "all", "sample"

PHASE_ALIASES: Final = {"routing": Phase.IPC, "logd": Phase.OBSERVE}
_UNITS: Final = {"ms": 10**6, "s": 10**9, "m": 60 * 10**9}
_DURATION: Final = re.compile(r"([0-9]{1,9})(ms|s|m)")


class UsageError(Exception):
    """The request makes no sense; the text is one sentence for the person who wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One run. `timeout` bounds each boot, in nanoseconds of the runner's clock.

    `smp` is None to take what the system file says. `until` is None to run to the end, "" to
    stop when the last expected rung is decided, else the whole line to stop at.
    """

    ground: Ground
    system: Path
    smp: int | None
    seed: int
    require_smp: bool = False
    phase: Phase = Phase.END
    until: str | None = None
    timeout: int = 190 * 10**9
    json: bool = False
    record: Path | None = None
    log: Path | None = None
    report: Path | None = None
    saboteur: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """`nexus prove --saboteurs`: every saboteur of a ground in turn, or a sample of them, each in
    a run of its own."""

    base: Request
    sample: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """`nexus prove --compare A,B`: one scenario on two grounds or more."""

    grounds: tuple[Ground, ...]
    scenario: str
    seed: int
    timeout: int
    json: bool


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> "Request | Sweep | Comparison":
    """Read the command line after `nexus prove`. Raises UsageError."""
    options = _parser().parse_args(list(argv))
    timeout = duration(options.timeout or environ.get("RUN_TIMEOUT") or TIMEOUT_DEFAULT)
    seed = _integer("--seed", options.seed, 0, SEED_MAX)
    if options.compare is not None:
        return Comparison(
            grounds=_grounds(options.compare),
            scenario=options.scenario,
            seed=seed,
            timeout=timeout,
            json=options.json,
        )
    ground = ground_named(options.ground)
    smp = options.smp or environ.get("SMP")
    if options.log is not None and ground is not Ground.SIM:
        raise UsageError("--log writes the simulated kernel's event log: use it with --ground sim.")
    request = Request(
        ground=ground,
        system=options.system,
        smp=_integer("SMP", smp, 1, SMP_MAX) if smp else None,
        seed=seed,
        require_smp=_flag("REQUIRE_SMP", environ),
        phase=phase_named(environ.get("RUN_PHASE") or Phase.END.value),
        until=_until(environ.get("RUN_UNTIL_MARKER", "0")),
        timeout=timeout,
        json=options.json,
        record=options.record,
        log=options.log,
        report=options.report,
        saboteur=options.saboteur,
    )
    if options.saboteurs is None:
        return request
    return Sweep(base=request, sample=options.saboteurs == SWEEP_SAMPLE)


def phase_named(text: str) -> Phase:
    """The phase that RUN_PHASE names. Raises UsageError."""
    if text in PHASE_ALIASES:
        return PHASE_ALIASES[text]
    names = " ".join(phase.value for phase in Phase)
    if text == "vfs":
        raise UsageError(
            f"RUN_PHASE=vfs: this system has no virtual file system, choose one of {names}."
        )
    try:
        return Phase(text)
    except ValueError:
        raise UsageError(f"RUN_PHASE={text} is no phase, choose one of {names}.") from None


def ground_named(text: str) -> Ground:
    """The ground of this name. Raises UsageError."""
    try:
        return Ground(text)
    except ValueError:
        raise UsageError(f"There is no ground {text!r}: choose sim, linux or vm.") from None


def duration(text: str) -> int:
    """Nanoseconds of `190s`, `1500ms` or `3m`. Raises UsageError."""
    match = _DURATION.fullmatch(text)
    value = int(match[1]) * _UNITS[match[2]] if match is not None else 0
    if not 0 < value <= TIMEOUT_MAX:
        raise UsageError(
            f"{text!r} is no time a boot can be given: write a number and ms, s or m, as in 190s."
        )
    return value


def _until(text: str) -> str | None:
    match text:
        case "" | "0":
            return None
        case "1":
            return ""
        case _:
            return text


def check_smp(request: "Request", smp: int) -> None:
    """Refuse a run that was to have the smp rungs and cannot. Raises UsageError."""
    if request.require_smp and request.ground is Ground.LINUX:
        raise UsageError(
            "REQUIRE_SMP=1 needs the smp rungs, and ground linux has none: use sim or vm."
        )
    if request.require_smp and smp < 2:
        raise UsageError("REQUIRE_SMP=1 needs SMP=2 or more.")


def _flag(name: str, environ: Mapping[str, str]) -> bool:
    text = environ.get(name) or "0"
    if text not in {"0", "1"}:
        raise UsageError(f"{name}={text} is neither 0 nor 1.")
    return text == "1"


def _grounds(text: str) -> tuple[Ground, ...]:
    names = text.split(",")
    if len(set(names)) != len(names) or len(names) < 2:
        raise UsageError(f"--compare {text}: name two grounds or more, as in --compare sim,linux.")
    return tuple(ground_named(name) for name in names)


def _integer(name: str, text: str, minimum: int, maximum: int) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = minimum - 1
    if not minimum <= value <= maximum:
        raise UsageError(f"{name}={text} is not a number from {minimum} to {maximum}.")
    return value


EPILOG: Final = """\
Examples:
  nexus prove                           # in the simulator, the selftest system
  nexus prove --ground linux --smp 2    # as real processes, on two CPUs
  nexus prove --ground vm --report run.html
  nexus prove --seed 7 --json
  nexus prove --saboteurs               # every planted fault must be found
  nexus prove --compare sim,linux,vm

Environment: RUN_PHASE, RUN_UNTIL_MARKER, RUN_TIMEOUT, SMP, REQUIRE_SMP."""


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nexus prove",
        description="Boot a system, climb the proof ladder, print a verdict.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    _ = add("--ground", default="sim", help="sim, linux or vm (default sim)")
    _ = add("--system", type=Path, default=SYSTEM_DEFAULT, help="the system file")
    _ = add("--smp", default=None, help="CPUs, 1 to 4 (on linux: size of the CPU set)")
    _ = add("--seed", default=str(SEED_DEFAULT), help="what all choices of sim come from")
    _ = add("--timeout", default=None, help="bound of one boot, as in 190s")
    _ = add("--json", action="store_true", help="print the verdict as one JSON object")
    _ = add("--record", type=Path, default=None, help="where to write the run record")
    _ = add("--log", type=Path, default=None, help="where to write sim's whole event log")
    _ = add("--report", type=Path, default=None, help="where to write the run as an HTML page")
    _ = add(
        "--scenario",
        default=SCENARIO_DEFAULT,
        help="what --compare runs: ladder, of whole systems, or conformance, of kernels",
    )
    what = parser.add_mutually_exclusive_group()
    _ = what.add_argument("--saboteur", type=int, default=None, help="plant the fault of a rung")
    _ = what.add_argument(
        "--saboteurs",
        nargs="?",
        choices=(SWEEP_ALL, SWEEP_SAMPLE),
        const=SWEEP_ALL,
        default=None,
        help="run every saboteur in turn, or a sample",
    )
    _ = what.add_argument("--compare", default=None, help="compare grounds, as in sim,linux")
    return parser
