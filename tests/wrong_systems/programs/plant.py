"""A plant whose classes are each wrong in one way, but for Valve."""

from typing import Any, Final

LIMIT: Final = 3


class Valve:
    """Nothing is wrong with this one."""

    def __init__(self, context: Any) -> None:
        self.context = context

    async def handle(self, call: Any, request: Any) -> None: ...


class Silent:
    """It answers nobody."""


class Greedy(Valve):
    """It wants more than its context."""

    def __init__(self, context: Any, pump: Any) -> None:
        super().__init__(context)
        self.pump = pump
