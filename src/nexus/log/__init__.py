"""Log lines of a task: bounded, counted, sent to logd without ever waiting for it."""

from nexus.log.line import FieldValue, Line, make_line
from nexus.log.logger import (
    DISCOVERY_WAIT,
    LOGD_NAME,
    LOOK_PAUSE,
    LOOK_PAUSE_MAX,
    QUEUE_MAX,
    LogCounts,
    Logger,
)

__all__ = [
    "DISCOVERY_WAIT",
    "LOGD_NAME",
    "LOOK_PAUSE",
    "LOOK_PAUSE_MAX",
    "QUEUE_MAX",
    "FieldValue",
    "Line",
    "LogCounts",
    "Logger",
    "make_line",
]
