"""execd: starts programs under policy and tells why one crashed. `main` is the program."""

from nexus.services.execd.service import main

__all__ = ["main"]
