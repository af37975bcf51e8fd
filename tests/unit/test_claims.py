"""A public claim without a test that exists is found."""

from pathlib import Path

import pytest

from tools import claims


def plant(root: Path, rows: str) -> Path:
    """A tree with these claims, one plain test and one stateful test."""
    (root / "docs").mkdir()
    (root / "docs/claims.md").write_text(f"| id | claim | tests |\n| --- | --- | --- |\n{rows}")
    (root / "tests").mkdir()
    (root / "tests/test_x.py").write_text(
        "def test_y(): ...\n\nclass Box:\n    def test_in(self): ...\n\nTestZ = Box.TestCase\n"
    )
    return root


@pytest.mark.parametrize(
    "test", ["tests/test_x.py::test_y", "tests/test_x.py::Box::test_in", "tests/test_x.py::TestZ"]
)
def test_a_claim_with_a_test_holds(tmp_path: Path, test: str) -> None:
    root = plant(tmp_path, f"| C1 | It works. | `{test}` |\n")

    assert list(claims.faults(root)) == []


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ("| C1 | It works. | |\n", "C1 has no test: It works."),
        ("| C1 | It works. | later |\n", "C1 has no test: It works."),
        (
            "| C1 | It works. | `tests/test_x.py::test_gone` |\n",
            "C1 names a test that is not there: tests/test_x.py::test_gone",
        ),
        (
            "| C1 | It works. | `tests/test_no.py::test_y` |\n",
            "C1 names a test that is not there: tests/test_no.py::test_y",
        ),
        (
            "| C1 | A. | `tests/test_x.py::test_y` |\n| C1 | B. | `tests/test_x.py::test_y` |\n",
            "C1 is given twice",
        ),
    ],
)
def test_a_claim_that_nothing_holds_is_named(tmp_path: Path, rows: str, fault: str) -> None:
    root = plant(tmp_path, rows)

    assert list(claims.faults(root)) == [fault]


def test_a_page_may_not_quote_a_claim_that_is_not_made(tmp_path: Path) -> None:
    root = plant(tmp_path, "| C1 | It works. | `tests/test_x.py::test_y` |\n")
    (root / "README.md").write_text("It works (C1) and flies (C2).\n")

    assert list(claims.faults(root)) == ["README.md quotes C2, which docs/claims.md has not got"]


def test_the_promise_table_may_not_name_a_test_that_is_not_there(tmp_path: Path) -> None:
    root = plant(tmp_path, "| C1 | It works. | `tests/test_x.py::test_y` |\n")
    (root / "docs/reference").mkdir()
    (root / "docs/reference/promises.md").write_text("held `tests/test_x.py::test_gone`\n")

    assert list(claims.faults(root)) == [
        "docs/reference/promises.md names a test that is not there: tests/test_x.py::test_gone"
    ]
