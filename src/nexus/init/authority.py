"""The policy that is in force, as init keeps it: its text, its generation, and whether policyd
answers for it.

init decides the requests it gets from this text itself. Everybody else asks policyd, and may keep
a decision as long as the policy page shows the generation it was made under:

    policyd's probe answered  -> page raised, available
    policyd ends, is killed or misses a probe -> page raised, not available: all deny at once
    SetPolicy                 -> page raised: what was decided under the old text is void, and
                                 who holds a grant it takes away is ended (`grants`)
    SIGHUP                    -> the files are read again; policyd is given the new text
                                 (ReloadBulk, which comes back here as SetPolicy); one that does
                                 not take it is restarted and fetches it, and till then all deny

Reading the files is all that init ever waits for: regular files of bounded size, and so no longer
than their file system takes. They belong on a local disk.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nexus.abi import INIT_NAME, CapClose, Nanos, PolicyRaise
from nexus.init.errors import SystemFileError
from nexus.init.reasons import Reason
from nexus.init.record import Record
from nexus.ipc.bulk import Bulk, offer_bulk
from nexus.protocols.policy import POLICY_SIZE_MAX, Policy, decode_policy
from nexus.protocols.policyd import ReloadBulk, Reloaded

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

RELOAD_MAX: Final = Nanos(2_000_000_000)  # ns; then policyd is restarted with the new policy

PolicySource = Callable[[], Policy]
"""Reads the policy files again. Raises SystemFileError or OSError."""


class BadPolicy(Exception):
    """The bytes are no policy for this system; the text says why."""


class Authority:
    """The policy in force."""

    def __init__(self, init: "Supervisor", policy: Policy) -> None:
        self._init = init
        self.policy = policy
        self.digest = policy.digest
        self.generation = 0
        self.is_available = False
        self._services = frozenset(service.name for service in init.plan.services)

    def may(self, record: Record, *rights: str, target: str = "") -> bool:
        """Whether the policy gives the service one of these rights, to do that to `target`."""
        return any(self.policy.right(record.name, right, target) is not None for right in rights)

    @property
    def policyd(self) -> Record | None:
        """The policy service, if this system has one."""
        name = self._init.plan.policyd
        return None if name is None else self._init.records[name]

    # ------------------------------------------------------------------ the page

    async def on_health(self, record: Record) -> None:
        """A service is healthy; if it is policyd, decisions may be had."""
        if record is self.policyd and not self.is_available:
            await self._raise(available=True)

    async def on_doubt(self, record: Record) -> None:
        """A service ends, or did not answer; if it is policyd, everything is denied from now."""
        if record is self.policyd and self.is_available:
            await self._raise(available=False)

    async def _raise(self, *, available: bool) -> None:
        self.is_available = available
        self.generation = (await PolicyRaise(available)).generation

    # ------------------------------------------------------------------ a new policy

    def read(self, bulk: Bulk) -> Policy:
        """The policy that somebody gives. Raises BadPolicy."""
        try:
            policy = decode_policy(bytes(bulk.view))
        except msgspec.DecodeError as error:
            raise BadPolicy(str(error)) from error
        self.check(policy)
        return policy

    def check(self, policy: Policy) -> None:
        """Refuse a policy for others than the services of this plan. Raises BadPolicy.

        It names all of them, for whom it does not name is nobody to policyd.
        """
        unknown = sorted({*policy.services, *policy.allow} - self._services - {INIT_NAME})
        if unknown:
            raise BadPolicy(f"{unknown[0]} is no service of this system")
        if set(policy.services) != self._services:
            raise BadPolicy("its services are not those of this system, all of them")
        if len(policy.encoded()) > POLICY_SIZE_MAX:
            raise BadPolicy(f"more than {POLICY_SIZE_MAX} bytes")

    async def put_in_force(self, policy: Policy) -> None:
        """Keep this policy from now on; no decision made before holds any longer."""
        self.policy = policy
        self.digest = policy.digest
        await self._raise(available=self.is_available)
        await self._init.say("init: policy set", generation=self.generation, digest=self.digest)
        await self._init.grants.on_policy()

    async def read_again(self, source: PolicySource | None) -> None:
        """SIGHUP: read the policy files, and put in force what they say now."""
        if source is None:
            await self._init.say("init: policy not read", error="this run has no policy files")
            return
        try:
            policy = source()
            self.check(policy)
        except (SystemFileError, BadPolicy, OSError) as error:
            await self._init.say("init: policy not read", error=str(error)[:400])
            return
        policyd = self.policyd
        if policyd is None or not await self._give(policyd, policy):
            await self._force(policyd, policy)

    async def _give(self, policyd: Record, policy: Policy) -> bool:
        """Ask policyd to put the policy in force; whether it could be asked."""
        if not self.is_available:
            return False
        encoded = policy.encoded()
        slot = await offer_bulk(encoded)
        if slot is None:
            return False
        digest = policy.digest

        async def on_reloaded(reply: Any, _nonce: int) -> None:
            taken = isinstance(reply, Reloaded) and self.digest == digest
            if not taken and not self._init.is_going_down:
                await self._force(policyd, policy)

        deadline = Nanos(self._init.now + RELOAD_MAX)
        request = ReloadBulk(len(encoded))
        if await self._init.ask(policyd, request, deadline, on_reloaded, move=slot):
            return True
        await CapClose(slot)
        return False

    async def _force(self, policyd: Record | None, policy: Policy) -> None:
        """Put the policy in force without policyd's help: the next instance fetches it."""
        if policyd is not None:
            await self.on_doubt(policyd)
        await self.put_in_force(policy)
        if policyd is not None:
            await self._init.kill(policyd, Reason.POLICY)
