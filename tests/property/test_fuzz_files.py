"""System files and policy files of any content: a plan or one sentence, in bounded time."""

import json
import random  # noqa: TID251 (seeded; the fuzzer's own generator)
from pathlib import Path
from typing import Any, Final

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fuzz.files import LOADERS, NAMES, campaign, fuzz_files, load_system, main
from nexus.init.declare import Table
from nexus.init.errors import SystemFileError
from nexus.init.plan import make_plan
from nexus.init.policy import POLICY_FILE, merge, parse_layer
from nexus.init.system import DEVICE, GROUP, SERVICE, SYSTEM, parse

SAMPLE_COUNT: Final = 1_500  # files per loader in `make test`
EXAMPLES: Final = 150


def test_every_loader_takes_mutated_files() -> None:
    counts = campaign(SAMPLE_COUNT, seed=1)

    assert set(counts) == {"system", "policy"}
    assert all(each.accepted + each.refused == SAMPLE_COUNT for each in counts.values())
    assert all(each.accepted and each.refused for each in counts.values())


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_every_seed_is_right_but_for_programs_that_are_not_there(name: str) -> None:
    load, seeds = LOADERS[name]

    load(seeds[0])
    if name == "policy":
        load(seeds[1])


def test_an_exception_that_is_no_sentence_is_not_swallowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(data: bytes) -> None:
        raise KeyError(len(data))

    with pytest.raises(KeyError):
        _ = fuzz_files(broken, [b"a = 1"], random.Random(1), 5)
    assert "the input was" in capsys.readouterr().err


def test_a_sentence_of_several_lines_is_a_fault() -> None:
    def rambling(data: bytes) -> None:
        raise SystemFileError(Path("x"), 1, "a line", "two\nlines")

    with pytest.raises(AssertionError):
        _ = fuzz_files(rambling, [b"a = 1"], random.Random(1), 5)


def test_a_loader_that_refuses_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LOADERS, "policy", (lambda _: None, [b"a = 1"]))
    monkeypatch.setitem(LOADERS, "system", (load_system, LOADERS["system"][1]))

    assert main(["--files", "200"]) == 1
    assert "NOT TESTED" in capsys.readouterr().out


SCALARS: Final = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=20),
    st.sampled_from(
        ("1ms", "2s", "1min", "16KiB", "1MiB", "timed", "client", "policyd", "logd", "one", "all")
    ),
    st.sampled_from(("core", "fork", "exec", "safe-mode", "a.b", "/dev/x", "../x", "x:y", "::1")),
    st.sampled_from(("block", "entropy", "empty", "disk", "keyring", "file", "64KiB", "100001B")),
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(("name", "path", "port", "sync", "timed")), inner),
    ),
    max_leaves=6,
)
SKIPPED: Final = {"policy", "path", "module", "protocol", "double"}  # they would read real files


def some_of(table: Table, always: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A table with a few of its keys, each with any value."""
    keys = sorted(set(table.keys) - set(always) - SKIPPED)
    return st.dictionaries(st.sampled_from(keys), VALUES, max_size=2).map(
        lambda few: {**always, **few}
    )


def toml(value: Any) -> str:
    """A value as TOML writes it inline."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


SERVICES: Final = st.fixed_dictionaries(
    {"timed": some_of(SERVICE, {"program": "timed"})},
    optional={
        "client": some_of(SERVICE, {"program": "demo.interactive", "uses": {"timed": {}}}),
        "policyd": some_of(SERVICE, {"program": "policyd"}),
    },
)


@settings(max_examples=EXAMPLES)
@given(
    some_of(SYSTEM, {"name": "any", "total_size": "16MiB"}),
    SERVICES,
    st.dictionaries(st.sampled_from(("a", "timed")), some_of(GROUP, {}), max_size=1),
    st.dictionaries(
        st.sampled_from(("disk", "timed")),
        st.sampled_from(("block", "entropy", "empty")).flatmap(
            lambda kind: some_of(DEVICE, {"kind": kind})
        ),
        max_size=2,
    ),
)
def test_any_value_of_any_key_gives_a_sentence_or_a_plan(
    system: dict[str, Any],
    services: dict[str, Any],
    groups: dict[str, Any],
    devices: dict[str, Any],
) -> None:
    document = {"system": system, "service": services, "group": groups, "device": devices}
    text = "".join(f"{key} = {toml(value)}\n" for key, value in document.items())
    try:
        plan = make_plan(parse(text.encode(), Path("any.toml")))
    except SystemFileError as error:
        assert str(error).isprintable()
        assert error.line >= 1
    else:
        assert sorted(plan.by_name) == sorted(services)
        assert sorted(n for group in plan.groups for n in group.members) == sorted(services)


@settings(max_examples=EXAMPLES)
@given(some_of(POLICY_FILE, {}), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2))
def test_any_policy_gives_a_sentence_or_a_policy(
    document: dict[str, Any], allow: dict[str, Any]
) -> None:
    text = "".join(
        f"{key} = {toml(value)}\n" for key, value in {"allow": allow, **document}.items()
    )
    try:
        policy = merge((parse_layer(text.encode(), Path("any.toml"), "any.toml"),), NAMES)
    except SystemFileError as error:
        assert str(error).isprintable()
    else:
        assert policy.services == list(NAMES)
        assert set(policy.allow) <= set(NAMES)
