"""`nexus vm` where there is nothing to run it with, and what it says of an image."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nexus.cli import vm
from nexus.cli.command import main
from nexus.cli.defaults import VM_MEMORY
from nexus.vm import qemu
from nexus.vm.image import Image
from nexus.vm.initramfs import Tree, packed
from nexus.vm.machines import AARCH64, Machine
from nexus.vm.packages import NotHad
from nexus.vm.qemu import MEMORY_DEFAULT

INIT = b"#!/usr/bin/python3\n"
MINIMAL = str(Path(__file__).parents[2] / "systems/minimal.toml")


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    """One with a single file in it."""
    tree = Tree()
    tree.file("init", INIT, 0o755)
    layer = tmp_path / "base-0.cpio"
    _ = layer.write_bytes(packed(tree))
    built = Image(
        machine=AARCH64,
        kernel=tmp_path / "vmlinuz-6.12",
        kernel_version="6.12",
        python="3.11",
        layers=(layer,),
        digest="ab" * 32,
    )
    monkeypatch.setattr(vm, "build_image", lambda _machine, _cache, **_options: built)
    return built


def not_had(_machine: Machine, _cache: Path, *, refresh: bool) -> Image:
    raise NotHad(f"no linux-image; try `apt-get update` ({refresh=})")


@pytest.mark.parametrize(
    "words",
    [["build"], ["run", MINIMAL], ["shell"], ["doctor"]],
    ids=["build", "run", "shell", "doctor"],
)
def test_what_cannot_be_had_is_not_run_and_never_green(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vm, "build_image", not_had)
    monkeypatch.setenv("NEXUS_STATE_DIR", str(tmp_path))

    code = main(["vm", *words])

    assert code == 3
    assert "not run: no linux-image; try `apt-get update`" in capsys.readouterr().err


def test_a_machine_that_there_is_not_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "build", "--machine", "vax"]) == 2
    assert "no machine 'vax': choose one of" in capsys.readouterr().err


def test_an_image_is_told_in_one_line_with_its_contents_if_asked(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vm", "build", "--contents"]) == 0

    *contents, told = capsys.readouterr().out.splitlines()
    assert told == image.told
    assert contents[-1].split() == ["19", "/init"]


def test_an_image_as_json_says_what_it_is_made_of(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vm", "build", "--json", "--contents"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["machine"] == "aarch64"
    assert document["digest"] == image.digest
    digest = hashlib.sha256(INIT).hexdigest()
    assert document["contents"] == [{"path": "init", "size": 19, "digest": digest}]


TOLD: list[dict[str, object]] = [
    {"guest": "up"},
    {
        "guest": "doctor",
        "guarantees": [{"name": "seccomp", "state": "held", "gives": "a wall", "why": ""}],
        "kernel": {"release": "6.12"},
    },
    {"guest": "off", "code": 0},
]


def machine_that_tells(
    notes: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, console: str = ""
) -> None:
    def run(_setup: qemu.Setup, **way: Any) -> qemu.Ended:
        for note in notes:
            assert not way["evidence"](0.0, json.dumps(note).encode())
        way["told"](0.0, console)
        return qemu.Ended(0, False, False, console if "panic" in console else "", 0)

    monkeypatch.setattr(qemu, "run", run)


def test_what_holds_in_a_guest_is_told_as_the_doctor_tells_it(
    image: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_that_tells(TOLD, monkeypatch)

    assert main(["vm", "doctor"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["seccomp", "held", "a", "wall", "-"]
    assert lines[-1] == "1 held, 0 degraded, 0 absent; release 6.12"
    assert image.layers


@pytest.mark.parametrize(
    ("notes", "console", "why"),
    [
        (TOLD[:2], "Freeing memory", "Freeing memory"),
        ([*TOLD[:2], {"guest": "off", "code": 106}], "", "it said nothing"),
        (TOLD[:1], "", "it said nothing"),
        ([*TOLD[:1], {"guest": "crash", "text": "OSError: cgroup2"}], "", "OSError: cgroup2"),
        (TOLD, "Kernel panic - not syncing", "Kernel panic - not syncing"),
    ],
)
def test_a_guest_that_does_not_tell_to_its_end_is_red(
    notes: list[dict[str, object]],
    console: str,
    why: str,
    image: Image,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine_that_tells(notes, monkeypatch, console)

    assert main(["vm", "doctor"]) == 1

    told = capsys.readouterr()
    assert told.err.strip() == f"the machine told nothing: {why}"
    assert (told.out, bool(image.layers)) == ("", True)


def test_a_system_file_that_is_wrong_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm, "build_image", not_had)
    wrong = tmp_path / "system.toml"
    _ = wrong.write_text("[nothing]\n")

    assert main(["vm", "run", str(wrong)]) == 2


def test_the_memory_of_a_guest_is_the_same_wherever_it_is_written() -> None:
    assert VM_MEMORY == MEMORY_DEFAULT
