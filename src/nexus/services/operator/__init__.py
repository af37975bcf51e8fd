"""operator: the door through which a person's commands reach a running system."""

from nexus.services.operator.main import main

__all__ = ["main"]
