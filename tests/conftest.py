"""What every test shares: the hypothesis profiles, and assertions that tell what they compared."""

import os
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.beside import Beside, is_last, make_way, scope_of

pytest.register_assert_rewrite("nexus.testing")  # the suite we ship is tests too

# A shell starts what runs in the background with SIGINT ignored, and every child inherits that.
_ = signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "ci",
    derandomize=True,  # the same examples every time: red means that the change made it red
    database=None,
    deadline=None,  # the machine's load is not a property of the code
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile(
    "long",
    parent=settings.get_profile("ci"),
    derandomize=False,
    max_examples=2_000,
    stateful_step_count=100,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The machine's tests first, for they take longest; those that go one by one last."""
    items.sort(key=lambda item: (scope_of(item.nodeid) != "machine", is_last(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Beside:
    """Who runs what, with more than one worker."""
    return Beside(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before its fixtures."""
    make_way(item)
