"""keystored: the device key and every service's small values, sealed at rest."""

from nexus.runtime.program import program_of
from nexus.services.keystored.service import Keystored

main = program_of(Keystored)

__all__ = ["main"]
