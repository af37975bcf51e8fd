"""Is this a series, an event, a span at all? What is looked at before anything is used up.

Each check answers with the status to refuse with, or None. What is no shape of ours is
INVALID_ARGS, what is only too large OVER_LIMIT; in a request with both it is the first.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from nexus.abi import ServiceId
from nexus.protocols.metricsd import (
    KEY_PATTERN,
    KEY_SIZE_MAX,
    LABELS_MAX,
    LABELS_SIZE_MAX,
    NAME_PATTERN,
    NAME_SIZE_MAX,
    SPAN_SIZE,
    TRACE_SIZE,
    VALUE_SIZE_MAX,
    Kind,
    Label,
    MetricsdStatus,
)
from nexus.protocols.metricsd_keys import looks_secret

NAME: Final = re.compile(NAME_PATTERN)
KEY: Final = re.compile(KEY_PATTERN)
MAKER_SIZE: Final = 4  # bytes of a span id that name its maker
LOW_HALF: Final = 0xFFFF_FFFF
NO_SPAN: Final = bytes(SPAN_SIZE)
NO_TRACE: Final = bytes(TRACE_SIZE)
Fault = MetricsdStatus | None


def labels_fault(labels: Sequence[Label]) -> Fault:
    """What is wrong with labels or attributes."""
    keys = [label.key for label in labels]
    if len(set(keys)) != len(keys):
        return MetricsdStatus.INVALID_ARGS
    if any(KEY.match(key) is None or looks_secret(key) for key in keys):
        return MetricsdStatus.INVALID_ARGS
    if len(labels) > LABELS_MAX or any(len(key) > KEY_SIZE_MAX for key in keys):
        return MetricsdStatus.OVER_LIMIT
    if any(len(label.value) > VALUE_SIZE_MAX for label in labels):
        return MetricsdStatus.OVER_LIMIT
    return MetricsdStatus.OVER_LIMIT if labels_size(labels) > LABELS_SIZE_MAX else None


def labels_size(labels: Sequence[Label]) -> int:
    """Bytes of UTF-8 of all keys and values."""
    return sum(len(label.key.encode()) + len(label.value.encode()) for label in labels)


def name_fault(name: str) -> Fault:
    """What is wrong with the name of a metric or a span."""
    if NAME.match(name) is None:
        return MetricsdStatus.INVALID_ARGS
    return MetricsdStatus.OVER_LIMIT if len(name) > NAME_SIZE_MAX else None


def series_fault(name: str, labels: Sequence[Label]) -> Fault:
    """What is wrong with the name and the labels of a series."""
    return worst(name_fault(name), labels_fault(labels))


def bounds_fault(kind: Kind, bounds: Sequence[int]) -> Fault:
    """What is wrong with the bounds of buckets: upwards, and for histograms only."""
    if kind is not Kind.HISTOGRAM:
        return MetricsdStatus.INVALID_ARGS if bounds else None
    rises = all(low < high for low, high in pairwise(bounds))
    return None if bounds and rises else MetricsdStatus.INVALID_ARGS


def is_bound_to(span: bytes, service: ServiceId) -> bool:
    """Whether the kernel's sender made this span id: its first bytes name it."""
    return span[:MAKER_SIZE] == maker_of(service)


def maker_of(service: ServiceId) -> bytes:
    """The first bytes of every span id of a service: the low half of its id, little-endian."""
    return (service & LOW_HALF).to_bytes(MAKER_SIZE, "little")


def worst(*faults: Fault) -> Fault:
    """INVALID_ARGS before any other fault."""
    found = [fault for fault in faults if fault is not None]
    if MetricsdStatus.INVALID_ARGS in found:
        return MetricsdStatus.INVALID_ARGS
    return found[0] if found else None
