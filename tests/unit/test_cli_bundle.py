"""`nexus bundle` from its words to what it prints."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

from fuzz.sets import about, small
from nexus.cli.command import main
from nexus.sets import Content, write
from nexus.trust.update import SNAPSHOT, TARGETS, TIMESTAMP, encode_update

ROOT: Final = Path(__file__).parents[2]
PUMP: Final = ROOT / "examples" / "pump" / "system.toml"


def built(output: Path, *more: str) -> int:
    words = ["bundle", "build", str(PUMP), "-o", str(output), "--version", "3", "--name", "1.2.0"]
    return main([*words, *more])


def test_what_build_writes_verify_takes_and_inspect_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pump.nxs"

    assert built(file, "--health", "30", "--schema", "/state/pump/=2") == 0
    digest = sha256(file.read_bytes()).hexdigest()
    told = capsys.readouterr().out
    assert f"{file}: 1.2.0 (version 3), " in told
    assert f"{file.stat().st_size} bytes, sha256 {digest}" in told

    assert main(["bundle", "verify", str(file)]) == 0
    told = capsys.readouterr().out
    assert " files: whole\n" in told
    assert f"sha256 {digest}" in told

    assert main(["bundle", "inspect", str(file), "--files"]) == 0
    told = capsys.readouterr().out
    assert "system system/system.toml, bill of materials sbom.cdx.json" in told
    assert "a trial boot has 30 s to prove well" in told
    assert "/state/pump/  2" in told
    assert "system/src/pump_station/pump.py" in told

    assert main(["bundle", "inspect", str(file), "--sbom"]) == 0
    assert json.loads(capsys.readouterr().out)["bomFormat"] == "CycloneDX"


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pump.nxs"

    assert built(file, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["bundle", "verify", str(file), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert main(["bundle", "inspect", str(file), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)

    assert (made["version"], made["name"], made["health_ns"]) == (3, "1.2.0", 60_000_000_000)
    assert made["sha256"] == verified["sha256"] == sha256(file.read_bytes()).hexdigest()
    assert verified == {**made, "whole": True}
    assert inspected == {key: made[key] for key in inspected}
    assert sorted(made["services"]) == ["level", "logd", "operator", "policyd", "pump"]


def test_a_damaged_set_is_refused_with_its_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(write(about(), small()))
    data[-40] ^= 1
    file = tmp_path / "damaged.nxs"
    file.write_bytes(data)

    assert main(["bundle", "verify", str(file)]) == 1
    assert f"{file}: refused: checksum: its end is not marked" in capsys.readouterr().out
    assert main(["bundle", "verify", str(file), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["whole"], told["status"]) == (False, "CHECKSUM")

    file.write_bytes(data[:100])
    assert main(["bundle", "inspect", str(file)]) == 1
    assert "refused: truncated: " in capsys.readouterr().out


def test_the_set_in_an_update_is_looked_at_as_a_set_alone_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = encode_update(dict.fromkeys((TIMESTAMP, SNAPSHOT, TARGETS), b"{}"))
    data = write(about(), small())
    file = tmp_path / "pump.nxu"
    file.write_bytes(head + data)

    assert main(["bundle", "verify", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["size"], told["sha256"]) == (len(data), sha256(data).hexdigest())

    file.write_bytes(head[:20])
    assert main(["bundle", "verify", str(file)]) == 1
    assert "the update file ends within its metadata" in capsys.readouterr().err


def test_what_is_no_set_at_all_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.nxs"
    file.write_bytes(b"hello")

    assert main(["bundle", "inspect", str(file)]) == 1
    assert "refused: not a set: " in capsys.readouterr().out
    assert main(["bundle", "verify", str(tmp_path / "missing.nxs")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_bill_of_materials_that_is_none_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.nxs"
    file.write_bytes(write(about(), small() | {"sbom.cdx.json": Content(data=b"[" * 100_000)}))

    assert main(["bundle", "inspect", str(file), "--sbom"]) == 1
    assert "the bill of materials is no JSON: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--schema", "app=2"], "expected an area and its version as in /state/app/=2"),
        (["--schema", "/state/app=2"], "this is no set that a device would take"),
        (["--needs", "no-such-thing"], "no-such-thing is not installed here"),
        (["--name", "a b"], "this is no set that a device would take"),
        (["--version", "0"], "--version"),
        (["--health", "4000"], "--health"),
    ],
)
def test_a_wrong_word_is_a_sentence_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    file = tmp_path / "pump.nxs"

    assert built(file, *words) == 2

    assert sentence in capsys.readouterr().err
    assert not file.exists()


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(tmp_path / "missing" / "pump.nxs") == 1
    assert "cannot write" in capsys.readouterr().err
