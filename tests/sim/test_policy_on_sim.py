"""policyd, logd and a guarded service under the real init on the simulated kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest

from nexus.abi import BootImage, Nanos, Now, PolicyRead, SleepUntil
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import CheckFor, Decision, Reason, Verdict
from nexus.runtime import Call, Deferred, Server
from nexus.runtime.authority import ASK_MAX
from nexus.services.policyd.shares import RATE_DEFAULT
from nexus.wire import ReplyStatus, answer
from tests.fakes.initrig import MS, Main
from tests.fakes.policyrig import SYSTEM, Outcome, Script, boot_sim, plan_of
from tests.fakes.policyscripts import (
    ASKED,
    FORBIDDEN,
    KEPT,
    STALE_MAX,
    audited,
    denied_by_nonsense,
    flooded,
    frozen,
    identities,
    killed,
    reloaded,
    short_deadlines,
    storm,
)

pytestmark = pytest.mark.sim

# An impostor does not take the planned link to logd, and may be asleep when it is probed.
ALONE: Final = SYSTEM.replace("uses = { logd = { depth = 64, sync = false } }\n", "", 1).replace(
    'health = { deadline = "2s", every = "250ms", answer = "500ms" }',
    'health = { deadline = "2s", every = "100ms", answer = "900ms" }',
)
SLACK: Final = 5 * MS  # of what the model of the simulated kernel costs
Boot = Callable[..., Outcome]
ALLOWED: Final = [True, "POLICY"]
DENIED: Final = [False, "POLICY"]
UNAVAILABLE: Final = [False, "UNAVAILABLE"]
FOREIGN: Final = [False, "IDENTITY"]


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> Boot:
    """Boots the system with a script."""

    def run(script: Script, **options: Any) -> Outcome:
        return boot_sim(monkeypatch, script, **options)

    return run


def test_a_frozen_policyd_allows_nothing_new_and_nothing_old_for_long(boot: Boot) -> None:
    found = boot(frozen).result

    assert found["first"] == found["kept"] == ALLOWED
    assert found["asked"][:2] == found["again"][:2] == UNAVAILABLE
    assert found["asked"][2] <= ASK_MAX + SLACK, "it waits for half a second at most"
    assert found["again"][2] <= SLACK, "and not twice"
    assert found["stale"] is not None
    assert found["stale"] <= STALE_MAX + SLACK
    assert found["generations"][1] >= found["generations"][0] + 2, "not available, available"
    assert found["available"]
    assert found["forbidden"] == DENIED
    assert ["unavailable", "deny", ASKED] in found["own"], "audited by the guard itself"


def test_a_killed_policyd_denies_all_until_the_next_is_healthy(boot: Boot) -> None:
    found = boot(killed).result

    assert found["first"] == ALLOWED
    assert UNAVAILABLE in found["seen"]
    assert found["slowest"] <= ASK_MAX + SLACK
    assert found["same"], "the policy is init's"
    assert found["generation"][1] >= found["generation"][0] + 2
    assert found["forbidden"] == DENIED


def test_a_reload_takes_a_right_away_from_the_very_next_request_and_for_good(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = plan_of(monkeypatch, SYSTEM).policy

    found = boot(lambda hands: reloaded(hands, policy)).result

    assert found["used"] == [ALLOWED, ALLOWED]
    assert found["after_reload"] == DENIED
    assert found["still"] == ALLOWED
    assert found["raised"] == [1, 1, 1, 1], "answer, page, status, audit"
    assert found["audit"] == ["deny", "driver", "t"]
    assert found["digests"] == [True] * 4
    assert found["after_restart"] == DENIED, "a restart brings no right back"


def test_nobody_speaks_for_another(boot: Boot) -> None:
    found = boot(identities).result

    assert found["own"] == ["ALLOW", "POLICY"]
    assert found["other requester"] == ["DENY", "IDENTITY"]
    assert found["own requester"] == ["DENY", "POLICY"], "it has no ipc.core"
    assert found["other starter"] == ["DENY", "IDENTITY"]
    assert found["no delegate"] == ["DENY", "IDENTITY"]
    assert found["delegated"] == ALLOWED
    assert found["unknown id"] == found["id of the kernel"] == FOREIGN
    assert found["required"] == ALLOWED
    assert "DENIED" in found["required and denied"]


def test_every_decision_is_in_the_journal_once_and_in_order(boot: Boot) -> None:
    found = boot(audited).result

    assert found["balanced"]
    assert found["dropped"] == 0
    assert found["audited"] == found["records"]
    assert found["gapless"]
    assert found["targets"] == 40
    assert [KEPT, "allow"] in found["verdicts"]
    assert [FORBIDDEN, "deny"] in found["verdicts"]
    assert [FORBIDDEN, "allow"] not in found["verdicts"]


def test_a_flood_is_summed_up_and_leaves_room_for_all_others(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = plan_of(monkeypatch, SYSTEM).policy

    found = boot(lambda hands: flooded(hands, policy)).result

    assert found["balanced"]
    assert found["gapless"]
    assert found["askers"] == ["driver"]
    assert found["flooder"] == RATE_DEFAULT, "the flood takes less than a second"
    assert found["summed"] == found["denied"] == found["dropped"] == 300 - RATE_DEFAULT
    assert found["guard"] == ["guard"]
    assert found["reloads"] == ["driver"]


# ------------------------------------------------------------------ a policyd that is none


class Healthy:
    """Answers for its health and nothing else; what it says to a question is up to `say`."""

    def __init__(self, say: Callable[[Call, CheckFor], Any]) -> None:
        self._say = say

    async def handle(self, call: Call, request: Any) -> Any:
        said = self._say(call, request)
        return await said if hasattr(said, "__await__") else said


class Babbling(Server):
    """Gives bytes of its own for every decision."""

    said = b""

    def _framed(self, reply: Any) -> "bytearray | Deferred":
        if isinstance(reply, bytes):
            return answer(self._call.message.data, ReplyStatus.OK, reply)
        return super()._framed(reply)


def impostor(say: Callable[[Call, CheckFor], Any]) -> Main:
    async def main(boot: BootImage) -> int:
        return await Babbling(Healthy(say), POLICYD, boot).run()

    return main


def silent(call: Call, _request: CheckFor) -> Deferred:
    return call.defer()


def garbage(_call: Call, _request: CheckFor) -> bytes:
    return b"\x94\x00\x00\x01\xff"


def busy(call: Call, _request: CheckFor) -> Decision:
    raise call.refuse(ReplyStatus.BUSY)


async def late(call: Call, _request: CheckFor) -> Decision:
    _ = await SleepUntil(Nanos(call.deadline + 5 * MS))
    word = await PolicyRead()
    return Decision(Verdict.ALLOW, Reason.POLICY, word.generation, 1)


def outdated(_call: Call, _request: CheckFor) -> Decision:
    return Decision(Verdict.ALLOW, Reason.POLICY, 0, 1)


@pytest.mark.parametrize("say", [silent, garbage, busy, late, outdated])
def test_a_policyd_that_gives_no_decision_allows_nothing_and_holds_up_nobody(
    boot: Boot, say: Callable[[Call, CheckFor], Any]
) -> None:
    found = boot(denied_by_nonsense, text=ALONE, mains={"policyd": impostor(say)}).result

    assert found["seen"] == [UNAVAILABLE]
    assert found["slowest"] <= ASK_MAX + SLACK


async def slow(call: Call, _request: CheckFor) -> Decision:
    _ = await SleepUntil(Nanos(await Now() + 30 * MS))
    word = await PolicyRead()
    return Decision(Verdict.ALLOW, Reason.POLICY, word.generation, call.nonce)


def test_a_slow_policyd_is_waited_for_as_long_as_the_caller_has_time(boot: Boot) -> None:
    found = boot(short_deadlines, text=ALONE, mains={"policyd": impostor(slow)}).result
    patient = boot(_one_use, text=ALONE, mains={"policyd": impostor(slow)}).result

    assert found["allowed"] == [False]
    assert found["late"] <= SLACK
    assert patient == ALLOWED


async def _one_use(hands: Any) -> Any:
    used = await hands.use(KEPT)
    return used.allowed, used.reason.name


# ------------------------------------------------------------------ again and again


@pytest.mark.parametrize("seed", range(1, 4))
def test_kills_under_load_bring_no_wrong_and_no_late_answer(boot: Boot, seed: int) -> None:
    found = boot(partial(storm, kills=8, order="kill"), seed=seed).result

    allowed = {key for key in found["seen"] if " True " in key}
    assert allowed == {f"{KEPT} True POLICY", f"{ASKED} True POLICY"}
    assert {key.split()[-1] for key in found["seen"]} == {"POLICY", "UNAVAILABLE"}
    assert found["slowest"] <= ASK_MAX + SLACK
    assert found["available"]
    assert found["balanced"]


def test_the_plan_of_this_system_is_the_one_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(monkeypatch, SYSTEM)

    assert plan.policyd == "policyd"
    assert plan.policy_stale_max == STALE_MAX
