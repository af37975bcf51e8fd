"""What every test shares: the hypothesis profiles, and assertions that tell what they compared."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import beside
from tests.sim.sweep import Sweep

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

SABOTEURS = "test_prove_saboteurs.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our own."""
    parser.addoption(
        beside.OPTION, action="store_true", help="run what measures no time beside what does"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is collected."""
    beside.configure(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Ask about the saboteurs last of all: by then most of their runs are over."""
    items.sort(key=lambda item: item.path.name == SABOTEURS)
    beside.sort(config, items)


@pytest.fixture(scope="session", autouse=True)
def sweep(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sweep | None]:
    """The saboteurs that this session asks about, begun with its first test."""
    numbers = [
        item.callspec.params["number"]
        for item in request.session.items
        if item.path.name == SABOTEURS
        and isinstance(item, pytest.Function)
        and beside.runs_here(item)
    ]
    asked = [number for number in numbers if isinstance(number, int)]
    if not asked:
        yield None
        return
    sweep = Sweep(asked, tmp_path_factory.mktemp("saboteurs"))
    yield sweep
    sweep.close()
