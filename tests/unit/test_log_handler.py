"""Python's logging in a service's log."""

import logging
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from nexus.ipc import Peers
from nexus.log import Logger
from nexus.log.handler import BROKEN, ERROR_SIZE_MAX, LogHandler
from nexus.log.payload import Payload, unpack
from nexus.protocols.logd import FIELDS_SIZE_MAX, Level
from nexus.services.logd.checks import Looker
from tests.fakes.tinykernel import TinyKernel


class Told(Logger):
    """A log whose lines wait, to be looked at."""

    def lines(self) -> list[Payload]:
        return [unpack(each) for each in self._lines]


@pytest.fixture
def log() -> Told:
    kernel = TinyKernel()
    return Told(Peers(kernel.boot(kernel.task("plant")), b"seed"), ["logd"], level=Level.TRACE)


@pytest.fixture
def logger(log: Told) -> Iterator[logging.Logger]:
    handler = LogHandler(log)
    logger = logging.getLogger("plant.valve")
    logger.addHandler(handler)
    logger.setLevel(1)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)


def test_levels_names_and_messages_are_those_of_the_log(logger: logging.Logger, log: Told) -> None:
    for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, 5):
        logger.log(level, "valve %d of %s", level, "9")

    assert [Level(each.level) for each in log.lines()] == [
        Level.ERROR,
        Level.ERROR,
        Level.WARN,
        Level.INFO,
        Level.DEBUG,
        Level.TRACE,
    ]
    assert {each.scope for each in log.lines()} == {"plant.valve"}
    assert log.lines()[0].text == "valve 50 of 9"


def test_an_exception_is_told_with_where_it_was_raised_and_is_bounded(
    logger: logging.Logger, log: Told
) -> None:
    def deep(count: int) -> None:
        if not count:
            raise ValueError("x" * 10_000)
        deep(count - 1)

    try:
        deep(50)
    except ValueError:
        logger.exception("it failed")

    (line,) = log.lines()
    fields = {field.key: field.value for field in line.fields}
    assert fields["error"].startswith("ValueError: xxx")
    assert len(fields["error"]) == ERROR_SIZE_MAX
    assert 'raise ValueError("x" * 10_000)' in fields["traceback"]
    assert sum(len(each.key) + len(each.value) + 2 for each in line.fields) <= FIELDS_SIZE_MAX
    assert Looker(is_core=False).refusal_of(line) is None


@pytest.mark.parametrize("arguments", [("%d", "no number"), ("%s %s", "one"), ("%(a)s", {})])
def test_a_message_that_does_not_fit_its_arguments_is_said_to_be_so(
    log: Told, arguments: tuple[Any, ...]
) -> None:
    record = logging.LogRecord("plant", logging.INFO, "", 1, arguments[0], arguments[1:], None)

    _ = LogHandler(log).handle(record)

    (line,) = log.lines()
    assert line.text == BROKEN
    assert [(field.key, field.value) for field in line.fields] == [("format", arguments[0])]


def test_records_of_another_thread_wait_for_the_tasks_own(
    logger: logging.Logger, log: Told
) -> None:
    thread = Thread(target=lambda: logger.info("from elsewhere"))
    thread.start()
    thread.join()

    assert log.lines() == []
    assert log.due
    assert [each[1] for each in log._elsewhere] == ["from elsewhere"]
