"""The checked plan: what init starts, wires and reserves, and its digest.

A plan is made from a system file and nothing else. Making it proves what can be known before a
boot: every use has its provider, every share fits its owner, every owner fits the total, every
table of capabilities is large enough, no two services share an identity.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec

from nexus.abi import (
    CONTROL_LINK_SIZE,
    ENDPOINTS_PER_OWNER_MAX,
    ENDPOINTS_TOTAL_MAX,
    INIT_NAME,
    LINK_DEPTH_DEFAULT,
    MEMORY_SIZE_DEFAULT,
    SLOTS_MAX,
    Grants,
    Nanos,
    QosClass,
    ServiceId,
    service_id,
)
from nexus.init.crosschecks import (
    REST_STAGE,
    check_cycles,
    check_grants,
    check_hardware,
    check_identities,
    check_path,
    check_policyd,
    check_programs,
    check_spawn_rights,
    check_starters,
    check_waits,
    in_order,
    is_safe,
    policyd_of,
    probe_answer,
    probe_every,
    stage_of,
)
from nexus.init.declare import SIZE_UNITS, amount_text
from nexus.init.frames import link_size, reply_frame_size_max, request_frame_size_max
from nexus.init.policy import read_policy
from nexus.init.programs import (
    PROGRAMS,
    ProgramSource,
    WrongProgram,
    check_own,
    own_digest,
    own_source,
    program_digest,
    protocols_of,
)
from nexus.init.system import (
    BACKOFF_MAX_DEFAULT,
    BACKOFF_RESET_DEFAULT,
    HEALTH_DEADLINE_DEFAULT,
    LOG_RING_DEFAULT,
    METRICS_PAGE_DEFAULT,
    OWN_RESTARTS,
    OWN_WITHIN,
    POLICY_STALE_DEFAULT,
    PROBE_EVERY_DEFAULT,
    SAFE_AFTER_DEFAULT,
    STABLE_DEFAULT,
    STOP_DEFAULT,
    TRIAL_SETTLE_DEFAULT,
    Exceeded,
    Service,
    Strategy,
    System,
    Use,
    load,
)
from nexus.kernel.core.hardware import Hardware
from nexus.kernel.core.spawn import DELEGATIONS_MAX
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.policy import Policy
from nexus.runtime import BINDS_MAX, ONE_SHOTS_MAX

SLOTS_SPARE: Final = ONE_SHOTS_MAX + 4  # one-shot links; a link made, moved in, or replaced
ROOT_ENDPOINTS: Final = ENDPOINTS_PER_OWNER_MAX  # what one owner may have; a self-test shows it
ROOT_LINKS_SPARE: Final = 4  # control links of instances whose end is not yet received
EXTRA_LINKS_MAX: Final = 32  # links beyond the planned ones that one provider may have
NO_GRANTS: Final = Grants()
NO_POLICY: Final = Policy(services=[], allow={})

assert SLOTS_SPARE < SLOTS_MAX


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLink:
    """A client's link into a server's endpoint, and the reply link back into its inbox.

    The client of a link that is not `sync` posts over it and waits for no answer.
    """

    client: str
    server: str
    depth: int
    size: int
    delegations: int
    reply_depth: int
    reply_size: int
    sync: bool = True

    @property
    def share(self) -> int:
        """Bytes reserved at the server: the link, and each link that may be derived from it."""
        return self.size * (1 + self.delegations)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedService:
    """One service: what it runs, what it may do, and what is reserved for it.

    `reserved_size` bytes of its `owner_size` belong to planned links; `slots` is what its
    capability table needs; `delegations` is how many links init may derive into its endpoint.
    `stage` is POLICY_STAGE, CORE_STAGE or REST_STAGE; `probe_every` 0 is the first probe only.
    `entry` is empty for the programs Nexus has; `by` is the service that starts it on demand, empty
    for one that starts with the system; `starts` are those that it starts itself, with the digests
    of their programs; `names` are all services, for a program that tells of others.
    """

    name: str
    service: ServiceId
    program: str
    program_digest: str
    qos: QosClass
    cpu: int | None
    budget: int
    owner_size: int
    endpoints: int
    capabilities: tuple[str, ...]
    uses: tuple[PlannedLink, ...]
    backoff: Nanos
    health_deadline: Nanos
    settings: tuple[tuple[str, str | int | bool], ...]
    reserved_size: int
    slots: int
    delegations: int
    stage: int = REST_STAGE
    safe: bool = False
    group: str = ""
    backoff_max: Nanos = BACKOFF_MAX_DEFAULT
    backoff_reset: Nanos = BACKOFF_RESET_DEFAULT
    probe_every: Nanos = PROBE_EVERY_DEFAULT
    probe_answer: Nanos = HEALTH_DEADLINE_DEFAULT
    probe_misses: int = 1
    late_max: int = 0
    stop_max: Nanos = STOP_DEFAULT
    grants: Grants = NO_GRANTS
    entry: str = ""
    protocol: str = ""
    double: str = ""
    ordinary: bool = False
    memory: int = MEMORY_SIZE_DEFAULT
    cpu_share: int | None = None
    by: str = ""
    starts: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    log_ring: int = LOG_RING_DEFAULT
    metrics_page: int = METRICS_PAGE_DEFAULT

    @property
    def posts(self) -> tuple[str, ...]:
        """The servers it posts to and does not wait for."""
        return tuple(link.server for link in self.uses if not link.sync)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedGroup:
    """Services that are restarted together, in the order of their start; each is in one group.

    More than `restarts` restarts within `within` and what `exceeded` says happens.
    """

    name: str
    strategy: Strategy
    restarts: int
    within: Nanos
    exceeded: Exceeded
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A system that may be booted. Services are in the order of their start.

    `path` are the whole paths of the folders that programs of its own are found in; the other
    folders are as declared. `policyd` is the policy service, if there is one; `hardware` is the bus
    map.
    """

    name: str
    smp: int
    total_size: int
    root_size: int
    ends_with: str | None
    services: tuple[PlannedService, ...]
    groups: tuple[PlannedGroup, ...] = ()
    policy: Policy = NO_POLICY
    policyd: str | None = None
    policy_stale_max: Nanos = POLICY_STALE_DEFAULT
    stable: Nanos = STABLE_DEFAULT
    trial_settle: Nanos = TRIAL_SETTLE_DEFAULT
    safe_after: int = SAFE_AFTER_DEFAULT
    path: tuple[str, ...] = ()
    state_dir: str | None = None
    runtime_dir: str | None = None
    log_dir: str | None = None
    hardware: tuple[Hardware, ...] = ()

    @cached_property
    def links(self) -> tuple[PlannedLink, ...]:
        """Every planned link, by client in the order of start."""
        return tuple(link for service in self.services for link in service.uses)

    @cached_property
    def by_name(self) -> Mapping[str, PlannedService]:
        """The services by name."""
        return {service.name: service for service in self.services}

    @cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal, over the plan as canonical JSON."""
        return sha256(canonical(self)).hexdigest()


def plan_data(plan: Plan) -> dict[str, Any]:
    """The whole plan in dicts, lists and scalars, for JSON."""
    return {each.name: _data(getattr(plan, each.name)) for each in fields(plan)}


def _data(value: Any) -> Any:
    """One value of a plan; a field of a named tuple keeps its name."""
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    if is_dataclass(value):
        return {each.name: _data(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _data(each) for name, each in value._asdict().items()}
    if isinstance(value, tuple):
        return [_data(each) for each in value]
    return value


def canonical(plan: Plan) -> bytes:
    """The plan as JSON with sorted keys and no spaces: what its digest is made of.

    Two clones of one system have one digest: where its folders are does not count, nor on which
    line of which file a right is given. The digests of the programs cover what `path` leads to.
    """
    data = plan_data(plan)
    del data["path"]
    allow = {name: [right.text for right in rights] for name, rights in plan.policy.allow.items()}
    data["policy"]["allow"] = allow
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def load_plan(file: Path) -> Plan:
    """Read and check a system file. Raises SystemFileError."""
    return make_plan(load(file))


def load_policy(file: Path) -> Policy:
    """What `load_plan` says the policy is, and no program is looked at. Raises SystemFileError."""
    system = load(file)
    return read_policy(system, [service.name for service in in_order(system)])


def make_plan(system: System) -> Plan:
    """Check what the values of a system file mean together. Raises SystemFileError."""
    names = [service.name for service in system.services]
    check_identities(system)
    if system.ends_with is not None and system.ends_with not in names:
        raise system.wrong(
            ("system", "ends_with"), "the name of a service", f'"{system.ends_with}"'
        )
    policyd = policyd_of(system)
    groups = _groups(system)
    check_path(system)
    check_programs(system)
    path = import_path(system)
    sources = {service.name: _source(system, service, path) for service in system.services}
    links = {
        service.name: tuple(_link(system, service, use, sources) for use in service.uses)
        for service in system.services
    }
    into: dict[str, list[PlannedLink]] = {name: [] for name in names}
    for planned in links.values():
        for link in planned:
            into[link.server].append(link)
    check_cycles(system)
    check_waits(system)
    check_policyd(system, policyd, sources)
    check_grants(system)
    check_hardware(system, sources)
    check_starters(system)
    services = tuple(
        _service(system, service, sources, links[service.name], into[service.name])
        for service in in_order(system)
    )
    root_size = (2 * len(services) + ROOT_LINKS_SPARE) * CONTROL_LINK_SIZE
    _check_totals(system, root_size)
    policy = read_policy(system, [service.name for service in services])
    check_spawn_rights(system, policy)
    return Plan(
        name=system.name,
        smp=system.smp,
        total_size=system.total_size,
        root_size=root_size,
        ends_with=system.ends_with,
        services=services,
        groups=groups,
        policy=policy,
        policyd=policyd,
        policy_stale_max=system.policy_stale_max,
        stable=system.stable,
        trial_settle=system.trial_settle,
        safe_after=system.safe_after,
        path=path,
        state_dir=system.state_dir,
        runtime_dir=system.runtime_dir,
        log_dir=system.log_dir,
        hardware=system.hardware,
    )


def import_path(system: System) -> tuple[str, ...]:
    """The folders of `path`, as whole paths."""
    return tuple(str((system.file.parent / folder).resolve()) for folder in system.path)


def _groups(system: System) -> tuple[PlannedGroup, ...]:
    """The declared groups, and one for each service that is in none of them."""
    members: dict[str, list[str]] = {group.name: [] for group in system.groups}
    own = []
    for service in in_order(system):
        if service.group is None:
            if service.name in members:
                raise system.wrong(
                    ("group", service.name),
                    f'another name, or group = "{service.name}" in the service of that name',
                    f'"{service.name}"',
                )
            own.append(service.name)
        elif service.group not in members:
            listed = ", ".join(members) or "none"
            raise system.wrong(
                (*service.path, "group"), f"a declared group ({listed})", f'"{service.group}"'
            )
        else:
            members[service.group].append(service.name)
    for group in system.groups:
        if not members[group.name]:
            raise system.wrong(group.path, "a group with a service in it", f'"{group.name}"')
    declared = [
        PlannedGroup(
            name=group.name,
            strategy=group.strategy,
            restarts=group.restarts,
            within=group.within,
            exceeded=group.exceeded,
            members=tuple(members[group.name]),
        )
        for group in system.groups
    ]
    return (*declared, *(own_group(name) for name in own))


def own_group(name: str) -> PlannedGroup:
    """The group of a service that is in no declared one."""
    return PlannedGroup(
        name=name,
        strategy=Strategy.ONE,
        restarts=OWN_RESTARTS,
        within=OWN_WITHIN,
        exceeded=Exceeded.GIVE_UP,
        members=(name,),
    )


def _source(system: System, service: Service, path: tuple[str, ...]) -> ProgramSource:
    """What the service runs. A program of the system's own is imported here, and refused here."""
    if service.entry:
        source = own_source(
            service.entry,
            service.protocol,
            double=service.double,
            ordinary=service.ordinary,
            path=path,
        )
        try:
            check_own(source)
        except WrongProgram as wrong:
            raise system.wrong((*service.path, wrong.key), wrong.expected, wrong.found) from wrong
        return source
    found = PROGRAMS.get(service.program)
    if found is None:
        raise system.wrong(
            (*service.path, "program"),
            f"a program, one of {', '.join(sorted(PROGRAMS))}",
            f'"{service.program}"',
        )
    return found


def sources_of(plan: Plan) -> Mapping[str, ProgramSource]:
    """Every program the plan names, by name."""
    found = {}
    for service in plan.services:
        if service.entry:
            found[service.program] = own_source(
                service.entry,
                service.protocol,
                double=service.double,
                ordinary=service.ordinary,
                path=plan.path,
            )
        else:
            found[service.program] = PROGRAMS[service.program]
    return {name: found[name] for name in sorted(found)}


def _link(
    system: System, client: Service, use: Use, sources: Mapping[str, ProgramSource]
) -> PlannedLink:
    """One use: its provider exists, and its terms hold at least one largest frame."""
    if use.name == client.name:
        raise system.wrong(use.path, "a service other than itself", f'"{use.name}"')
    source = sources.get(use.name)
    if use.name == INIT_NAME:
        raise system.wrong(use.path, "no use of init: everybody has a link to it", f'"{use.name}"')
    if source is None:
        listed = ", ".join(name for name in sources if name != client.name) or "none"
        raise system.wrong(use.path, f"a service of this system ({listed})", f'"{use.name}"')
    first = next(other for other in client.uses if other.name == use.name)
    if first is not use:
        raise system.wrong(use.path, "each service once", f'"{use.name}" again')
    protocols = (META, *protocols_of(source))
    frame = max(request_frame_size_max(protocol) for protocol in protocols)
    reply_frame = max(reply_frame_size_max(protocol) for protocol in protocols)
    share = link_size(use.depth, frame)
    # Who asks for so much at once has room for the answers: they are never waited with.
    reply_depth = max(LINK_DEPTH_DEFAULT, use.depth)
    if use.size is not None and use.size < frame:
        raise system.wrong(
            (*use.path, "size"),
            f'at least {frame}B, one largest frame to "{use.name}"',
            f'"{amount_text(use.size, SIZE_UNITS)}"',
        )
    return PlannedLink(
        client=client.name,
        server=use.name,
        depth=use.depth,
        size=share if use.size is None else min(use.size, share),
        delegations=use.delegations,
        sync=use.sync,
        reply_depth=reply_depth,
        reply_size=link_size(reply_depth, reply_frame),
    )


def _service(
    system: System,
    service: Service,
    sources: Mapping[str, ProgramSource],
    uses: tuple[PlannedLink, ...],
    into: list[PlannedLink],
) -> PlannedService:
    source = sources[service.name]
    if service.cpu is not None and service.cpu >= system.smp:
        raise system.wrong(
            (*service.path, "cpu"),
            f"a CPU below {system.smp}, the smp of the system",
            str(service.cpu),
        )
    if len(into) + 1 > BINDS_MAX:
        raise system.wrong(
            service.path,
            f"at most {BINDS_MAX - 1} clients of a service",
            f'{len(into)} of "{service.name}"',
        )
    reserved = reserved_size(uses, into)
    if reserved > service.owner_size:
        raise system.wrong(
            _nearest(system, service, "owner_size"),
            f'an owner_size of at least {reserved}B for the links of "{service.name}"',
            f"{service.owner_size}B",
        )
    slots = slots_needed(uses, into)
    if slots > SLOTS_MAX:
        raise system.wrong(
            service.path,
            f"at most {SLOTS_MAX} capability slots for a service",
            f'{slots} for "{service.name}"',
        )
    return PlannedService(
        name=service.name,
        service=service_id(service.name),
        program=source.name,
        program_digest=_digest(source),
        qos=service.qos,
        cpu=service.cpu,
        budget=service.budget,
        owner_size=service.owner_size,
        endpoints=service.endpoints,
        capabilities=service.capabilities,
        uses=uses,
        backoff=service.backoff,
        health_deadline=service.health_deadline,
        settings=service.settings,
        reserved_size=reserved,
        slots=slots,
        delegations=min(DELEGATIONS_MAX, len(into) + EXTRA_LINKS_MAX) if into else 0,
        stage=stage_of(service),
        safe=is_safe(service),
        group=service.group or service.name,
        backoff_max=service.backoff_max,
        backoff_reset=service.backoff_reset,
        probe_every=probe_every(service),
        probe_answer=probe_answer(service),
        probe_misses=service.probe_misses,
        late_max=service.late_max,
        stop_max=service.stop_max,
        grants=service.grants,
        entry=service.entry,
        protocol=service.protocol,
        double=service.double,
        ordinary=service.ordinary,
        memory=service.memory,
        cpu_share=service.cpu_share,
        by=service.by,
        starts=tuple(
            (other.name, _digest(sources[other.name]))
            for other in system.services
            if other.by == service.name
        ),
        names=tuple(each.name for each in system.services) if source.names else (),
        log_ring=service.log_ring,
        metrics_page=service.metrics_page,
    )


def _digest(source: ProgramSource) -> str:
    return own_digest(source) if source.entry else program_digest(source.module)


def reserved_size(uses: tuple[PlannedLink, ...], into: list[PlannedLink]) -> int:
    """Bytes of link shares a service needs in its own endpoint and in its reply inbox.

    Endpoint: init's link, and each client's with what may be derived from it. Inbox: init's
    link, one from each server it uses, and one more of the largest size for a one-shot answer
    or for the old link of a server that was just restarted.
    """
    inbox = [CONTROL_LINK_SIZE, *(link.reply_size for link in uses)]
    return CONTROL_LINK_SIZE + sum(link.share for link in into) + sum(inbox) + max(inbox)


def slots_needed(uses: tuple[PlannedLink, ...], into: list[PlannedLink]) -> int:
    """Capability slots a service needs.

    Control link, endpoint, inbox; one link to each server; the reply link of init, of each
    client and of each task a client may hand its link to; and SLOTS_SPARE.
    """
    clients = sum(1 + link.delegations for link in into)
    return 3 + len(uses) + 1 + clients + SLOTS_SPARE


def _check_totals(system: System, root_size: int) -> None:
    """The owners' budgets, init's included, fit the system's."""
    size = root_size + sum(service.owner_size for service in system.services)
    if size > system.total_size:
        raise system.wrong(
            ("system", "total_size"),
            f"a total_size of at least {size}B, the sum of every owner_size and of init's",
            f"{system.total_size}B",
        )
    endpoints = ROOT_ENDPOINTS
    for service in system.services:
        endpoints += service.endpoints
        if endpoints > ENDPOINTS_TOTAL_MAX:
            raise system.wrong(
                _nearest(system, service, "endpoints"),
                f"at most {ENDPOINTS_TOTAL_MAX} endpoints in the system",
                f'{endpoints} up to "{service.name}"',
            )


def _nearest(system: System, service: Service, key: str) -> tuple[str | int, ...]:
    """The key in the service's table if it stands there, else the system's, else the table."""
    own = (*service.path, key)
    if system.lines.has(own):
        return own
    shared = ("system", key)
    return shared if system.lines.has(shared) else service.path
