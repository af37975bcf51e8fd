"""The scan for secrets finds what is planted: its own negative control."""

import base64
import json
from pathlib import Path

import pytest

from nexus.proof.leaks import Leaks
from tests.fakes.leaks import files_below

SECRET = bytes((7 * each + 3) % 256 for each in range(32))
OTHER = bytes(range(200, 232))
LEAKS = Leaks({"seed": SECRET, "other": OTHER})


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        SECRET[8:24],
        SECRET.hex().encode(),
        SECRET.hex().upper().encode(),
        repr(SECRET).encode(),
        repr(bytearray(SECRET)).encode(),
        repr(list(SECRET)).encode(),
        repr({"line": repr(SECRET)}).encode(),
        json.dumps(SECRET.decode("latin-1")).encode(),
        SECRET.decode("latin-1").encode(),
        base64.b64encode(SECRET),
        base64.b64encode(b"x" + SECRET),
        base64.b64encode(b"xy" + SECRET),
        base64.urlsafe_b64encode(b"xyz" + SECRET),
        base64.b64encode(SECRET)[3:],
    ],
)
def test_a_planted_secret_is_found_in_every_form(text: bytes) -> None:
    assert LEAKS.within(b"some line: " + text + b"\n and more") == {"seed"}


def test_nothing_is_found_where_nothing_is() -> None:
    data = bytes(range(128)) * 100

    assert LEAKS.within(data) == set()
    assert LEAKS.within(data + SECRET[:4]) == set(), "four bytes are nobody's"


def test_files_are_looked_at_by_name_but_for_the_one_left_out(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "core").write_bytes(b"\0" * 5000 + OTHER)
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "plain").write_bytes(b"nothing")

    assert LEAKS.among(files_below(tmp_path)) == {"deep/core": {"other"}, "secret": {"seed"}}
    assert LEAKS.among(files_below(tmp_path, but=tmp_path / "secret")) == {"deep/core": {"other"}}
