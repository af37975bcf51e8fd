"""A status without a test is found, and so is a test of a status that does not exist."""

from pathlib import Path
from typing import Final

import pytest

from tools import statuses
from tools.statuses import Refusal

FULL: Final = Refusal("abi", "Status", "QUEUE_FULL", 3, "the link holds depth messages")
LIMIT: Final = Refusal("timed", "TimedStatus", "OVER_LIMIT", 17, "64 timers already")

HEADER: Final = "import pytest\nfrom nexus.abi import Status\n"


def plant(root: Path, test: str, climber: str = "") -> Path:
    """A tree with one test file and one climber of rungs."""
    for name, text in {
        "tests/unit/test_x.py": HEADER + test,
        "src/nexus/services/selftest/climbing.py": climber,
    }.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    return root


def test_a_status_nobody_asserts_is_a_fault(tmp_path: Path) -> None:
    root = plant(tmp_path, "def test_nothing(): ...\n")

    found = statuses.faults([FULL], statuses.evidence(root, [FULL]))

    assert found == ["abi.QUEUE_FULL (the link holds depth messages): no test asserts this status"]


@pytest.mark.parametrize(
    "test",
    [
        "def test_it():\n    assert send() is Status.QUEUE_FULL\n",
        "def test_it():\n    assert all(s is Status.QUEUE_FULL for s in sent)\n",
        "def test_it():\n    refused(send, Status.QUEUE_FULL)\n",
        "@pytest.mark.parametrize('s', [Status.QUEUE_FULL])\ndef test_it(s):\n    assert s\n",
        "@pytest.mark.covers('abi.QUEUE_FULL')\ndef test_it(): ...\n",
        "class Box:\n    def test_it(self):\n        assert send() is Status.QUEUE_FULL\n",
    ],
)
def test_a_test_covers_what_it_asserts_or_declares(tmp_path: Path, test: str) -> None:
    root = plant(tmp_path, test)

    found = statuses.evidence(root, [FULL])

    assert found.tests == {"abi.QUEUE_FULL": ["tests/unit/test_x.py::test_it"]}
    assert statuses.faults([FULL], found) == []


@pytest.mark.parametrize(
    "test",
    [
        "def test_it():\n    send(Status.QUEUE_FULL)\n",
        "def test_it():\n    assert Status.QUEUE_FULL\n",
        "def test_it():\n    wanted = Status.QUEUE_FULL\n    assert send()\n",
        "@pytest.mark.parametrize('s', [Status.QUEUE_FULL])\ndef test_it(s): ...\n",
    ],
)
def test_a_status_that_is_only_named_is_a_fault(tmp_path: Path, test: str) -> None:
    root = plant(tmp_path, test)

    found = statuses.evidence(root, [FULL])

    assert found.tests == {"abi.QUEUE_FULL": ["tests/unit/test_x.py::test_it"]}
    assert len(statuses.faults([FULL], found)) == 1


def test_a_function_that_is_no_test_covers_nothing(tmp_path: Path) -> None:
    root = plant(tmp_path, "def fill():\n    assert send() is Status.QUEUE_FULL\n")

    found = statuses.evidence(root, [FULL])

    assert (found.tests, found.asserted) == ({"abi.QUEUE_FULL": []}, set())


def test_a_declared_status_that_does_not_exist_is_a_fault(tmp_path: Path) -> None:
    root = plant(tmp_path, "@pytest.mark.covers('timed.NO_SUCH')\ndef test_it(): ...\n")

    found = statuses.faults([], statuses.evidence(root, []))

    assert found == ["tests/unit/test_x.py::test_it: timed.NO_SUCH: there is no such status"]


def test_rungs_come_from_marks_and_from_those_who_climb_them(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        "@pytest.mark.covers('timed.OVER_LIMIT', rung=58)\ndef test_it(): ...\n",
        'def climb():\n    """#66: full, and full again."""\n    assert Status.QUEUE_FULL\n',
    )

    found = statuses.evidence(root, [FULL, LIMIT])

    assert found.rungs == {"abi.QUEUE_FULL": [66], "timed.OVER_LIMIT": [58]}


def test_every_protocol_and_the_kernel_are_asked() -> None:
    owners = {refusal.owner for refusal in statuses.declared()}

    assert {"abi", "wire", "init", "timed"} <= owners


def test_no_status_of_this_tree_is_without_a_test() -> None:
    refusals = statuses.declared()

    assert statuses.faults(refusals, statuses.evidence(statuses.ROOT, refusals)) == []
