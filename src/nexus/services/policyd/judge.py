"""Decides by one policy. Deny by default; no clock, no messages, and nothing is remembered."""

from collections.abc import Iterable
from typing import Final, NamedTuple

from nexus.abi import INIT_NAME, ServiceId, service_id
from nexus.protocols.policy import DELEGATE, EXEC_RIGHT, RELOAD, ROUTE_RIGHT, Policy, Right
from nexus.protocols.policyd import Reason, Verdict

INIT: Final = service_id(INIT_NAME)


class Ruling(NamedTuple):
    """A decision: about whom, about which right, and why so."""

    verdict: Verdict
    reason: Reason
    subject: ServiceId
    action: str


class Judge:
    """What one policy says.

    The ids that init has issued are those of the policy's services and init's own. No other name
    or id stands for any of them: there are no aliases.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._names = {service_id(name): name for name in (INIT_NAME, *policy.services)}
        self._rights = {service_id(name): _by_name(rights) for name, rights in policy.allow.items()}

    def name_of(self, service: ServiceId) -> str:
        """The name init issued for an id, or the id in hexadecimal if it issued none."""
        return self._names.get(service, f"0x{service:016x}")

    def check(self, sender: ServiceId, right: str, target: str) -> Ruling:
        """May the sender do `right` to `target`?"""
        return self._ruling(sender, right, target)

    def check_for(self, sender: ServiceId, subject: ServiceId, right: str, target: str) -> Ruling:
        """May `subject` do `right` to `target`, when the sender asks in its place?"""
        if not self._may_delegate(sender):
            return _foreign(subject, right)
        return self._ruling(subject, right, target)

    def route(self, sender: ServiceId, requester: str, target: str) -> Ruling:
        """May `requester` reach `target`? A target may need a right of its own."""
        subject = self._requester(sender, requester)
        if subject is None:
            return _foreign(sender, ROUTE_RIGHT)
        ruling = self._ruling(subject, ROUTE_RIGHT, target)
        further = self.policy.routes.get(target)
        if ruling.verdict is Verdict.DENY or further is None:
            return ruling
        return self._ruling(subject, further, target)

    def exec(self, sender: ServiceId, requester: str, program: str) -> Ruling:
        """May `requester` start `program`?"""
        subject = self._requester(sender, requester)
        if subject is None:
            return _foreign(sender, EXEC_RIGHT)
        return self._ruling(subject, EXEC_RIGHT, program)

    def reload(self, sender: ServiceId) -> Ruling:
        """May the sender put another policy in force? init may: it keeps the policy."""
        if sender == INIT:
            return Ruling(Verdict.ALLOW, Reason.POLICY, INIT, RELOAD)
        return self._ruling(sender, RELOAD, "")

    def _requester(self, sender: ServiceId, requester: str) -> ServiceId | None:
        """Whom a request that names its requester is about: the sender, or whom init speaks for."""
        if not requester.isascii():
            return None
        named = service_id(requester)
        return named if sender in (named, INIT) else None

    def _may_delegate(self, sender: ServiceId) -> bool:
        """Whether the sender may ask in another's place."""
        return sender == INIT or self._has(sender, DELEGATE, "")

    def _ruling(self, subject: ServiceId, right: str, target: str) -> Ruling:
        if subject not in self._names:
            return _foreign(subject, right)
        verdict = Verdict.ALLOW if self._has(subject, right, target) else Verdict.DENY
        return Ruling(verdict, Reason.POLICY, subject, right)

    def _has(self, subject: ServiceId, right: str, target: str) -> bool:
        held = self._rights.get(subject, {}).get(right, ())
        return subject in self._names and any(each.covers(target) for each in held)


def _by_name(rights: Iterable[Right]) -> dict[str, list[Right]]:
    """One name may stand several times, bound to different targets."""
    found: dict[str, list[Right]] = {}
    for right in rights:
        found.setdefault(right.name, []).append(right)
    return found


def _foreign(subject: ServiceId, right: str) -> Ruling:
    """Denied: this is not somebody whom the sender may ask for, or nobody at all."""
    return Ruling(Verdict.DENY, Reason.IDENTITY, subject, right)
