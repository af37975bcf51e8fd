"""`nexus bugreport`: what is in it, and that no setting of a service is."""

import json
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.cli import main
from nexus.cli.bugreport import bugreport, plan_of, system_of, without_settings

MINIMAL = Path(__file__).parents[2] / "systems" / "minimal.toml"
SECRET = "hunter2-canary"


def test_a_bug_report_has_no_settings_and_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    monkeypatch.setattr("nexus.cli.doctor.document", dict)
    file = tmp_path / "system.toml"
    text = MINIMAL.read_text().replace(
        "[service.timed]", f'[service.timed]\nsettings = {{ p = "{SECRET}" }}'
    )
    _ = file.write_text(text.replace('core = "policyd"', f'core = "policyd"\nname = "{SECRET}"'))
    out = tmp_path / "report.tar.gz"

    bugreport(None, file, out, as_json=True)

    with tarfile.open(out) as archive:
        parts = {
            name.partition("/")[2]: archive.extractfile(name).read()  # type: ignore[union-attr]
            for name in archive.getnames()
        }
    assert set(parts) == {
        *("README.txt", "versions.json", "kernel.json", "doctor.json", "system.json", "plan.json")
    }
    assert all(SECRET.encode() not in part for part in parts.values())
    assert json.loads(parts["system.json"])["service"]["timed"] == {
        **tomllib.loads(MINIMAL.read_text())["service"]["timed"],
        "settings": "not shown",
    }
    assert all(name.encode() in parts["README.txt"] for name in parts if name != "README.txt")


def test_a_bug_report_never_writes_over_a_file(tmp_path: Path) -> None:
    out = tmp_path / "report.tar.gz"
    _ = out.write_text("mine")
    assert main(["bugreport", "--file", str(MINIMAL), "-o", str(out)]) == 1
    assert out.read_text() == "mine"


SPELLINGS = {
    "table": f'[service.a.settings]\ncore = "{SECRET}"\n',
    "spaces in the header": f'[ service . a . settings ]\ncore = "{SECRET}"\n',
    "quoted header": f'[service."a"."settings"]\ncore = "{SECRET}"\n',
    "escaped header": f'[service.a."setting\\u0073"]\ncore = "{SECRET}"\n',
    "inline": f'[service.a]\nsettings = {{ core = "{SECRET}" }}\n',
    "dotted": f'[service.a]\nsettings.core = "{SECRET}"\n',
    "dotted from the service": f'[service]\na.settings.core = "{SECRET}"\n',
    "dotted from the root": f'service.a.settings.core = "{SECRET}"\n',
    "dotted with spaces": f'[service.a]\n"settings" . core = "{SECRET}"\n',
    "inline service": f'[service]\na = {{ settings = {{ core = "{SECRET}" }} }}\n',
    "table below": f'[service.a.settings.deep]\ncore = "{SECRET}"\n',
    "array of tables": f'[[service.a.settings.deep]]\ncore = "{SECRET}"\n',
    "multi-line array": f'[service.a.settings]\ncore = [\n[1],\n["x", "{SECRET}"],\n]\n',
    "array that begins like a header": f'[service.a]\nsettings.b = [\n["{SECRET}"]\n]\n',
    "multi-line text": f"[service.a.settings]\ncore = '''\n[service.b]\n{SECRET}\n'''\n",
    "comment": f"[service.a.settings] # {SECRET}\n# {SECRET}\ncore = 1\n",
    "key": f"[service.a.settings]\n{SECRET} = 1\n",
    "a date beside it": f'[service.a]\nb = 2026-01-01\nsettings.core = "{SECRET}"\n',
    "no TOML after it": f'[service.a.settings]\ncore = "{SECRET}"\n[\n',
    "no TOML in it": f"[service.a.settings]\n{SECRET} = {SECRET}\n",
    "twice": f"[service.a.settings]\n{SECRET} = 1\n{SECRET} = 2\n",
    "no UTF-8": f'[service.a.settings]\ncore = "{SECRET}\udcff"\n',
    "nested too deeply": f'[service.a.settings]\ncore = {"[" * 5_000}"{SECRET}"\n',
    "too large": f'[service.a.settings]\ncore = "{SECRET}"\n#{"x" * 300_000}\n',
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_settings_are_in_no_bug_report_however_they_are_written(
    spelling: str, tmp_path: Path
) -> None:
    file = tmp_path / "system.toml"
    _ = file.write_bytes(
        SPELLINGS[spelling].encode(errors="surrogateescape") + b'[system]\nname = "kept"\n'
    )
    shown = json.dumps([system_of(file), plan_of(file)], default=str)
    assert SECRET not in shown
    assert ('"kept"' in shown) is ("left_out" not in shown)
    assert ("left_out" in shown) is spelling.startswith(("no ", "nested", "too", "twice"))


def test_a_report_says_where_a_system_file_is_no_toml(tmp_path: Path) -> None:
    file = tmp_path / "system.toml"
    _ = file.write_text("[system]\nname = ?\n")
    assert system_of(file) == {
        "left_out": "it is no TOML, line 2, column 8; what it says about settings cannot be told"
    }
    assert "cannot be read" in system_of(tmp_path / "none.toml")["left_out"]


@given(
    st.recursive(
        st.integers() | st.booleans(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "b", "settings"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_no_value_below_settings_is_kept_and_every_other_is(tree: Any) -> None:
    def leaves(value: Any, hidden: bool) -> list[Any]:
        if isinstance(value, dict):
            return [
                leaf
                for key, each in value.items()
                for leaf in leaves(each, hidden or key == "settings")
            ]
        if isinstance(value, list):
            return [leaf for each in value for leaf in leaves(each, hidden)]
        return [] if hidden else [value]

    assert leaves(without_settings(tree), False) == leaves(tree, False)
    assert "settings" not in str(without_settings(tree)).replace("'settings': 'not shown'", "")
