"""`python -m bench [ipc|sim|boot|state|observe|update|all]`: measure, print, and keep the report.

Exit codes: 0 measured (a missed target is reported, not hidden behind a code), 1 a
measurement of ours failed, 2 usage or a missing prerequisite.
"""

import argparse
import sys
from pathlib import Path
from typing import Final

import msgspec

from bench import boot, ipc, observe, sim, state, update
from bench.measure import UnavailableError
from bench.pairing import WorkerError
from bench.report import Machine, Outcome, Report, refresh, render, write

PAGE: Final = Path(__file__).parent.parent / "docs" / "reference" / "benchmarks.md"
ROUNDS: Final = 9  # odd, so that the median is a run
SECONDS: Final = 0.5  # of one run; 25 000 samples of a typed call
QUICK_ROUNDS: Final = 3
QUICK_SECONDS: Final = 0.25
PARTS: Final = ("ipc", "sim", "boot", "state", "observe", "update")


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=(*PARTS, "all"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number as JSON")
    parser.add_argument("--rounds", type=int, help=f"paired rounds (default {ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"of each run (default {SECONDS:g})")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few and short runs")
    parser.add_argument("--system", type=Path, metavar="FILE", help="what bench/boot starts")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help=f"write the page (all: default {PAGE.name}); "
        "a part alone replaces its section of a page that is there",
    )
    arguments = parser.parse_args(words)
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.seconds is None:
        arguments.seconds = QUICK_SECONDS if arguments.quick else SECONDS
    if arguments.rounds < 1 or not 0 < arguments.seconds <= 60:
        parser.error("--rounds must be at least 1, --seconds above 0 and at most 60")
    if arguments.report is None and arguments.part == "all" and not arguments.quick:
        arguments.report = PAGE  # a whole run is the last report
    return arguments


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run_part(part: str, arguments: argparse.Namespace, report: Report) -> None:
    if part == "ipc":
        report.ipc, judged = ipc.run(
            rounds=arguments.rounds, seconds=arguments.seconds, progress=_progress
        )
        report.targets += judged
    elif part == "sim":
        report.sim, target = sim.run(
            rounds=arguments.rounds, seconds=arguments.seconds, progress=_progress
        )
        report.targets.append(target)
    elif part == "observe":
        report.observe, judged = observe.run(
            rounds=arguments.rounds, seconds=arguments.seconds, progress=_progress
        )
        report.targets += judged
    elif part == "update":
        report.update, judged = update.run(
            rounds=arguments.rounds, quick=arguments.quick, progress=_progress
        )
        report.targets += judged
    elif part == "state":
        report.state, judged = state.run(
            rounds=arguments.rounds, seconds=arguments.seconds, progress=_progress
        )
        report.targets += judged
    else:
        report.boot, judged = boot.run(
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            system=arguments.system,
            progress=_progress,
        )
        report.targets += judged


def main(words: list[str]) -> int:
    """Run what was asked for."""
    arguments = _arguments(words)
    report = Report(machine=Machine.here())
    failed = False
    for part in PARTS if arguments.part == "all" else (arguments.part,):
        try:
            _run_part(part, arguments, report)
        except UnavailableError as error:
            print(f"bench {part}: {error}", file=sys.stderr)
            return 2
        except WorkerError as error:
            print(f"bench {part}: {error}", file=sys.stderr)
            report.missing[f"bench/{part}"] = str(error).splitlines()[0]
            failed = True
    print(render(report))
    missed = [target.name for target in report.targets if target.outcome is not Outcome.MET]
    if missed:
        print("not met: " + "; ".join(missed), file=sys.stderr)
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if arguments.report is not None:
        if arguments.part != "all" and arguments.report.exists():
            refresh(report, arguments.report, arguments.part)
        else:
            write(report, arguments.report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
