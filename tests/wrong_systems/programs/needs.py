"""It needs what nobody has installed."""

from nexus_pump_driver import Pump  # type: ignore[import-not-found]

__all__ = ["Pump"]
