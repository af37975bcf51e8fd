"""Living memory that a task writes and another reads: a ring of records, a page of words and spans.

Nobody else touches their bytes. The formats are docs/reference/telemetry-format.md. A writer can be
killed between any two stores, or be hostile; a reader copies first, checks the copy, and never
raises, waits or looks outside. One task writes, from one thread.
"""

from nexus.telemetry.page import (
    GROUP_WORDS_MAX,
    GROUP_WORDS_MIN,
    PAGE_SIZE_MIN,
    PASSES_MAX,
    WORD_MAX,
    Group,
    NoPage,
    PageReader,
    PageWriter,
    page_shape,
)
from nexus.telemetry.ring import (
    DOUBTS_MAX,
    RING_HEADER_SIZE,
    RING_SIZE_MIN,
    NoRing,
    RingReader,
    RingWriter,
    payload_size_max,
)
from nexus.telemetry.span import Called, SpanReader, SpanRecord, SpanWriter, called, decode_span

__all__ = [
    "DOUBTS_MAX",
    "GROUP_WORDS_MAX",
    "GROUP_WORDS_MIN",
    "PAGE_SIZE_MIN",
    "PASSES_MAX",
    "RING_HEADER_SIZE",
    "RING_SIZE_MIN",
    "WORD_MAX",
    "Called",
    "Group",
    "NoPage",
    "NoRing",
    "PageReader",
    "PageWriter",
    "RingReader",
    "RingWriter",
    "SpanReader",
    "SpanRecord",
    "SpanWriter",
    "called",
    "decode_span",
    "page_shape",
    "payload_size_max",
]
