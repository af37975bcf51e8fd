"""timed: timers that fire, coalesced by the class of their owner, and sleeps that block nobody."""

from nexus.services.timed.service import Timed, main

__all__ = ["Timed", "main"]
