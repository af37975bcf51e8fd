"""metricsd: series, spans and their history, bounded. `main` is the program."""

from nexus.services.metricsd.service import main

__all__ = ["main"]
