"""Why one service may or may not reach another: the lines, and that what they advise works."""

from pathlib import Path

import pytest

from nexus.init.explain import Explanation, UnknownName, explain
from nexus.init.plan import make_plan
from nexus.init.system import load

SYSTEM = """[system]
name = "test"
total_size = "4MiB"
policy = ["base.toml", "late.toml"]

[service.policyd]
program = "policyd"
uses = { logd = { sync = false } }

[service.logd]
program = "logd"
stage = "core"
uses = [
  { name = "policyd" },
]

[service.timed]
program = "timed"

[service."demo.testsvc"]
program = "demo.testsvc"
capabilities = ["storage.read"]
uses.timed = { depth = 4, delegations = 2 }

[service.client]
program = "demo.interactive"
ports = ["console"]
"""
BASE = """[allow]
logd = ["ipc.core"]
"demo.testsvc" = ["ipc.core", "log.read"]
timed = ["ipc.core", "log.read"]
"""
LATE = """[allow]
timed = ["time.use"]

[route]
timed = "time.use"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "late.toml").write_text(LATE)
    file = tmp_path / "system.toml"
    file.write_text(SYSTEM)
    return file


def asked(file: Path, a: str, b: str, op: str | None = None) -> Explanation:
    system = load(file)
    return explain(make_plan(system), system, a, b, op)


def answer(explanation: Explanation, label: str) -> tuple[bool, str, str]:
    """The last answer of a layer: allowed, reason, file name and line."""
    found = [each for each in explanation.answers if each.label == label][-1]
    return found.allowed, found.reason, found.where.rpartition("/")[2]


def test_a_link_is_explained_with_its_line_and_terms(file: Path) -> None:
    found = asked(file, "demo.testsvc", "timed")

    assert answer(found, "plan") == (
        True,
        "demo.testsvc uses timed: sync, depth 4, 16KiB, 2 delegations",
        "system.toml:23",
    )


def test_a_post_is_called_one(file: Path) -> None:
    allowed, reason, where = answer(asked(file, "policyd", "logd"), "plan")

    assert allowed
    assert "policyd uses logd: post, depth 8" in reason
    assert where == "system.toml:8"


def test_no_link_is_explained_with_what_to_add(file: Path) -> None:
    found = asked(file, "timed", "logd")

    assert not found.allowed
    assert answer(found, "plan")[0] is False
    assert found.lines[0] == "timed -> logd: denied"
    assert f"{file}:17: add uses = {{ logd = {{}} }} to [service.timed]" in found.remedies


def test_who_would_wait_for_itself_is_told_to_post(file: Path) -> None:
    array = asked(file, "logd", "demo.testsvc")
    text = SYSTEM.replace("uses = { logd = { sync = false } }\n", "")
    file.write_text(text.replace('program = "timed"\n', 'program = "timed"\nstage = "core"\n'))
    cycle = asked(file, "timed", "demo.testsvc")
    early = asked(file, "policyd", "timed")

    assert any('{ name = "demo.testsvc", sync = false }' in each for each in array.remedies)
    assert any('"demo.testsvc" = { sync = false }' in each for each in cycle.remedies)
    assert any("timed = { sync = false }" in each for each in early.remedies)


def test_a_route_needs_its_right_and_the_targets(file: Path) -> None:
    found = asked(file, "demo.testsvc", "timed")

    assert [(each.allowed, each.reason.partition(",")[0]) for each in found.answers[1:3]] == [
        (True, "demo.testsvc holds ipc.core"),
        (False, "demo.testsvc does not hold time.use"),
    ]
    assert not found.allowed
    base = file.with_name("base.toml")
    assert found.remedies == (f'{base}:3: add "time.use" to the rights of demo.testsvc',)


def test_a_right_says_who_holds_it_and_where(file: Path) -> None:
    found = asked(file, "demo.testsvc", "init-lite", "log.read")

    assert found.allowed
    assert answer(found, "policy") == (True, "demo.testsvc holds log.read", "base.toml:3")
    assert found.holders == (("demo.testsvc", f"{file.with_name('base.toml')}:3"),)
    assert f"log.read is held by: demo.testsvc [{file.with_name('base.toml')}:3]" in found.lines


def test_a_bound_right_is_explained_with_what_it_is_for(file: Path) -> None:
    base = file.with_name("base.toml")
    text = base.read_text().replace('"log.read"', '"log.read:/plant/"', 1)
    base.write_text(text)
    plain = asked(file, "demo.testsvc", "init-lite", "log.read")
    inside = asked(file, "demo.testsvc", "init-lite", "log.read:/plant/pump")
    exact = asked(file, "demo.testsvc", "init-lite", "log.read:/plant/")
    outside = asked(file, "demo.testsvc", "init-lite", "log.read:/office/")

    alone = "demo.testsvc holds log.read for /plant/ alone"
    assert answer(plain, "policy") == answer(inside, "policy") == (True, alone, "base.toml:3")
    assert answer(exact, "policy") == (True, "demo.testsvc holds log.read", "base.toml:3")
    assert plain.holders == exact.holders == (("demo.testsvc", f"{base}:3"),)
    assert not outside.allowed
    assert outside.holders == ()
    assert outside.remedies == (f'{base}:3: add "log.read:/office/" to the rights of demo.testsvc',)


@pytest.mark.parametrize("word", ["log.read:", "log.read: x", "log.read:" + "x" * 65, "a" * 49])
def test_what_no_policy_file_may_have_is_no_right(file: Path, word: str) -> None:
    with pytest.raises(UnknownName, match="is no right"):
        _ = asked(file, "demo.testsvc", "init-lite", word)


def test_a_right_that_a_later_file_took_away_says_so(file: Path) -> None:
    found = asked(file, "timed", "init-lite", "log.read")

    allowed, reason, where = answer(found, "policy")
    assert not allowed
    assert "base.toml:4, but a later list replaces it" in reason
    assert where == "late.toml:2"
    assert found.remedies == (
        f'{file.with_name("late.toml")}:2: add "log.read" to the rights of timed',
    )


def test_a_capability_that_a_policy_file_replaced_says_so(file: Path) -> None:
    found = asked(file, "demo.testsvc", "init-lite", "storage.read")

    allowed, reason, where = answer(found, "policy")
    assert not allowed
    assert "system.toml:22, but a later list replaces it" in reason
    assert where == "base.toml:3"


def test_a_right_nobody_holds_goes_into_the_last_policy_file(file: Path) -> None:
    found = asked(file, "client", "init-lite", "proof.control")

    late = file.with_name("late.toml")
    assert found.remedies == (f'{late}:1: add client = ["proof.control"] to [allow]',)
    assert "proof.control is held by: nobody" in found.lines


def test_without_policy_files_a_right_goes_into_the_system_file(file: Path) -> None:
    file.write_text(SYSTEM.replace('policy = ["base.toml", "late.toml"]\n', ""))
    found = asked(file, "client", "init-lite", "proof.control")

    assert found.remedies == (
        f'{file}:24: add capabilities = ["proof.control"] to [service.client]',
    )


def test_what_is_advised_allows_it(file: Path) -> None:
    before = asked(file, "timed", "logd", "log.read")
    assert len(before.remedies) == 3
    file.write_text(
        SYSTEM.replace('program = "timed"\n', 'program = "timed"\nuses = { logd = {} }\n')
    )
    file.with_name("late.toml").write_text(
        LATE.replace('["time.use"]', '["time.use", "log.read", "ipc.core"]')
    )

    after = asked(file, "timed", "logd", "log.read")
    assert after.allowed
    assert after.remedies == ()
    assert after.lines[0] == "timed -> logd log.read: allowed"


def test_a_system_without_a_policy_service_asks_nobody_about_routes(tmp_path: Path) -> None:
    file = tmp_path / "system.toml"
    file.write_text(
        '[system]\nname = "test"\n[service.timed]\nprogram = "timed"\n'
        '[service.client]\nprogram = "demo.interactive"\nuses = { timed = {} }\n'
    )

    found = asked(file, "client", "timed")
    assert found.allowed
    assert [each.label for each in found.answers] == ["plan", "sandbox"]


def test_other_ways_out_are_named(file: Path) -> None:
    _, reason, _ = answer(asked(file, "client", "timed"), "sandbox")

    assert reason == "client has no way out but its links; besides: port console"


@pytest.mark.parametrize(
    ("a", "b", "op", "sentence"),
    [
        ("nobody", "timed", None, '"nobody" is no service of test: policyd, logd'),
        ("timed", "nobody", None, '"nobody" is no service of test'),
        ("timed", "timed", None, "timed needs no link to itself"),
        ("timed", "logd", "Log Read", '"Log Read" is no right'),
        ("timed", "logd", "x" * 49, "is no right"),
        ("x\n\x1b[31m" * 50, "timed", None, "is no service of test"),
    ],
)
def test_a_name_that_is_none_is_a_sentence(
    file: Path, a: str, b: str, op: str | None, sentence: str
) -> None:
    with pytest.raises(UnknownName) as caught:
        _ = asked(file, a, b, op)

    assert sentence in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("word", ["Register", "register", "REGISTER"])
def test_a_request_is_explained_by_its_link_and_the_rights_of_who_asks(
    file: Path, word: str
) -> None:
    found = asked(file, "demo.testsvc", "timed", word)

    assert (found.request, found.right, found.holders) == ("Register", None, ())
    allowed, reason, _ = answer(found, "request")
    assert allowed
    assert reason.startswith("timed itself decides on Register by the rights of demo.testsvc: ")
    assert f"ipc.core [{file.parent / 'base.toml'}:3], log.read [" in reason
    assert answer(found, "plan")[0]
    assert found.lines[0] == "demo.testsvc -> timed Register: denied"  # its route, not the request
    assert not any("Register" in remedy for remedy in found.remedies)


def test_a_request_over_a_link_that_is_not_there_is_denied(file: Path) -> None:
    found = asked(file, "timed", "logd", "GetStats".lower())

    assert not found.allowed
    assert not answer(found, "plan")[0]
    assert answer(found, "request")[1].endswith(f"time.use [{file.parent / 'late.toml'}:2]")
    assert any("add uses" in remedy for remedy in found.remedies)


def test_a_request_to_init_is_explained_too_and_so_is_one_who_holds_nothing(file: Path) -> None:
    found = asked(file, "policyd", "init-lite", "get-tasks")

    assert found.allowed
    assert answer(found, "request")[1] == (
        "init-lite itself decides on GetTasks by the rights of policyd: none"
    )


def test_a_word_that_the_policy_has_is_a_right_whatever_requests_are_called(file: Path) -> None:
    _ = (file.parent / "late.toml").write_text('[allow]\nclient = ["register"]\n')
    assert asked(file, "demo.testsvc", "timed", "register").right == "register"
    assert asked(file, "demo.testsvc", "timed", "fly").right == "fly"


def test_a_word_that_is_neither_is_told_with_the_requests(file: Path) -> None:
    with pytest.raises(UnknownName, match=r'"Fly" is no right; .* request of timed: Register, '):
        _ = asked(file, "demo.testsvc", "timed", "Fly")
