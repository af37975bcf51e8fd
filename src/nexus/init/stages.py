"""Stages: policyd, then core, then the rest. The next begins when the one before has settled."""

from typing import TYPE_CHECKING

from nexus.init.crosschecks import POLICY_STAGE, REST_STAGE
from nexus.init.record import Record
from nexus.protocols.init import TaskState

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor


class Stages:
    """How far the start of the system is."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._stage = POLICY_STAGE

    def begin(self) -> None:
        """Go through the stages from the first: of those that run already none is waited for."""
        self._stage = POLICY_STAGE

    def startable(self) -> list[Record]:
        """The services whose turn it is, in the order of their start."""
        records = [self._init.records[planned.name] for planned in self._init.start_list()]
        while self._stage < REST_STAGE and self._is_over(records):
            self._stage += 1
        return [
            record
            for record in records
            if record.planned.stage <= self._stage and record.state is TaskState.WAITING
        ]

    def _is_over(self, records: list[Record]) -> bool:
        """Whether everybody of this stage and before is healthy or has missed its deadline."""
        if self._stage == POLICY_STAGE and not self._init.grants.is_checked:
            return False
        return all(
            record.is_out or record.is_settled
            for record in records
            if record.planned.stage <= self._stage
        )
