"""statefsd: values under path-like keys, durable when it says so. `main` is the program."""

from nexus.services.statefsd.service import main

__all__ = ["main"]
