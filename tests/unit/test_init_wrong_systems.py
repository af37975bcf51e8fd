"""Every wrong system of tests/wrong_systems gets the sentence that stands at its top.

A file begins with four comments: which file is blamed, at which line, what was expected there,
what was found. Their programs and policy files are beside them.
"""

import sys
from pathlib import Path
from typing import Final

import pytest

from nexus.init.errors import SystemFileError
from nexus.init.plan import load_plan

FOLDER: Final = Path(__file__).parents[1] / "wrong_systems"
FILES: Final = sorted(FOLDER.glob("*.toml"))
KEYS: Final = ("file", "line", "expected", "found")


def claims_of(file: Path) -> dict[str, str]:
    """The comments at the top of a wrong system."""
    head = file.read_text().splitlines()[: len(KEYS)]
    return dict(line.removeprefix("# ").split(": ", 1) for line in head)


def test_there_is_a_wrong_system_for_every_check() -> None:
    assert len(FILES) >= 100
    assert all(tuple(claims_of(file)) == KEYS for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_wrong_system_gets_its_sentence(file: Path) -> None:
    claims = claims_of(file)
    path = list(sys.path)

    with pytest.raises(SystemFileError) as caught:
        load_plan(file)

    error = caught.value
    blamed = FOLDER / claims["file"]
    assert (error.path, str(error.line)) == (blamed, claims["line"])
    assert (error.expected, error.found) == (claims["expected"], claims["found"])
    assert str(error).startswith(f"{blamed}:{error.line}: expected ")
    assert str(error).isprintable()
    assert sys.path == path
