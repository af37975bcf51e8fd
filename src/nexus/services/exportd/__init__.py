"""exportd: the one service that speaks to the outside, as OpenMetrics and OTLP."""

from nexus.runtime.program import program_of
from nexus.services.exportd.service import Exportd

main = program_of(Exportd)

__all__ = ["main"]
