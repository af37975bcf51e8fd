"""Real proof runs on the simulated kernel: verdict, cuts, determinism, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nexus.proof.lock import run_lock
from nexus.proof.prove import Outcome
from tests.sim.conftest import PROVEN_LOG, PROVEN_SEED

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from nexus.proof.command import main; sys.exit(main(sys.argv[1:]))"
SEED = 11
GREEN_LINE = 'exit_code=0 first_failed_phase="" missing_marker=""'

pytestmark = [pytest.mark.sim, pytest.mark.slow]


def _prove(directory: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    own = {key: value for key, value in os.environ.items() if not key.startswith(("RUN_", "SMP"))}
    source = {"PYTHONPATH": str(ROOT / "src"), "NEXUS_RUNTIME_DIR": str(directory)}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "--ground", "sim", *arguments],
        cwd=ROOT,
        env=own | source | environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def _json(directory: Path, *arguments: str, **environ: str) -> dict[str, Any]:
    report = json.loads(_prove(directory, "--json", *arguments, **environ).stdout)
    assert isinstance(report, dict)
    return report


class Twice(NamedTuple):
    """One seed run by two interpreters with hash seeds of their own: a verdict as text, one as
    JSON, and what each run wrote."""

    text: "subprocess.CompletedProcess[str]"
    report: dict[str, Any]
    logs: tuple[Path, Path]
    records: tuple[Path, Path]


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Twice:
    """Two whole runs for those who only read what they left."""
    directory = tmp_path_factory.mktemp("twice")
    logs = (directory / "log-1", directory / "log-2")
    records = (directory / "record-1", directory / "record-2")
    files = [
        ("--seed", str(SEED), "--log", str(log), "--record", str(record))
        for log, record in zip(logs, records, strict=True)
    ]
    text = _prove(directory, *files[0], SMP="2", REQUIRE_SMP="1", PYTHONHASHSEED="1")
    report = _json(directory, *files[1], SMP="2", PYTHONHASHSEED="2")
    return Twice(text, report, logs, records)


def test_the_selftest_system_is_green_on_two_simulated_cpus(twice: Twice) -> None:
    assert twice.text.stdout.splitlines()[-1] == GREEN_LINE, twice.text.stdout
    assert twice.text.returncode == 0


@pytest.mark.parametrize(("smp", "phase"), [(1, "end"), (3, "devices"), (4, "end")])
def test_the_selftest_system_is_green_on_any_number_of_cpus(
    tmp_path: Path, smp: int, phase: str
) -> None:
    report = _json(tmp_path, "--smp", str(smp), "--seed", str(smp), RUN_PHASE=phase)

    assert report["exit_code"] == 0, report
    smp_rungs = [rung for rung in report["rungs"] if 39 <= rung["number"] <= 47]
    assert bool(smp_rungs) == (smp > 1)
    assert Path(report["record"]).is_relative_to(tmp_path), "where it is kept unless told otherwise"


def test_the_json_verdict_holds_what_a_script_needs(twice: Twice) -> None:
    report = twice.report

    assert (report["ground"], report["seed"], report["smp"]) == ("sim", SEED, 2)
    assert sum(len(group["rungs"]) for group in report["not_run"]) + len(report["rungs"]) == 144
    assert all(group["reason"] for group in report["not_run"])
    record = Path(report["record"]).read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in record]
    assert (kinds[0], kinds[-1]) == ("run", "verdict")
    assert kinds.count("rung") == 144
    cuts = [(boot["boot"], boot["power_cut"]) for boot in report["boots"]]
    assert cuts == [(number, number == 1) for number in range(6)]
    assert kinds.count("remains") == kinds.count("ending") == len(cuts)


def test_a_phase_before_state_needs_one_boot(tmp_path: Path) -> None:
    report = _json(tmp_path, RUN_PHASE="devices")

    assert report["exit_code"] == 0, report
    assert [boot["boot"] for boot in report["boots"]] == [0]


def test_the_phase_of_state_makes_three_boots_and_stops_in_the_last(tmp_path: Path) -> None:
    report = _json(tmp_path, RUN_PHASE="state")

    assert report["exit_code"] == 0, report
    assert report["stopped"]
    assert [boot["boot"] for boot in report["boots"]] == [0, 1, 2]
    passed = {rung["number"] for rung in report["rungs"] if rung["state"] == "passed"}
    assert {103, 104, 105, 106} <= passed


def test_a_run_stops_at_a_line_of_a_later_boot(tmp_path: Path) -> None:
    report = _json(tmp_path, RUN_UNTIL_MARKER="SELFTEST: statefs persist reboot ok")

    assert report["exit_code"] == 0, report
    assert [boot["boot"] for boot in report["boots"]] == [0, 1]


def test_a_phase_cuts_the_run_and_leaves_the_rest_not_run(tmp_path: Path) -> None:
    report = _json(tmp_path, RUN_PHASE="bring-up")

    assert report["exit_code"] == 0, report
    assert report["stopped"]
    behind = [g for g in report["not_run"] if g["reason"] == "behind RUN_PHASE=bring-up"]
    assert 144 in behind[0]["rungs"]


def test_a_run_stops_at_a_line(tmp_path: Path) -> None:
    report = _json(tmp_path, RUN_UNTIL_MARKER="init: ready")

    assert report["stopped"]
    assert report["exit_code"] == 0, report


def test_a_line_to_stop_at_that_never_comes_is_red(tmp_path: Path) -> None:
    small = ("--system", "systems/minimal.toml")
    report = _json(tmp_path, *small, SMP="1", RUN_UNTIL_MARKER="init: never")

    assert report["exit_code"] == 1
    assert any("init: never" in finding for finding in report["findings"])


def test_a_boot_that_takes_too_long_is_red_and_named(tmp_path: Path) -> None:
    report = _json(tmp_path, RUN_TIMEOUT="100ms")

    assert report["exit_code"] == 1
    assert report["missing_marker"] == "KSELFTEST: spawn reasons ok"
    assert any("deadline" in finding for finding in report["findings"])


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"RUN_PHASE": "vfs"}, "no virtual file system"),
        ({"RUN_PHASE": "x"}, "is no phase"),
        ({"SMP": "9"}, "from 1 to 4"),
        ({"SMP": "1", "REQUIRE_SMP": "1"}, "SMP=2 or more"),
        ({"RUN_TIMEOUT": "now"}, "as in 190s"),
    ],
)
def test_what_makes_no_sense_is_one_sentence_and_exit_code_2(
    tmp_path: Path, environ: dict[str, str], sentence: str
) -> None:
    done = _prove(tmp_path, **environ)

    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stdout == ""


def test_a_system_file_that_is_wrong_is_a_usage_error(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    _ = file.write_text('[system]\nname = "x"\n', encoding="utf-8")

    done = _prove(tmp_path, "--system", str(file))

    assert done.returncode == 2
    assert "wrong.toml" in done.stderr


def test_a_small_system_proves_what_it_has(tmp_path: Path) -> None:
    report = _json(tmp_path, "--system", "systems/minimal.toml", RUN_PHASE="bring-up", SMP="1")

    passed = {rung["number"] for rung in report["rungs"] if rung["state"] == "passed"}
    assert {1, 2, 3, 5, 13, 14, 29, 32} <= passed, report
    assert 27 not in passed


def test_a_run_while_another_one_holds_the_lock_waits_for_it(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(subprocess.TimeoutExpired):
            _ = subprocess.run(
                [sys.executable, "-c", COMMAND, "--ground", "sim"],
                env=os.environ
                | {"PYTHONPATH": str(ROOT / "src"), "NEXUS_RUNTIME_DIR": str(tmp_path)},
                capture_output=True,
                cwd=ROOT,
                timeout=3,
                check=False,
            )

    assert not (tmp_path / "records").exists()


def test_one_seed_gives_one_log_to_the_byte_whatever_the_hash_seed(twice: Twice) -> None:
    logs = [log.read_bytes() for log in twice.logs]
    lines = [record.read_text(encoding="utf-8").splitlines() for record in twice.records]
    disks = [[line for line in each if _is_of_disks(line)] for each in lines]

    boots = [line for line in logs[0].splitlines() if line.startswith(b"boot ")]
    assert boots == [f"boot {number}".encode() for number in range(6)]
    assert logs[0] == logs[1]
    assert len(disks[0]) == 2 * len(boots) + 1
    assert disks[0] == disks[1]


def _is_of_disks(line: str) -> bool:
    """What the runner read between the boots, and the sets that it has made."""
    return json.loads(line)["kind"] in {"remains", "boot remains", "sets"}


def test_another_seed_gives_another_log(twice: Twice, outcome: Outcome) -> None:
    other = outcome.record.parent / PROVEN_LOG

    assert SEED != PROVEN_SEED
    assert other.read_bytes().startswith(b"boot 0\n")
    assert other.read_bytes() != twice.logs[0].read_bytes()
