"""updated: signed system sets in two slots, tried, and kept or left."""

from nexus.runtime.program import program_of
from nexus.services.updated.service import Updated

main = program_of(Updated)

__all__ = ["main"]
