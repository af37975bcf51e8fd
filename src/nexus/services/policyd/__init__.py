"""policyd: the one who decides who may do what."""

from nexus.services.policyd.main import main

__all__ = ["main"]
