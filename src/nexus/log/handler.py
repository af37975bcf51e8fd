"""The records of Python's own logging, in a service's log.

    logging.getLogger().addHandler(LogHandler(context.log))

Levels, logger names and messages become those of the log, an exception becomes fields of bounded
size. Records of other threads are queued and taken when the service is at leisure; nothing here
waits, and a message that does not fit its arguments is said to be so.
"""

import logging
import traceback
from typing import Final

from nexus.log.line import FieldValue
from nexus.log.logger import Logger
from nexus.protocols.logd import Level

TRACEBACK_SIZE_MAX: Final = 360  # characters of a traceback's end; fields have 512 bytes together
ERROR_SIZE_MAX: Final = 80  # characters of what an exception says
FRAMES_MAX: Final = 8  # of a traceback, the innermost ones
BROKEN: Final = "a log message that cannot be formatted"

LEVELS: Final = (
    (logging.ERROR, Level.ERROR),
    (logging.WARNING, Level.WARN),
    (logging.INFO, Level.INFO),
    (logging.DEBUG, Level.DEBUG),
)


class LogHandler(logging.Handler):
    """Writes into `log`. Made in the task's own thread, whose records go the straight way."""

    def __init__(self, log: Logger, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._log = log
        self._thread = logging.makeLogRecord({}).thread

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a message that cannot be formatted is said to be so."""
        level = level_of(record.levelno)
        fields: dict[str, FieldValue] = {}
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError, IndexError, AttributeError):
            text = BROKEN
            fields["format"] = str(record.msg)[:ERROR_SIZE_MAX]
        if record.exc_info and record.exc_info[1] is not None:
            fields |= exception_fields(record.exc_info[1])
        if record.thread == self._thread:
            _ = self._log.write(level, text, fields, scope=record.name)
        else:
            self._log.write_from_elsewhere(level, text, fields, record.name)


def level_of(number: int) -> Level:
    """The level of a number of logging's."""
    return next((level for least, level in LEVELS if number >= least), Level.TRACE)


def exception_fields(error: BaseException) -> dict[str, FieldValue]:
    """What is said of an exception: what it is, what it says, and where it was raised."""
    lines = traceback.format_tb(error.__traceback__, limit=-FRAMES_MAX)
    said = traceback.format_exception_only(error)[-1].strip()
    return {
        "error": said[:ERROR_SIZE_MAX],
        "traceback": "".join(lines)[-TRACEBACK_SIZE_MAX:],
    }
