"""The guide does what it says: every command on the page is run, every answer compared."""

import os
from pathlib import Path

import pytest

from tests.fakes.machine import machine, python_of
from tests.guide.console import WrongPage, matches, run_page, steps_of

PAGES = Path(__file__).parents[2] / "docs" / "guide"


@pytest.mark.linux
@pytest.mark.parametrize(
    "name", ["first-system", "state", "keys", "observability", "crashes", "export", "updates"]
)
def test_a_page_shows_what_the_commands_print(name: str) -> None:
    page = PAGES / f"{name}.md"
    python = python_of(os.getuid())
    assert python is not None
    with machine(os.getuid(), python) as host:
        commands = host.home / "bin"
        commands.mkdir()
        nexus = commands / "nexus"
        _ = nexus.write_text(f'#!/bin/sh\nexec "{python[0]}" -P -m nexus.cli "$@"\n')
        nexus.chmod(0o755)
        environ = {**host.environment, "PATH": f"{commands}:{os.environ['PATH']}"}

        ran = [step.command.split()[0] for step in run_page(page, host.home, environ)]

    assert ran.count("nexus") >= 12


PAGE = """
text
```sh
$ not run
```
```console
$ echo one; echo two
one
t...o
$ cat <<'END'
> a b
>
> END
a b

```
```console exit=3
$ exit 3
```
"""


def test_a_page_is_read_command_by_command() -> None:
    steps = steps_of(PAGE)

    assert [step.command for step in steps] == [
        "echo one; echo two",
        "cat <<'END'\na b\n\nEND",
        "exit 3",
    ]
    assert [step.code for step in steps] == [0, 0, 3]
    assert steps[0].shown == ["one", "t...o"]


def test_a_page_that_is_right_passes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    _ = page.write_text(PAGE)
    assert len(list(run_page(page, tmp_path, os.environ))) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        "```console\n$ echo one\ntwo\n```\n",
        "```console\n$ echo one\n```\n",
        "```console\n$ true\none\n```\n",
        "```console\n$ false\n```\n",
        "```console exit=1\n$ true\n```\n",
        "```console\none\n```\n",
    ],
)
def test_a_page_that_is_wrong_fails(wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    _ = page.write_text(wrong)
    with pytest.raises(WrongPage):
        _ = list(run_page(page, tmp_path, os.environ))


def test_ellipses_stand_for_text_and_for_lines() -> None:
    assert matches(["a", "...", "z"], ["a", "b", "c", "z"])
    assert matches(["a", "...", "z"], ["a", "z"])
    assert not matches(["a", "..."], ["b"])
    assert matches(["pid ... is up"], ["pid 12 is up"])
    assert not matches(["pid ... is up"], ["pid 12 is down"])
    assert matches(["A   B"], ["A B"])
