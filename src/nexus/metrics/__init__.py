"""Counters, gauges, histograms and spans of a task: a store into its own page, read by metricsd."""

from nexus.metrics.metrics import (
    DEFAULT_BOUNDS,
    METRICSD_NAME,
    SERIES_MAX,
    MetricCounts,
    Metrics,
)
from nexus.metrics.series import Counter, Gauge, Histogram
from nexus.metrics.spans import Recorder, Span, TaskTrail, Tracing

__all__ = [
    "DEFAULT_BOUNDS",
    "METRICSD_NAME",
    "SERIES_MAX",
    "Counter",
    "Gauge",
    "Histogram",
    "MetricCounts",
    "Metrics",
    "Recorder",
    "Span",
    "TaskTrail",
    "Tracing",
]
