"""Rungs about what survives: the death of statefsd, a restart of the system, a power cut."""

from typing import Final

CUT_LINE: Final = "the power may be cut"  # said before the batch that a power cut ends
