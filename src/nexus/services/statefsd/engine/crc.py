"""CRC-32C (Castagnoli), as a typed function; the library is in C (ADR 15)."""

from collections.abc import Callable
from typing import Final

from google_crc32c import value

crc32c: Final[Callable[[bytes], int]] = value
