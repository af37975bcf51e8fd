"""When what the tasks hold at `init: ready` counts: every link that was taken is bound."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nexus.init.baseline import Baseline


def baseline(*taken: int) -> Baseline:
    """Of a system whose clients took their links to the server so often each."""
    rows = [
        SimpleNamespace(planned=SimpleNamespace(client=f"client{at}", server="server"), taken=count)
        for at, count in enumerate(taken)
    ]
    records = {row.planned.client: SimpleNamespace(is_up=True) for row in rows}
    return Baseline(cast(Any, SimpleNamespace(links=SimpleNamespace(rows=rows), records=records)))


@pytest.mark.parametrize(
    ("taken", "binds", "waits"),
    [
        ((1, 1), 3, False),  # init's own is one of them
        ((1, 1), 2, True),
        ((2, 1), 4, False),
        ((2, 1), 3, True),  # who has two does not stand for one that is still on its way
        ((0, 1), 2, True),  # the server was started anew, and not all have found it
    ],
)
def test_a_link_that_was_taken_and_is_not_yet_bound_is_waited_for(
    taken: tuple[int, ...], binds: int, waits: bool
) -> None:
    facts = [SimpleNamespace(name="other", value=99), SimpleNamespace(name="binds", value=binds)]
    server = SimpleNamespace(name="server", at_ready=SimpleNamespace(facts=facts))

    assert baseline(*taken)._is_unbound(cast(Any, server)) is waits


def test_a_client_that_is_down_is_not_waited_for() -> None:
    facts = [SimpleNamespace(name="binds", value=1)]
    server = SimpleNamespace(name="server", at_ready=SimpleNamespace(facts=facts))
    seen = baseline(1)
    cast(Any, seen)._init.records["client0"].is_up = False

    assert not seen._is_unbound(cast(Any, server))
