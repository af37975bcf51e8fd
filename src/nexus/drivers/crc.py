"""CRC-32C (Castagnoli), as a typed function; the library is in C (ADR 15).

It comes with a fallback in Python, a hundred times slower: a disk would take minutes to open and
no probe be answered meanwhile. Who opens a store refuses to without IS_FAST.
"""

from collections.abc import Callable
from typing import Final

from google_crc32c import extend as _extend
from google_crc32c import implementation, value

IS_FAST: Final = implementation == "c"
SLOW: Final = "google-crc32c is here without its compiled part: install a wheel that has it"
crc32c: Final[Callable[[bytes], int]] = value
extend: Final[Callable[[int, bytes], int]] = _extend  # the checksum of what goes on with these
