"""`just test-pkg NAME` finds the tests of a package by what they import."""

from pathlib import Path

import pytest

from tools.package_tests import files_of, main


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ipc", ["test_a.py"]),
        ("nexus-ipc", ["test_a.py"]),
        ("timed", ["test_b.py", "test_c.py"]),
        ("sim", ["test_c.py"]),
        ("abi", []),
    ],
)
def test_a_test_belongs_to_what_it_imports(tmp_path: Path, name: str, found: list[str]) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("from nexus.ipc.retry import until\n")
    (tmp_path / "tests/test_b.py").write_text("from nexus.services.timed import Timed\n")
    (tmp_path / "tests/test_c.py").write_text(
        "import nexus.protocols.timed\nfrom nexus.kernel import sim\n"
    )

    assert [path.name for path in files_of(tmp_path, name)] == found


def test_a_package_without_tests_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-package"]) == 2
    assert "no test imports 'no-such-package'" in capsys.readouterr().err
