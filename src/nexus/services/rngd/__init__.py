"""rngd: tested entropy, a bounded amount per client per second. `main` is the program."""

from nexus.services.rngd.service import main

__all__ = ["main"]
