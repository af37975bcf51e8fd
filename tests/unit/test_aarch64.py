"""What `make aarch64` brings, and what it says where that cannot be had."""

from pathlib import Path
from typing import Final

import pytest

from tools import aarch64

ONE: Final = "one==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb"
TWO: Final = "two-more==2.0 \\\n    --hash=sha256:cc"
PINS: Final = f"# made\n{ONE}\n    # via\n    #   two-more\n{TWO}\n    # via -r dev.in\n"


def test_a_pin_is_taken_with_its_hashes_and_without_its_comments() -> None:
    assert aarch64.pins_of(PINS, frozenset({"one"})) == f"{ONE}\n"
    assert aarch64.pins_of(PINS, frozenset({"two-more", "one"})) == f"{ONE}\n{TWO}\n"


def test_a_wheel_that_is_not_pinned_is_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"does not pin \['more', 'two'\]"):
        _ = aarch64.pins_of(PINS, frozenset({"one", "two", "more"}))


def test_this_tree_pins_all_wheels() -> None:
    text = (aarch64.ROOT / "requirements/dev.txt").read_text("utf-8")

    pins = aarch64.pins_of(text, aarch64.WHEELS)

    assert pins.count("==") == len(aarch64.WHEELS)


def not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **programs: str) -> None:
    """Run it with these programs and no others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in programs.items():
        program = folder / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(aarch64, "WORK", tmp_path / "work")

    assert aarch64.main() == aarch64.NOT_RUN


def test_without_apt_it_is_not_run_and_never_green(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    not_run(monkeypatch, tmp_path)

    told = "not run: there is no apt-get; run `make aarch64` on Debian\n"
    assert capsys.readouterr().out == told


def test_what_apt_cannot_bring_is_named_with_a_command_that_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refusing = 'case "$*" in *install*) echo "E: at host.invalid"; exit 100 ;; esac'

    not_run(monkeypatch, tmp_path, apt_get=refusing, dpkg="echo amd64", dpkg_deb="")

    out, err = capfd.readouterr()
    wanted = "python3:arm64 and qemu-user-static:amd64"
    hint = "apt-cache policy python3:arm64 qemu-user-static"
    assert out == f"not run: no {wanted}; try `{hint}`\n"
    assert "host.invalid" in err, "what names a host stays out of the report"


def test_a_run_that_is_not_whole_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = iter([(0, ["ring: all true"]), (1, ["1 failed"])])
    monkeypatch.setattr(aarch64, "_run", lambda *_: next(ends))
    monkeypatch.setattr(aarch64, "_output", lambda _: "qemu")

    assert aarch64.report() == aarch64.RED
    assert capsys.readouterr().out.endswith("1 failed\nverdict: RED\n")


def test_the_run_that_is_committed_is_green_and_claims_no_order() -> None:
    text = (aarch64.ROOT / "docs/reference/aarch64.txt").read_text("utf-8")

    assert "No proof of ordering" in text
    assert "inside: aarch64, CPython" in text
    assert text.count("found after") == 3
    assert text.endswith("verdict: green\n")
