"""Log lines of a task: bounded, counted, in its own ring for logd, and never waiting for it."""

from nexus.log.line import FieldValue, Line, make_line
from nexus.log.logger import (
    DISCOVERY_WAIT,
    LOGD_NAME,
    LOOK_PAUSE,
    LOOK_PAUSE_MAX,
    QUEUE_MAX,
    RING_SIZE_DEFAULT,
    LogCounts,
    Logger,
)

__all__ = [
    "DISCOVERY_WAIT",
    "LOGD_NAME",
    "LOOK_PAUSE",
    "LOOK_PAUSE_MAX",
    "QUEUE_MAX",
    "RING_SIZE_DEFAULT",
    "FieldValue",
    "Line",
    "LogCounts",
    "Logger",
    "make_line",
]
