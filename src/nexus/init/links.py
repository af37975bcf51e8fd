"""The link table: what the plan promises, what exists, and whether a client may have more."""

from dataclasses import dataclass

from nexus.abi import LinkTerms
from nexus.init.plan import Plan, PlannedLink


@dataclass(slots=True)
class LinkState:
    """A planned link and how often the present instances took it; 0 is that it is not there.

    `terms` are those of the link that was made, None as long as none was. `is_lost` says that the
    client had it until the server ended: it takes it again when it next wants something of it.
    """

    planned: PlannedLink
    terms: LinkTerms | None = None
    client_generation: int = 0
    server_generation: int = 0
    taken: int = 0
    is_lost: bool = False


class LinkTable:
    """Every planned link, by client and server.

    An instance may take a link again (its reply was lost, it lost count); each further one uses
    up what the server's owner budget holds beyond the plan, so that no client can take the share
    of another. Links of an instance that ended count as given back.
    """

    def __init__(self, plan: Plan) -> None:
        self._rows = {(row.planned.client, row.planned.server): row for row in planned_rows(plan)}
        self._spare = {
            service.name: service.owner_size - service.reserved_size for service in plan.services
        }
        self._delegations = {
            service.name: service.delegations
            - sum(service.name == row.server for row in plan.links)
            for service in plan.services
        }

    @property
    def rows(self) -> list[LinkState]:
        """Every planned link in the order of the plan."""
        return list(self._rows.values())

    def find(self, client: str, server: str) -> LinkState | None:
        """The planned link from `client` to `server`."""
        return self._rows.get((client, server))

    def missing(self) -> list[LinkState]:
        """The planned links that the present instances of their clients never had."""
        return [row for row in self._rows.values() if not row.taken and not row.is_lost]

    def has_room(self, row: LinkState) -> bool:
        """Whether one more link may be made for this row."""
        if not row.taken:
            return True
        server = row.planned.server
        extra = [other for other in self._rows.values() if other.planned.server == server]
        size = sum(other.planned.share * max(0, other.taken - 1) for other in extra)
        count = sum(max(0, other.taken - 1) for other in extra)
        return size + row.planned.share <= self._spare[server] and count < self._delegations[server]

    def on_taken(
        self, row: LinkState, terms: LinkTerms, client_generation: int, server_generation: int
    ) -> None:
        """A link was made for the client."""
        row.terms = terms
        row.client_generation = client_generation
        row.server_generation = server_generation
        row.taken += 1
        row.is_lost = False

    def on_ended(self, name: str) -> None:
        """The present instance of `name` is gone, and with it its links and those into it."""
        for row in self._rows.values():
            if name in {row.planned.client, row.planned.server}:
                row.is_lost = name == row.planned.server and (row.is_lost or row.taken > 0)
                row.taken = 0
                row.terms = None


def planned_rows(plan: Plan) -> list[LinkState]:
    """One row for each link of the plan; what has no row is no link."""
    return [LinkState(planned=link) for link in plan.links]
