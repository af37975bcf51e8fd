"""What tests/vm/conftest.py makes of a test that finds no machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
TIME_MAX: Final = 60  # seconds of a pytest with two tests
TESTS: Final = """
import pytest


@pytest.fixture
def image():
    pytest.skip("not run: there is no qemu-system-aarch64")


def test_in_a_machine(image):
    raise AssertionError("there is none")


@pytest.mark.xfail(raises=LookupError)
def test_that_is_expected_to_fail():
    raise LookupError
"""


@pytest.mark.parametrize(
    ("required", "code", "told"),
    [
        ("1", 1, "1 xfailed, 1 error"),
        ("0", 0, "1 skipped, 1 xfailed"),
        (None, 0, "1 skipped, 1 xfailed"),
    ],
)
def test_without_a_machine_nothing_is_green_where_one_is_required(
    tmp_path: Path, required: str | None, code: int, told: str
) -> None:
    _ = shutil.copy(ROOT / "tests/vm/conftest.py", tmp_path)
    _ = (tmp_path / "test_machine.py").write_text(TESTS, "utf-8")
    _ = (tmp_path / "pytest.ini").write_text("[pytest]\n", "utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "NEXUS_VM_REQUIRED"}
    environment["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT}"
    if required is not None:
        environment["NEXUS_VM_REQUIRED"] = required

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIME_MAX,
        check=False,
    )

    assert done.returncode == code, done.stdout
    assert told in done.stdout
    assert "there is no qemu-system-aarch64" in done.stdout or not code
