"""Each rule of tools/tidy.py finds the violation that is planted for it, and nothing else."""

from pathlib import Path

import pytest

from tools import tidy

SETTINGS = """\
[project.scripts]
nexus = "nexus.cli:main"
[[tool.importlinter.contracts]]
id = "testing"
source_modules = ["nexus.runtime", "nexus.services", "nexus.ipc", "nexus.cli"]
"""


def plant(root: Path, files: dict[str, str]) -> tidy.Tree:
    """A small tree without a fault, with `files` on top."""
    clean = {
        "pyproject.toml": SETTINGS,
        "CHANGELOG.md": "## [Unreleased]\n",
        "changelog.d/1.added.md": "Something.\n",
        "src/nexus/__init__.py": "",
        "src/nexus/cli/__init__.py": "from nexus.ipc import route\n",
        "src/nexus/ipc/route.py": "WAYS = 3\n",
    }
    for name, text in (clean | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return tidy.Tree(root)


def test_a_clean_tree_has_no_fault(tmp_path: Path) -> None:
    tree = plant(tmp_path, {})

    assert tidy.faults(tree) == []


SLEEPING = """\
async def poll(client):
    while not client.ready:
        await SleepUntil(client.later())
"""
RETRYING = """\
async def fetch(client):
    for _ in range(3):
        try:
            return await client.call()
        except LookupError:
            continue
"""


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        ("banned_names", "tools/utils.py", ""),
        ("banned_names", "tests/helpers/test_x.py", ""),
        ("dead_modules", "src/nexus/ipc/forgotten.py", ""),
        ("unfinished", "docs/x.md", "TO" + "DO later\n"),
        ("unfinished", "src/nexus/ipc/route.py", "WAYS = 3  # FIX" + "ME\n"),
        ("long_lines", "src/nexus/ipc/route.py", f"WAYS = {'3' * 94}\n"),
        ("long_lines", "Makefile", "x" * 101),
        ("broad_excepts", "tools/x.py", "try:\n    pass\nexcept Exception:\n    pass\n"),
        ("broad_excepts", "tools/x.py", "try:\n    pass\nexcept:\n    pass\n"),
        (
            "broad_excepts",
            "tools/x.py",
            "try:\n    pass\nexcept (OSError, BaseException):\n    pass\n",
        ),
        ("optimised_python", "Makefile", "run:\n\tpython3 " + "-O main.py\n"),
        ("optimised_python", ".ci/run", "PYTHONOPTIMIZE" + "=1 make\n"),
        ("machine_paths", "README.md", "see /wo" + "rk/main\n"),
        ("registry_hosts", "requirements/run.txt", "--index-url https://py" + "pi.org/simple\n"),
        ("registry_hosts", "docs/x.md", "from files.python" + "hosted.org\n"),
        ("registry_hosts", "docs/x.md", "deb http://deb.deb" + "ian.org bookworm\n"),
        ("ground_tests", "src/nexus/ipc/route.py", 'WAYS = 3\nif ground == "sim":\n    WAYS = 4\n'),
        ("ground_tests", "src/nexus/ipc/route.py", "if boot.simulated:\n    WAYS = 4\n"),
        ("service_loops", "src/nexus/services/__init__.py", SLEEPING),
        ("service_loops", "src/nexus/services/__init__.py", RETRYING),
        ("contracts_complete", "src/nexus/novel/__init__.py", ""),
        ("news", "changelog.d/new-thing.md", "Something.\n"),
    ],
)
def test_a_planted_violation_is_found_by_its_rule_alone(
    tmp_path: Path, rule: str, path: str, text: str
) -> None:
    tree = plant(tmp_path, {path: text})

    found = {each.__name__: list(each(tree)) for each in tidy.RULES}

    assert [fault.path for fault in found.pop(rule)] == [
        path if rule != "contracts_complete" else "pyproject.toml"
    ]
    assert found == {name: [] for name in found}


def test_a_tree_that_changed_tells_what(tmp_path: Path) -> None:
    tree = plant(tmp_path, {})
    (tmp_path / "changelog.d/1.added.md").unlink()

    assert [fault.path for fault in tidy.news(tree)] == ["changelog.d"]


def test_a_handler_that_cleans_up_and_raises_again_is_no_catch(tmp_path: Path) -> None:
    text = "try:\n    pass\nexcept BaseException:\n    x = 1\n    raise\n"
    tree = plant(tmp_path, {"tools/x.py": text})

    assert list(tidy.broad_excepts(tree)) == []


def test_a_broad_except_may_stand_in_the_outermost_frames(tmp_path: Path) -> None:
    text = "try:\n    pass\nexcept BaseException:\n    x = 1\n"
    tree = plant(tmp_path, {"src/nexus/runtime/__init__.py": text})

    assert list(tidy.broad_excepts(tree)) == []


def test_a_module_that_only_its_test_imports_is_dead(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "src/nexus/ipc/lonely.py": "",
            "tests/unit/test_lonely.py": "from nexus.ipc import lonely\n",
        },
    )

    assert [fault.path for fault in tidy.dead_modules(tree)] == ["src/nexus/ipc/lonely.py"]


def test_a_module_named_as_a_program_is_alive(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "src/nexus/services/timed.py": "",
            "src/nexus/cli/__init__.py": (
                "from nexus.ipc import route\nTIMED = 'nexus.services.timed'\n"
            ),
        },
    )

    assert list(tidy.dead_modules(tree)) == []


def test_work_left_for_later_is_allowed_with_its_issue(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"docs/x.md": "TO" + "DO(#12) later\n"})

    assert list(tidy.unfinished(tree)) == []


def test_this_tree_is_tidy() -> None:
    assert tidy.faults(tidy.Tree(tidy.ROOT)) == []
