"""Policy files: layers, what a later one replaces, and where each right is given."""

from pathlib import Path

import pytest

from nexus.init.errors import SystemFileError
from nexus.init.plan import Plan, load_plan
from nexus.init.policy import POLICY_FILE_SIZE_MAX, layers_of
from nexus.init.system import load
from nexus.protocols.policy import POLICY_SIZE_MAX, RIGHTS_MAX, Right, decode_policy

SYSTEM = """[system]
name = "test"
policy = ["base.toml", "site/late.toml"]

[service.client]
program = "demo.interactive"
capabilities = ["proof.control", "log.read"]

[service.timed]
program = "timed"

[service."demo.testsvc"]
program = "demo.testsvc"
capabilities = ["storage.read"]
"""
BASE = """[allow]
timed = [
  "time.set",
  "time.use",
]
"""
LATE = """[route]
timed = "time.use"

[allow]
client = ["log.write"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    (tmp_path / "system.toml").write_text(SYSTEM)
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "site" / "late.toml").write_text(LATE)
    return tmp_path


def plan_in(folder: Path) -> Plan:
    return load_plan(folder / "system.toml")


def refused(folder: Path) -> SystemFileError:
    with pytest.raises(SystemFileError) as caught:
        plan_in(folder)
    return caught.value


def test_each_right_says_the_file_and_line_that_give_it(folder: Path) -> None:
    policy = plan_in(folder).policy

    assert policy.allow["timed"] == [
        Right("time.set", "base.toml", 3),
        Right("time.use", "base.toml", 4),
    ]
    assert policy.right("demo.testsvc", "storage.read") == Right("storage.read", "system.toml", 14)
    assert policy.routes == {"timed": "time.use"}


def test_a_right_may_be_bound_and_stand_beside_one_that_is_not(folder: Path) -> None:
    bound = (
        '[allow]\nclient = ["statefs.read", "statefs.write:/state/a/", "statefs.write:/state/b"]\n'
    )
    (folder / "site" / "late.toml").write_text(bound)
    capabilities = '["storage.read:disk 1", "storage.read"]'
    (folder / "system.toml").write_text(SYSTEM.replace('["storage.read"]', capabilities))
    policy = plan_in(folder).policy

    write = Right("statefs.write", "site/late.toml", 2, "/state/a/")
    assert policy.right("client", "statefs.write", "/state/a/x") == write
    assert policy.right("client", "statefs.write", "/state/b") is not None
    denied = ("", "/state/", "/state/a", "/state/ab/", "/state/b/", "/state/bc")
    assert [policy.right("client", "statefs.write", each) for each in denied] == [None] * 6
    assert policy.right("client", "statefs.read", "/state/c/") is not None
    assert [each.text for each in policy.allow["demo.testsvc"]] == [
        "storage.read:disk 1",
        "storage.read",
    ]
    assert decode_policy(policy.encoded()) == policy


def test_what_a_right_is_bound_to_counts_for_the_digests(folder: Path) -> None:
    plain = plan_in(folder)
    (folder / "system.toml").write_text(SYSTEM.replace('"storage.read"', '"storage.read:/x/"'))
    bound = plan_in(folder)

    assert plain.policy.digest != bound.policy.digest
    assert plain.digest != bound.digest


def test_a_later_file_replaces_the_whole_list_of_a_service(folder: Path) -> None:
    policy = plan_in(folder).policy

    assert policy.allow["client"] == [Right("log.write", "site/late.toml", 5)]
    assert policy.right("client", "proof.control") is None
    assert policy.right("client", "log.read") is None


def test_the_order_of_the_files_decides(folder: Path) -> None:
    (folder / "base.toml").write_text('[allow]\nclient = ["log.read"]\n')
    late = plan_in(folder).policy
    swapped = SYSTEM.replace('["base.toml", "site/late.toml"]', '["site/late.toml", "base.toml"]')
    (folder / "system.toml").write_text(swapped)

    assert [right.name for right in late.allow["client"]] == ["log.write"]
    assert [right.name for right in plan_in(folder).policy.allow["client"]] == ["log.read"]


def test_an_empty_list_takes_every_right_away(folder: Path) -> None:
    (folder / "site" / "late.toml").write_text("[allow]\nclient = []\n")

    assert "client" not in plan_in(folder).policy.allow


def test_the_services_are_those_of_the_plan_in_its_order(folder: Path) -> None:
    text = SYSTEM.replace('program = "timed"', 'program = "timed"\nstage = "core"')
    (folder / "system.toml").write_text(text)
    plan = plan_in(folder)

    assert plan.policy.services == ["timed", "client", "demo.testsvc"]
    assert plan.policy.services == [service.name for service in plan.services]


def test_what_travels_is_the_policy_again(folder: Path) -> None:
    policy = plan_in(folder).policy

    assert decode_policy(policy.encoded()) == policy


def test_a_right_and_a_route_count_for_the_digest_of_the_plan_and_a_comment_does_not(
    folder: Path,
) -> None:
    digest = plan_in(folder).digest

    (folder / "base.toml").write_text(f"# why\n\n{BASE}")
    assert plan_in(folder).digest == digest
    (folder / "base.toml").write_text(BASE.replace("time.set", "time.get"))
    assert plan_in(folder).digest != digest
    (folder / "base.toml").write_text(BASE)
    (folder / "site" / "late.toml").write_text(LATE.replace('"time.use"', '"time.get"'))
    assert plan_in(folder).digest != digest


def test_a_system_without_policy_files_has_its_capabilities(tmp_path: Path) -> None:
    text = SYSTEM.replace('policy = ["base.toml", "site/late.toml"]\n', "")
    (tmp_path / "system.toml").write_text(text)

    policy = plan_in(tmp_path).policy
    assert {name: [right.name for right in rights] for name, rights in policy.allow.items()} == {
        "client": ["proof.control", "log.read"],
        "demo.testsvc": ["storage.read"],
    }


def test_a_wrong_subject_in_a_layer_that_is_replaced_is_wrong_all_the_same(folder: Path) -> None:
    (folder / "base.toml").write_text('[allow]\npump = ["pump.use"]\n')

    error = refused(folder)
    assert (error.path, error.line) == (folder / "base.toml", 2)
    assert error.found == '"pump"'


def test_a_policy_that_would_not_travel_is_refused(folder: Path) -> None:
    names = [f"s{index}" for index in range(40)]
    services = "".join(
        f'[service.{name}]\nprogram = "timed"\nowner_size = "4KiB"\nendpoints = 2\n'
        for name in names
    ).replace('"4KiB"', '"60KiB"')
    head = '[system]\nname = "test"\ntotal_size = "16MiB"\npolicy = ["base.toml"]\n'
    (folder / "system.toml").write_text(head + services)
    rights = ", ".join(f'"r{index:02d}{"x" * 13}"' for index in range(RIGHTS_MAX))
    (folder / "base.toml").write_text(
        "[allow]\n" + "".join(f"{name} = [{rights}]\n" for name in names)
    )

    error = refused(folder)
    assert error.path == folder / "base.toml"
    assert f"at most {POLICY_SIZE_MAX} bytes as it travels" in error.expected


def test_an_enormous_policy_file_is_refused_unread(folder: Path) -> None:
    (folder / "base.toml").write_bytes(b"#" * (POLICY_FILE_SIZE_MAX + 1))

    error = refused(folder)
    assert error.expected == f"a policy file of at most {POLICY_FILE_SIZE_MAX} bytes"
    assert error.found == f'"base.toml": {POLICY_FILE_SIZE_MAX + 1} bytes'


def test_bytes_that_are_not_utf8_are_named_with_the_policy_file(folder: Path) -> None:
    (folder / "base.toml").write_bytes(b"[allow]\n# \xff\n")

    error = refused(folder)
    assert (error.path, error.line, error.found) == (folder / "base.toml", 2, "byte 0xff")


def test_a_folder_instead_of_a_policy_file_is_a_sentence(folder: Path) -> None:
    (folder / "base.toml").unlink()
    (folder / "base.toml").mkdir()

    error = refused(folder)
    assert (error.path, error.line) == (folder / "system.toml", 3)
    assert error.expected == "a policy file that is a regular file"
    assert error.found == '"base.toml": a directory'


def test_a_layer_knows_the_line_of_a_list_and_of_a_right(folder: Path) -> None:
    _, base, late = layers_of(load(folder / "system.toml"))

    assert (base.line("timed"), base.line("timed", 1)) == (2, 4)
    assert Right("time.use", "base.toml", 4) in base.rights("timed")
    assert "log.read" not in [right.name for right in late.rights("client")]
