"""Nexus: the operating-system layer for Linux devices whose software is written in Python."""

from typing import Final

__version__: Final = "0.1.0"
