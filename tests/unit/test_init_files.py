"""Files that people write: what is no regular file of bounded size is refused unread, at once."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from nexus.cli import main
from nexus.init.errors import SystemFileError
from nexus.init.files import WrongFile, read_whole
from nexus.init.plan import load_plan, load_policy

OPEN: Final = Path("/proc/self/fd")
SIZE_MAX: Final = 100  # bytes
TIME_MAX: Final = 10.0  # s; a read that waits would wait for ever
SYSTEM: Final = """[system]
name = "test"
path = ["."]
policy = ["base.toml"]

[service.timed]
program = "timed"

[service.valve]
module = "valve_of_reload:Valve"
protocol = "nexus.protocols.timed"
capabilities = ["x.y"]
"""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def nowhere(path: Path) -> None:
    path.symlink_to(path.name)


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room, and would take all memory


Making = Callable[[Path], None]
WRONG: Final[tuple[tuple[Making, str, str], ...]] = (
    (pipe, "that is a regular file", "a named pipe"),
    (device, "that is a regular file", "a device"),
    (folder, "that is a regular file", "a directory"),
    (listening, "that can be read", "No such device or address"),
    (nowhere, "that can be read", "Too many levels of symbolic links"),
    (large, f"of at most {SIZE_MAX} bytes", f"{2**40} bytes"),
)


def in_time(work: Callable[[], None]) -> None:
    """Do it in a thread; a read that waits fails the test instead of holding it up."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 (is raised by the test again)
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIME_MAX)
    assert not thread.is_alive(), "it waits"
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    ("make", "rule", "found"), WRONG, ids=[making.__name__ for making, _, _ in WRONG]
)
def test_what_is_no_regular_file_of_bounded_size_is_refused_unread(
    tmp_path: Path, make: Making, rule: str, found: str
) -> None:
    file = tmp_path / "x"
    make(file)
    before = len(list(OPEN.iterdir()))

    def read() -> None:
        with pytest.raises(WrongFile) as caught:
            _ = read_whole(file, SIZE_MAX)
        assert (caught.value.rule, caught.value.found) == (rule, found)

    in_time(read)
    assert len(list(OPEN.iterdir())) == before


def test_a_file_of_the_largest_size_is_read_whole_and_one_byte_more_is_not(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(range(SIZE_MAX)))
    assert read_whole(file, SIZE_MAX) == bytes(range(SIZE_MAX))

    file.write_bytes(bytes(SIZE_MAX + 1))
    with pytest.raises(WrongFile, match="found 101 bytes"):
        _ = read_whole(file, SIZE_MAX)


def test_a_file_that_has_more_than_its_size_says_is_bounded_too() -> None:
    """The files of /proc have size 0."""
    assert read_whole(Path("/proc/self/comm"), SIZE_MAX)
    with pytest.raises(WrongFile, match="of at most 3 bytes, found more"):
        _ = read_whole(Path("/proc/self/status"), 3)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (pipe, "expected a file that is a regular file, found a named pipe"),
        (device, "expected a file that is a regular file, found a device"),
        (large, "expected a file of at most 262144 bytes, found 1099511627776 bytes"),
    ],
)
def test_check_says_at_once_what_is_wrong_with_the_system_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Making, sentence: str
) -> None:
    file = tmp_path / "system.toml"
    make(file)
    codes: list[int] = []

    in_time(lambda: codes.append(main(["check", str(file)])))

    assert codes == [2]
    assert capsys.readouterr().err == f"nexus: {file}:1: {sentence}\n"


@pytest.mark.parametrize(
    ("make", "expected", "found"),
    [
        (pipe, "a policy file that is a regular file", '"base.toml": a named pipe'),
        (device, "a policy file that is a regular file", '"base.toml": a device'),
        (large, "a policy file of at most 65536 bytes", f'"base.toml": {2**40} bytes'),
    ],
)
def test_a_policy_file_is_read_no_other_way_neither_at_a_boot_nor_at_a_reload(
    tmp_path: Path, make: Making, expected: str, found: str
) -> None:
    (tmp_path / "system.toml").write_text(SYSTEM)
    make(tmp_path / "base.toml")

    def reload() -> None:
        with pytest.raises(SystemFileError) as caught:
            _ = load_policy(tmp_path / "system.toml")
        assert (caught.value.line, caught.value.expected, caught.value.found) == (
            4,
            expected,
            found,
        )

    in_time(reload)


def test_a_reload_reads_the_policy_of_the_plan_and_runs_no_program(tmp_path: Path) -> None:
    (tmp_path / "system.toml").write_text(SYSTEM)
    (tmp_path / "base.toml").write_text('[allow]\ntimed = ["a.b"]\n')
    again = load_policy(tmp_path / "system.toml")  # its valve is not there

    valve = "class Valve:\n    def __init__(self, context): ...\n    def handle(self, c, r): ...\n"
    (tmp_path / "valve_of_reload.py").write_text(valve)
    assert load_plan(tmp_path / "system.toml").policy == again
    assert [right.name for right in again.allow["timed"]] == ["a.b"]
