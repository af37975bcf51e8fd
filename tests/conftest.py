"""What every test shares: the hypothesis profiles, and assertions that tell what they compared."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

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
