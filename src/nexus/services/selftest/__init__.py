"""selftest-client: climbs the ladder through public protocols, as an ordinary service."""

from nexus.services.selftest.main import main

__all__ = ["main"]
