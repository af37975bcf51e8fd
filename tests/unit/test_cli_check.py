"""`nexus check` and the command around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexus import __version__
from nexus.cli import main
from nexus.init.plan import load_plan

ROOT = Path(__file__).parents[2]
MINIMAL = ROOT / "systems" / "minimal.toml"


@pytest.mark.parametrize("file", sorted((ROOT / "systems").glob("*.toml")), ids=lambda f: f.name)
def test_every_system_of_the_tree_is_right(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(file)]) == 0

    output = capsys.readouterr().out
    plan = load_plan(file)
    assert f"digest {plan.digest}" in output
    for service in plan.services:
        assert service.name in output


def test_digest_prints_the_digest_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(MINIMAL), "--digest"]) == 0

    assert capsys.readouterr().out == f"{load_plan(MINIMAL).digest}\n"


def test_two_processes_compute_the_same_digest() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-m", "nexus.cli", "check", str(MINIMAL), "--digest"],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(digests) == 1


def test_json_holds_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", str(MINIMAL)]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["digest"] == load_plan(MINIMAL).digest
    assert [service["name"] for service in document["plan"]["services"]] == [
        service.name for service in load_plan(MINIMAL).services
    ]


def test_a_wrong_file_is_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text('[system]\nname = "x"\nspeed = 3\n')

    assert main(["check", str(file)]) == 2

    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"nexus: {file}:3: expected one of the keys name, smp")
    assert output.err.count("\n") == 1


def test_a_number_too_long_to_read_is_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text('[system]\nname = "x"\nsmp = ' + "9" * 5000 + "\n")

    assert main(["check", str(file)]) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"nexus: {file}:1: expected TOML, found ")
    assert error.count("\n") == 1


def test_a_missing_file_is_one_sentence_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "nowhere.toml"]) == 2

    assert capsys.readouterr().err == (
        "nexus: nowhere.toml:1: expected a file that can be read, found No such file or directory\n"
    )


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["check"], ["check", "a", "b"], ["check", "--digest", "--json", "a"]]
)
def test_wrong_usage_is_one_sentence_and_exit_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2

    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("nexus: ")
    assert output.err.count("\n") == 1


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0

    assert capsys.readouterr().out == f"nexus {__version__}\n"


def test_prove_is_handed_to_the_proof_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def prove(argv: list[str]) -> int:
        seen.append(argv)
        return 1

    monkeypatch.setattr("nexus.proof.command.main", prove)

    assert main(["prove", "--ground", "sim", "--help"]) == 1
    assert seen == [["--ground", "sim", "--help"]]


def test_the_schema_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--schema"]) == 0

    assert json.loads(capsys.readouterr().out)["title"] == "Nexus system file"


def test_devices_are_listed_with_place_and_holder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "system.toml"
    _ = file.write_text(
        '[system]\nname = "x"\n'
        '[device.disk]\nkind = "block"\nsize = "16MiB"\n'
        '[device.raw]\nkind = "block"\nsize = "1GiB"\npath = "/dev/sdb"\n'
        '[device.old]\nkind = "empty"\nlegacy = true\n'
        '[service.timed]\nprogram = "timed"\nhardware = ["raw"]\n'
        'isolation = "exec"\nsecret = "keyring"\ncapabilities = ["a.b:/x/"]\n'
    )

    assert main(["check", str(file)]) == 0

    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "DEVICE KIND SIZE PLACE HOLDER" in lines
    assert "disk block 16MiB disk.img in the state directory -" in lines
    assert "raw block 1GiB /dev/sdb timed" in lines
    (timed,) = (line for line in lines if line.startswith("timed rest timed "))
    assert timed.endswith(" 3136MiB any"), "64 MiB and three times its disk"
    assert "old empty - old registers, refused -" in lines
    assert "timed exec 0 block device raw; secret in a keyring" in lines
    assert "timed a.b:/x/ system.toml:18" in lines
