"""Why one service may or may not reach another, with the lines that say so.

Three layers decide: the plan (no link exists that it does not contain), the policy service (a
route and a right need their entry in the policy), and the sandbox (a service has no other way
out than its links). Pure: everything follows from the system file and its policy files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from nexus.abi import INIT_NAME, StreamGrant, StreamRole
from nexus.init.crosschecks import is_safe, stage_of
from nexus.init.declare import SIZE_UNITS, amount_text, cut
from nexus.init.lines import KeyPath
from nexus.init.plan import Plan, PlannedLink, sources_of
from nexus.init.policy import Layer, layers_of
from nexus.init.programs import protocols_of
from nexus.init.system import BOUND_RIGHT, Service, System, Use
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.policy import BOUND, ROUTE_RIGHT, Right
from nexus.wire import Protocol

LABEL_WIDTH: Final = 7  # characters; the longest label


class UnknownName(Exception):
    """What was asked about is no service of the system, or no right; the text is a sentence."""


class Wanted(NamedTuple):
    """A right that is asked about; without a target, whatever it is bound to.

    `text` is how somebody would write it down.
    """

    name: str
    target: str | None
    text: str

    def of(self, rights: Iterable[Right]) -> Right | None:
        """Which of the rights it is; one that is not bound comes first."""
        found = [each for each in rights if each.name == self.name]
        if self.target is not None:
            found = [each for each in found if each.covers(self.target)]
        return min(found, key=lambda each: bool(each.target), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one layer says: yes or no, the reason, and where it is written ("" for nowhere)."""

    label: str
    allowed: bool
    reason: str
    where: str = ""

    @property
    def text(self) -> str:
        """One line for a person."""
        verdict = "yes" if self.allowed else "no"
        where = f"  [{self.where}]" if self.where else ""
        return f"  {self.label.ljust(LABEL_WIDTH)} {verdict.ljust(3)}  {self.reason}{where}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The whole answer: each layer's, who holds the right, and what to add if it is no."""

    client: str
    server: str
    right: str | None
    request: str | None
    answers: tuple[Answer, ...]
    holders: tuple[tuple[str, str], ...]  # service, and file:line
    remedies: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Whether every layer says yes."""
        return all(answer.allowed for answer in self.answers)

    @property
    def lines(self) -> tuple[str, ...]:
        """The answer for a person."""
        asked = self.right or self.request
        what = f" {asked}" if asked else ""
        verdict = "allowed" if self.allowed else "denied"
        lines = [f"{self.client} -> {self.server}{what}: {verdict}"]
        lines += [answer.text for answer in self.answers]
        if self.right is not None:
            held = ", ".join(f"{name} [{where}]" for name, where in self.holders) or "nobody"
            lines.append(f"{self.right} is held by: {held}")
        if self.remedies:
            lines.append("to allow it:")
            lines += [f"  {remedy}" for remedy in self.remedies]
        return tuple(lines)


def explain(plan: Plan, system: System, a: str, b: str, op: str | None = None) -> Explanation:
    """Whether `a` may reach `b`, and do what needs the right `op` there.

    `op` may name a request that `b` serves, however it is written: then the link decides whether
    it gets there, and `b` what it needs, which no file says. A word that the policy has is a
    right, and RIGHT:TARGET asks for the right to do that to the target.
    `plan` was made from `system`, whose policy files are read again. Raises UnknownName, and
    SystemFileError if a policy file has become wrong.
    """
    services = {service.name: service for service in system.services}
    client = services.get(a)
    server = services.get(b)
    if client is None:
        raise UnknownName(f'"{cut(a)}" is no service of {plan.name}: {", ".join(services)}')
    if server is None and b != INIT_NAME:
        known = ", ".join([*services, INIT_NAME])
        raise UnknownName(f'"{cut(b)}" is no service of {plan.name}: {known}')
    if a == b:
        raise UnknownName(f"{a} needs no link to itself; name two services")
    layers = layers_of(system)
    served = () if op is None or _is_right(plan, layers, op) else _requests(plan, b)
    request = None if op is None else _request_of(served, op)
    right = op if request is None else None
    if right is not None and not _is_written_right(right):
        nor = f", nor is it a request of {b}: {', '.join(served)}" if served else ""
        raise UnknownName(f'"{cut(right)}" is no right; one is a name such as proof.control{nor}')
    wanted = None if right is None else _wanted(right)
    answers: list[Answer] = []
    remedies: list[str] = []
    if server is None:
        answers.append(Answer(label="plan", allowed=True, reason=f"everybody has a link to {b}"))
    else:
        answers.append(_plan_answer(plan, system, client, server, remedies))
        answers += _route_answers(plan, system, layers, a, b, remedies)
    if wanted is not None:
        answers.append(_policy_answer("policy", plan, system, layers, a, wanted, remedies))
    if request is not None:
        answers.append(_request_answer(plan, layers, a, b, request))
    answers.append(_sandbox_answer(plan, a))
    return Explanation(
        client=a,
        server=b,
        right=right,
        request=request,
        answers=tuple(answers),
        holders=_holders(plan, layers, wanted) if wanted is not None else (),
        remedies=tuple(dict.fromkeys(remedies)),
    )


def _plan_answer(
    plan: Plan, system: System, client: Service, server: Service, remedies: list[str]
) -> Answer:
    """Whether the plan has the link."""
    for use, link in zip(client.uses, plan.by_name[client.name].uses, strict=True):
        if use.name == server.name:
            return Answer(
                label="plan",
                allowed=True,
                reason=f"{client.name} uses {server.name}: {_terms(link)}",
                where=_at(system, use.path),
            )
    remedies.append(_use_remedy(system, client, server))
    return Answer(
        label="plan",
        allowed=False,
        reason=f"{client.name} does not use {server.name}; init makes no link that is not declared",
        where=_at(system, (*client.path, "uses")),
    )


def _terms(link: PlannedLink) -> str:
    kind = "sync" if link.sync else "post"
    delegations = f", {link.delegations} delegations" if link.delegations else ""
    return f"{kind}, depth {link.depth}, {amount_text(link.size, SIZE_UNITS)}{delegations}"


def _use_remedy(system: System, client: Service, server: Service) -> str:
    """The line to add; it posts where the client may not wait for the server."""
    must_post = (
        _waits_for(system, server.name, client.name)
        or stage_of(client) < stage_of(server)
        or (is_safe(client) and not is_safe(server))
    )
    sync = "sync = false" if must_post else ""
    uses: KeyPath = (*client.path, "uses")
    if system.lines.has((*uses, 0)):
        entry = f'{{ name = "{server.name}"{", " if sync else ""}{sync} }}'
        return f"{_at(system, uses)}: add {entry} to the array uses of {client.name}"
    table = f"{_key(server.name)} = {{ {sync} }}" if sync else f"{_key(server.name)} = {{}}"
    if system.lines.has(uses):
        return f"{_at(system, uses)}: add {table} to the table uses of {client.name}"
    return f"{_at(system, client.path)}: add uses = {{ {table} }} to [service.{_key(client.name)}]"


def _waits_for(system: System, client: str, server: str) -> bool:
    """Whether `client` waits for `server`, directly or by way of others."""
    uses: Mapping[str, tuple[Use, ...]] = {each.name: each.uses for each in system.services}
    seen: set[str] = set()
    ahead = [client]
    while ahead:
        name = ahead.pop()
        if name == server:
            return True
        if name not in seen:
            seen.add(name)
            ahead += [use.name for use in uses[name] if use.sync]
    return False


def _route_answers(
    plan: Plan, system: System, layers: Sequence[Layer], a: str, b: str, remedies: list[str]
) -> list[Answer]:
    """What the policy service says to ROUTE from `a` to `b`; nothing where there is none."""
    if plan.policyd is None:
        return []
    further = plan.policy.routes.get(b)
    names = [ROUTE_RIGHT] if further is None else [ROUTE_RIGHT, further]
    return [
        _policy_answer("route", plan, system, layers, a, Wanted(name, b, name), remedies)
        for name in names
    ]


def _is_written_right(word: str) -> bool:
    """Whether a policy file may have it."""
    return len(word) <= BOUND_RIGHT.size_max and re.fullmatch(BOUND_RIGHT.pattern, word) is not None


def _wanted(word: str) -> Wanted:
    """The right that is asked about."""
    name, bound, target = word.partition(BOUND)
    return Wanted(name, target if bound else None, word)


def _is_right(plan: Plan, layers: Sequence[Layer], word: str) -> bool:
    """Whether a word can only be a right: no request has a dot, and the policy has the others."""
    name = word.partition(BOUND)[0]
    held = {
        right.name for layer in layers for service in layer.allow for right in layer.rights(service)
    }
    return "." in name or BOUND in word or name in held or name in plan.policy.routes.values()


def _requests(plan: Plan, server: str) -> tuple[str, ...]:
    """The names of the requests that a service serves."""
    if server == INIT_NAME:
        protocols: tuple[Protocol, ...] = (INIT,)
    else:
        protocols = protocols_of(sources_of(plan)[plan.by_name[server].program])
    return tuple(kind.__name__ for protocol in protocols for kind in protocol.codecs)


def _request_of(served: Sequence[str], word: str) -> str | None:
    """The request that is meant: GetStatus, get-status and get_status are one."""
    wanted = word.replace("-", "").replace("_", "").lower()
    return next((name for name in served if name.lower() == wanted), None)


def _request_answer(plan: Plan, layers: Sequence[Layer], a: str, b: str, request: str) -> Answer:
    """The link carries every request; what one needs is decided where it is served."""
    files = {layer.shown: layer.file for layer in layers}
    rights = plan.policy.allow.get(a, ())
    held = ", ".join(f"{right.text} [{files[right.file]}:{right.line}]" for right in rights)
    return Answer(
        label="request",
        allowed=True,
        reason=f"{b} itself decides on {request} by the rights of {a}: {held or 'none'}",
    )


def _policy_answer(
    label: str,
    plan: Plan,
    system: System,
    layers: Sequence[Layer],
    a: str,
    wanted: Wanted,
    remedies: list[str],
) -> Answer:
    """Whether `a` holds the right, by which layer, and which later layer took it away."""
    last = next((layer for layer in reversed(layers) if a in layer.allow), None)
    held = wanted.of(plan.policy.allow.get(a, ()))
    if held is not None and last is not None:
        alone = held.target and held.target != wanted.target
        return Answer(
            label=label,
            allowed=True,
            reason=f"{a} holds {held.name}" + (f" for {held.target} alone" if alone else ""),
            where=f"{last.file}:{held.line}",
        )
    remedies.append(_right_remedy(system, layers, last, a, wanted.text))
    for lost in reversed(layers):
        right = wanted.of(lost.rights(a))
        if right is not None and last is not None:
            return Answer(
                label=label,
                allowed=False,
                reason=f"{a} has {right.text} from {lost.file}:{right.line}, but a later list"
                " replaces it",
                where=f"{last.file}:{last.line(a)}",
            )
    reason = f"{a} does not hold {wanted.text}, and what is not listed is denied"
    where = f"{last.file}:{last.line(a)}" if last is not None else ""
    return Answer(label=label, allowed=False, reason=reason, where=where)


def _right_remedy(
    system: System, layers: Sequence[Layer], last: Layer | None, a: str, name: str
) -> str:
    """Where the right would go: into the list that holds now, or a new one."""
    if last is not None:
        return f'{last.file}:{last.line(a)}: add "{name}" to the rights of {a}'
    if len(layers) > 1:
        file = layers[-1].file
        return f'{file}:{layers[-1].lines.line(("allow",))}: add {_key(a)} = ["{name}"] to [allow]'
    entry = f"[service.{_key(a)}]"
    return f'{_at(system, ("service", a))}: add capabilities = ["{name}"] to {entry}'


def _sandbox_answer(plan: Plan, a: str) -> Answer:
    """The sandbox never denies a link; it sees to it that there is no other way."""
    grants = plan.by_name[a].grants
    ways = [f"port {name}" for name in grants.ports]
    ways += [_stream_way(each) for each in grants.stream_ports]
    ways += [f"{each.kind.name.lower()} device {each.name}" for each in grants.hardware]
    ways += [f"a secret in a {grants.secret.name.lower()}"] if grants.secret else []
    ways += [f"device {device.name} ({device.path})" for device in grants.devices]
    ways += [f"listens on {each.address} port {each.port}" for each in grants.listen]
    ways += [f"connects to TCP port {port}" for port in grants.connect]
    beside = f"; besides: {', '.join(ways)}" if ways else ""
    return Answer(label="sandbox", allowed=True, reason=f"{a} has no way out but its links{beside}")


def _stream_way(grant: StreamGrant) -> str:
    if grant.role is StreamRole.UNIX:
        return f"port {grant.name}, of bytes"
    does = "dials" if grant.role is StreamRole.DIAL else "takes callers at"
    return f"{does} {grant.address} port {grant.port}"


def _holders(plan: Plan, layers: Sequence[Layer], wanted: Wanted) -> tuple[tuple[str, str], ...]:
    """Every service that holds the right, and where it is given."""
    files = {layer.shown: layer.file for layer in layers}
    return tuple(
        (service.name, f"{files[right.file]}:{right.line}")
        for service in plan.services
        if (right := wanted.of(plan.policy.allow.get(service.name, ()))) is not None
    )


def _at(system: System, path: KeyPath) -> str:
    return f"{system.file}:{system.lines.line(path)}"


def _key(name: str) -> str:
    """A service's name as a key of TOML."""
    return f'"{name}"' if "." in name else name
