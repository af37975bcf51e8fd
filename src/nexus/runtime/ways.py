"""Ways to services that are asked now and then, looked for before somebody needs them.

    lacks --look--> held
          --LOOKS_MAX looks, ever further apart--> looked for when it is asked

What a service holds it then holds from its start on, or soon afterwards, whoever was late. Of a
service that it may not ask, or only posts to, it holds none.
"""

from typing import Final

from nexus.abi import Nanos
from nexus.runtime.program import Context, Unreachable
from nexus.wire import Protocol

LOOK_WAIT: Final = Nanos(50_000_000)  # ns for each in a later look; nobody is served meanwhile
LOOK_PAUSE: Final = Nanos(500_000_000)  # ns before the first, doubling
LOOKS_MAX: Final = 6  # over 31 s: longer than any planned start lasts


class Ways:
    """Those of one service. `start` looks first; from then on `next_time` and `on_time` are to be
    part of the service's own."""

    def __init__(self, context: Context, wanted: dict[str, Protocol]) -> None:
        uses, posts = context.config.uses, context.config.posts
        self._context = context
        self._lacks = {
            name: protocol
            for name, protocol in wanted.items()
            if name in uses and name not in posts
        }
        self._looks = 0
        self._due: Nanos | None = None

    async def start(self, wait: Nanos) -> None:
        """Look for all of them, one after the other, `wait` ns in all."""
        until = await self._context.after(wait)
        self._keep({name: await self._is_held(name, until) for name in self._lacks})
        await self._plan()

    def next_time(self) -> Nanos | None:
        """When to look again."""
        return self._due

    async def on_time(self, now: Nanos) -> None:
        """Look for those that lack, if it is time; none waits for another one's sake."""
        if self._due is None or now < self._due:
            return
        after = self._context.after
        self._keep(
            {name: await self._is_held(name, await after(LOOK_WAIT)) for name in self._lacks}
        )
        await self._plan()

    def _keep(self, held: dict[str, bool]) -> None:
        self._lacks = {name: each for name, each in self._lacks.items() if not held[name]}

    async def _plan(self) -> None:
        """Have the next look later than the one before, if there is one."""
        self._due = None
        if self._lacks and self._looks < LOOKS_MAX:
            self._due = await self._context.after(Nanos(LOOK_PAUSE << self._looks))
            self._looks += 1

    async def _is_held(self, name: str, until: Nanos) -> bool:
        try:
            _ = await self._context.client(name, self._lacks[name], until)
        except Unreachable:
            return False
        return True
