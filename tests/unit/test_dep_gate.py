"""The gate on imports finds what is planted, and what Python loads is in what the gate has read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from nexus.bundle.needs import normalised
from nexus.init.programs import PROGRAMS, ProgramSource
from tools import dep_gate
from tools.dep_gate import GREEN, PID1, CannotTell, Source, as_text, declared_in, gate

ROOT: Final = Path(__file__).resolve().parents[2]

MODULES: Final = {
    "nexus/__init__.py": "",
    "nexus/abi/__init__.py": "import enum\n",
    "nexus/init/__init__.py": "import os\nfrom nexus.abi import x\n",
    "nexus/services/__init__.py": "",
    "nexus/services/pump/__init__.py": "from nexus.abi import x\nimport wires\n",
}
LIBRARIES: Final = {
    "wires": "from wires import inner\n",
    "radio": "",
    "solder": "",
}
DECLARED: Final = """
[pid1]
modules = ["nexus.init"]

[group.all]
nexus = ["nexus.abi"]
python = ["enum"]

[program.pid1]
with = ["all"]
nexus = ["nexus.init", "nexus.services"]
python = ["os"]
libraries = ["wires"]

[program.pump]
with = ["all"]
nexus = ["nexus.services"]
libraries = ["wires"]
"""
PUMP: Final = {"pump": ProgramSource(name="pump", module="nexus.services.pump")}


def judged(
    folder: Path, files: dict[str, str] | None = None, declared: str = DECLARED
) -> dep_gate.Gate:
    """What the gate finds in a small tree with `files` on top, `declared` beside it."""
    source, installed = folder / "src", folder / "installed"
    for name, text in (MODULES | (files or {})).items():
        if name.startswith("nexus/"):
            _write(source / name, text)
        else:
            _write(installed / name, text)
    for name, text in LIBRARIES.items():
        modules = {f"{name}/__init__.py": text, f"{name}/inner.py": ""}
        modules = {each: (files or {}).get(each, content) for each, content in modules.items()}
        for each, content in modules.items():
            _write(installed / each, content)
        others = [each for each in files or {} if each.startswith(f"{name}/")]
        info = installed / f"{name}-1.0.dist-info"
        _write(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        _write(info / "RECORD", "".join(f"{each},,\n" for each in {*modules, *others}))
    _write(folder / "os-graph.toml", declared)
    return gate(Source([source, installed]), declared_in(folder / "os-graph.toml"), PUMP, ["wires"])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _ = path.write_text(text, "utf-8")


def test_a_tree_that_is_as_declared_is_green(tmp_path: Path) -> None:
    found = judged(tmp_path)

    assert found.faults == ()
    assert as_text(found, declared_in(tmp_path / "os-graph.toml")).endswith(f"\n{GREEN}\n")
    assert set(found.closures["pump"].libraries) == {"wires"}


PUMPS = "nexus/services/pump/__init__.py"
PLANTED: Final = {
    "a library": ({PUMPS: "import wires, radio\n"}, "forbidden libraries: radio"),
    "a library at first use": (
        {PUMPS: "import wires\ndef f():\n    import radio\n"},
        "forbidden libraries: radio",
    ),
    "a library of a package around it": (
        {"nexus/services/__init__.py": "import radio\n"},
        "forbidden libraries: radio",
    ),
    "a library by way of another module": (
        {PUMPS: "import wires, nexus.abi.pipe\n", "nexus/abi/pipe.py": "from radio import inner\n"},
        "forbidden libraries: radio, imported by nexus.abi.pipe, line 1",
    ),
    "a library of a library": (
        {"wires/inner.py": "import solder\n"},
        "forbidden libraries: solder, imported by wires.inner, line 1",
    ),
    "a module of Python": ({PUMPS: "import wires, random\n"}, "forbidden python: random"),
    "a package of ours": (
        {PUMPS: "import wires, nexus.proof\n", "nexus/proof/__init__.py": ""},
        "forbidden nexus: nexus.proof",
    ),
    "a module that is not there": (
        {PUMPS: "import wires\ntry:\n    import tin\nexcept ImportError:\n    pass\n"},
        "pump: tin cannot be found (nexus.services.pump, line 3)",
    ),
    "a module that cannot be read": ({PUMPS: "import wires\nimport (\n"}, "cannot be read"),
    "an import by a string": (
        {PUMPS: "import wires, importlib\nimportlib.import_module('radio')\n"},
        "imports by a string (line 2), which [dynamic] does not declare",
    ),
    "a hidden import": (
        {PUMPS: "import wires\n__import__('radio')\n"},
        "imports by a string (line 2), which [dynamic] does not declare",
    ),
    "something compiled": (
        {"wires/inner.py": "from wires import fast\n", "wires/fast.so": ""},
        "wires.fast is compiled, and COMPILED does not say what it imports",
    ),
    "less than is declared": ({PUMPS: ""}, 'wires is declared in program."pump", and not imported'),
}


@pytest.mark.parametrize("what", sorted(PLANTED))
def test_what_is_planted_is_found(tmp_path: Path, what: str) -> None:
    files, sentence = PLANTED[what]

    found = judged(tmp_path, files)

    assert any(sentence in fault for fault in found.faults), found.faults
    assert GREEN not in as_text(found, declared_in(tmp_path / "os-graph.toml"))


def test_what_only_a_type_checker_imports_does_not_count(tmp_path: Path) -> None:
    text = "import wires, nexus.abi\nfrom typing import TYPE_CHECKING\n"
    text += "if TYPE_CHECKING:\n    import radio\n"
    declared = DECLARED.replace('["enum"]', '["enum", "typing"]')

    files = {PUMPS: text, "nexus/abi/__init__.py": "import enum, typing"}

    found = judged(tmp_path, files, declared)

    assert found.faults == ()


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    import solder\nexcept ImportError:\n    solder = None\n",
        "def f():\n    import solder\n",
        "import sys\nif sys.version_info > (3, 99):\n    import copper\n",
    ],
)
def test_a_library_may_look_for_what_no_device_has(tmp_path: Path, text: str) -> None:
    found = judged(tmp_path, {"wires/inner.py": text})

    assert found.faults == ()


WRONG: Final = {
    "a program that is not declared": (
        DECLARED.partition("[program.pump]")[0],
        "pump: is not declared",
    ),
    "a program that is not there": (
        f'{DECLARED}\n[program.valve]\nwith = ["all"]\n',
        "valve: is declared, and there is no such program",
    ),
    "the same twice": (
        DECLARED.replace('python = ["os"]', 'python = ["enum", "os"]'),
        'pid1: python: enum stands in group.all and in program."pid1"',
    ),
    "a group of nobody": (f'{DECLARED}\n[group.none]\npython = ["os"]\n', "group.none: no program"),
    "a cut where nothing is": (
        f'[cuts]\n"nexus.abi -> nexus.init" = "it was so once"\n{DECLARED}',
        "cuts: nexus.abi does not import nexus.init",
    ),
    "a string where nothing is": (
        f'[dynamic."nexus.abi"]\nimports = []\nwhy = "it was so once"\n{DECLARED}',
        "dynamic: nexus.abi imports nothing by a string",
    ),
    "a library that no set names": (
        DECLARED.replace('["wires"]', '["wires", "radio"]', 1),
        "radio is either declared or in DEVICE_DISTRIBUTIONS",
    ),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_a_list_that_is_not_true_is_a_fault(tmp_path: Path, what: str) -> None:
    declared, sentence = WRONG[what]

    found = judged(tmp_path, declared=declared)

    assert any(sentence in fault for fault in found.faults), found.faults


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[pid1\n",
        DECLARED.replace('with = ["all"]', 'with = ["nobody"]', 1),
        DECLARED.replace('python = ["os"]', 'snakes = ["os"]'),
        f'[cuts]\n"nexus.abi nexus.init" = "no arrow"\n{DECLARED}',
    ],
)
def test_a_list_that_cannot_be_read_is_no_empty_list(tmp_path: Path, text: str) -> None:
    with pytest.raises(CannotTell, match=r"os-graph.toml cannot be read"):
        _ = judged(tmp_path, declared=text)


def test_an_error_of_the_gate_is_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(dep_gate, "DECLARED", tmp_path / "missing.toml")

    assert dep_gate.main([], said.append) == 1
    assert GREEN not in "".join(said)
    assert dep_gate.main(["--all"], said.append) == 2


# ---------------------------------------------------------------- this tree


@pytest.fixture(scope="module")
def this_tree() -> dep_gate.Gate:
    """What the gate finds here."""
    return gate(Source(dep_gate.folders()), declared_in(dep_gate.DECLARED), PROGRAMS)


def test_this_tree_is_as_declared(this_tree: dep_gate.Gate) -> None:
    text = as_text(this_tree, declared_in(dep_gate.DECLARED))

    assert this_tree.faults == ()
    assert text.splitlines()[-1] == GREEN


LOADED = """
import importlib, importlib.metadata, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
libraries = [
    each.name
    for each in importlib.metadata.distributions()
    if any(str(each.locate_file(file)) in files for file in each.files or ())
]
print(json.dumps([[name for name in sys.modules if name.startswith("nexus.")], libraries]))
"""
NO_MATTER: Final = {"typing-extensions", "setuptools"}
"""msgspec takes the one where it is, the interpreter's start the other; no device has them."""


@pytest.mark.parametrize("name", [PID1, "statefsd", "keystored", "updated", "exportd", "policyd"])
def test_what_is_loaded_is_in_what_was_read(this_tree: dep_gate.Gate, name: str) -> None:
    closure = this_tree.closures[name]
    pid1 = declared_in(dep_gate.DECLARED).pid1
    modules = pid1 if name == PID1 else dep_gate.modules_of(PROGRAMS[name])

    done = subprocess.run(
        [sys.executable, "-c", LOADED, *modules],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    ours, libraries = json.loads(done.stdout)
    assert set(ours) <= closure.modules.keys()
    loaded = {normalised(each) for each in libraries} - NO_MATTER
    assert loaded <= closure.libraries.keys()
    if name != PID1:  # it imports some at first use
        assert loaded == closure.libraries.keys()
