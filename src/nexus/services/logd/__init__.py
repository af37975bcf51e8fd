"""logd: the bounded journal of the system. `main` is the program."""

from nexus.services.logd.service import main

__all__ = ["main"]
