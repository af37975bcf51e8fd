"""Places that a command is told to read or write and cannot: a sentence, and no wait."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from nexus.cli import ask
from nexus.cli.command import main
from nexus.protocols.keystored import Signature
from nexus.protocols.statefsd import Stored, Value
from tests.unit.test_cli_state import WELL, Operator, an_image

FULL = Path("/dev/full")
NO_ROOM = "nexus: cannot write the answer: No space left on device\n"
FAULT = "a fault of nexus itself"


class Signer:
    """A connection to a system that signs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def client(self) -> "Signer":
        return self

    def relay(self, _service: str, _protocol: Any, _request: Any, _seconds: float) -> Any:
        return Signature(bytes(64))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """The running system answers everything so."""

    def made(answer: Any) -> None:
        monkeypatch.setattr(ask, "asked", lambda _name: Operator(lambda _request: answer))

    return made


@pytest.mark.parametrize("place", ["", "/dev/full", "missing/file"])
def test_a_place_that_takes_no_value_is_named(
    place: str, answering: Any, tmp_path: Path, capsys: Any
) -> None:
    answering(Value(b"value", 4))
    output = tmp_path / place if place else tmp_path

    assert main(["state", "get", "/state/t/k", "-o", str(output)]) == 1
    assert capsys.readouterr().err.startswith(f"nexus: cannot write {output}: ")


def test_a_place_that_takes_no_signature_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(ask, "asked", lambda _name: Signer())
    payload = tmp_path / "payload"
    payload.write_bytes(b"text")

    assert main(["keys", "sign", str(payload), "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"nexus: cannot write {tmp_path}: Is a directory\n"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["state", "get", "/state/t/k"], Value(b"value", 4)),
        (["state", "get", "/state/t/k"], Value(bytes(20_000), 4)),
        (["state", "get", "/state/t/k", "--json"], Value(b"value", 4)),
        (["state", "check", "--json"], WELL),
        (["state", "check"], WELL),
        (["state", "put", "/state/t/k", "1"], Stored(1, durable=True, repeated=False)),
    ],
)
def test_an_answer_that_cannot_be_written_is_said(
    words: list[str],
    answer: Any,
    answering: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    answering(answer)
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = main(words)

    assert code == 1
    assert capsys.readouterr().err == NO_ROOM


def run(words: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A command in a shell of its own, which gives it the streams that `words` say."""
    nexus = (
        f"{sys.executable} -c 'import sys; from nexus.cli.command import main; sys.exit(main())'"
    )
    return subprocess.run(
        ["/bin/sh", "-c", words.replace("nexus", nexus, 1)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=30,
    )


def test_closed_streams_are_said_to_be(tmp_path: Path) -> None:
    an_image(tmp_path / "disk.img")

    closed = run("nexus state check disk.img >&-", tmp_path)
    full = run("nexus state check disk.img --json >/dev/full", tmp_path)
    mute = run("nexus state check disk.img 2>&-", tmp_path)

    assert (closed.returncode, closed.stderr) == (
        1,
        "nexus: cannot write the answer: Bad file descriptor\n",
    )
    assert (full.returncode, full.stderr) == (1, NO_ROOM)
    assert (mute.returncode, mute.stdout.count("/state/t/")) == (0, 3)


@pytest.mark.parametrize(
    "words", [["state", "put", "/state/t/k", "--file", "-"], ["keys", "sign", "-"]]
)
def test_a_closed_standard_input_is_said_to_be(
    words: list[str], answering: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answering(None)
    monkeypatch.setattr(sys, "stdin", None)

    assert main(words) == 2
    assert capsys.readouterr().err == "nexus: the standard input is closed\n"


def test_no_pipe_is_waited_for(answering: Any, tmp_path: Path, capsys: Any) -> None:
    answering(None)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    assert main(["keys", "sign", str(pipe)]) == 2
    assert capsys.readouterr().err == (
        f"nexus: cannot read {pipe}: it is no file; `-` reads the standard input\n"
    )
    for place in (str(pipe), "/dev/zero", str(tmp_path)):
        assert main(["state", "check", place]) == 2
        assert capsys.readouterr().err == (
            f"nexus: {place} is no disk image: it is neither a file nor a block device\n"
        )


@pytest.mark.parametrize(
    "words",
    [
        ["--every", "0"],
        ["--seed", "-1"],
        ["--seeds", "0"],
        ["--subsets", "-1"],
        ["--cut", "-1"],
        ["--report", "/dev/null/report"],
    ],
)
def test_wrong_numbers_about_a_power_cut_are_wrong_usage(words: list[str], capsys: Any) -> None:
    assert main(["sim", "powercut", "state", "--workload", "puts", *words]) == 2
    error = capsys.readouterr().err
    assert "is no whole number of at least" in error or "cannot write /dev/null/report" in error
    assert FAULT not in error
