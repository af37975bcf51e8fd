"""The digest of a program follows its source and nothing else."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nexus.abi import MESSAGE_SIZE_MAX, BootImage, Nanos, Pid, Slot, service_id
from nexus.init.errors import SystemFileError
from nexus.init.plan import load_plan, sources_of
from nexus.init.programs import PROGRAMS, load_program, program_digest, protocols_of
from nexus.kernel.linux.stage2 import load_entry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `probe_program` with two modules, found by import."""
    folder = tmp_path / "probe_program"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "service.py").write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def digest_now(module: str) -> str:
    program_digest.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "probe_program"]:
        del sys.modules[name]
    return program_digest(module)


def test_a_changed_line_anywhere_in_a_package_changes_its_digest(package: Path) -> None:
    before = digest_now("probe_program")
    (package / "service.py").write_text("ONE = 2\n")

    assert digest_now("probe_program") != before


def test_a_renamed_file_changes_the_digest(package: Path) -> None:
    before = digest_now("probe_program")
    (package / "service.py").rename(package / "other.py")

    assert digest_now("probe_program") != before


def test_compiled_files_and_the_place_of_a_clone_do_not_count(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_now("probe_program")
    clone = tmp_path / "clone" / "probe_program"
    clone.mkdir(parents=True)
    for file in package.glob("*.py"):
        (clone / file.name).write_bytes(file.read_bytes())
    (clone / "__pycache__").mkdir()
    (clone / "__pycache__" / "service.cpython-311.pyc").write_bytes(b"x")
    monkeypatch.syspath_prepend(clone.parent)

    assert digest_now("probe_program") == before


def test_a_module_counts_as_its_one_file(package: Path) -> None:
    before = digest_now("probe_program.service")
    (package / "__init__.py").write_text("# changed\n")

    assert digest_now("probe_program.service") == before


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_program_names_protocols_that_exist(name: str) -> None:
    assert all(protocol.requests for protocol in protocols_of(PROGRAMS[name]))


# ---------------------------------------------------------------- programs of a system's own

PROTOCOL = '''
from typing import Final
from nexus.wire import Message, Protocol, Request

class Done(Message):
    """Done."""

class Do(Request[Done], op=1, idempotent=True):
    """Do."""

PROTOCOL: Final = Protocol("plant", number=1000, version=1, requests=(Do,))
'''
SERVICE = """
class Valve:
    PLACE = "{place}"

    def __init__(self, context):
        self.context = context

    async def handle(self, call, request):
        return None
"""


def plant(folder: Path, place: str = "here") -> Path:
    """A system of one class of its own, in a package `probe_plant` under folder/code."""
    package = folder / "code" / "probe_plant"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "protocol.py").write_text(PROTOCOL)
    (package / "valve.py").write_text(SERVICE.format(place=place))
    file = folder / "system.toml"
    file.write_text(
        '[system]\nname = "plant"\npath = ["code"]\n\n[service.valve]\n'
        'module = "probe_plant.valve:Valve"\nprotocol = "probe_plant.protocol"\n'
    )
    return file


def test_a_class_of_its_own_is_found_on_the_path_of_the_system(tmp_path: Path) -> None:
    path = list(sys.path)

    plan = load_plan(plant(tmp_path))

    (service,) = plan.services
    assert (service.program, service.entry) == ("probe_plant.valve:Valve",) * 2
    assert service.protocol == "probe_plant.protocol"
    assert plan.path == (str(tmp_path / "code"),)
    assert sys.path == path


def test_the_digest_of_a_class_covers_the_package_around_it_and_not_its_place(
    tmp_path: Path,
) -> None:
    one = load_plan(plant(tmp_path / "one"))
    two = load_plan(plant(tmp_path / "two"))
    helper = tmp_path / "two" / "code" / "probe_plant" / "helper.py"
    helper.write_text("LIMIT = 3\n")
    changed = load_plan(tmp_path / "two" / "system.toml")

    assert one.digest == two.digest
    assert one.path != two.path
    assert changed.services[0].program_digest != two.services[0].program_digest
    assert changed.digest != two.digest


def test_the_digest_covers_a_protocol_outside_the_package(tmp_path: Path) -> None:
    file = plant(tmp_path)
    outside = tmp_path / "code" / "probe_plant_protocol.py"
    outside.write_text(PROTOCOL)
    file.write_text(file.read_text().replace("probe_plant.protocol", "probe_plant_protocol"))
    before = load_plan(file).services[0].program_digest
    outside.write_text(PROTOCOL + "LIMIT = 3\n")

    assert load_plan(file).services[0].program_digest != before


def test_a_class_in_a_package_without_init_is_found_and_counted(tmp_path: Path) -> None:
    file = plant(tmp_path)
    (tmp_path / "code" / "probe_plant" / "__init__.py").unlink()
    before = load_plan(file).services[0].program_digest
    (tmp_path / "code" / "probe_plant" / "more.py").write_text("LIMIT = 3\n")

    assert load_plan(file).services[0].program_digest != before


def test_each_system_gets_the_package_of_its_own_path(tmp_path: Path) -> None:
    places = []
    for place in ("here", "there"):
        plan = load_plan(plant(tmp_path / place, place))
        load_program(sources_of(plan)["probe_plant.valve:Valve"])
        places.append(sys.modules["probe_plant.valve"].Valve.PLACE)

    assert places == ["here", "there"]


def test_a_folder_may_be_on_pythons_own_path_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plant(tmp_path)
    monkeypatch.chdir(tmp_path / "code")
    monkeypatch.syspath_prepend("")

    assert load_plan(file).services[0].entry == "probe_plant.valve:Valve"


def test_a_package_name_that_an_installed_package_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plant(tmp_path / "own")
    monkeypatch.syspath_prepend(plant(tmp_path / "installed").parent / "code")

    with pytest.raises(SystemFileError, match="neither Python nor an installed package has"):
        load_plan(file)


def test_a_package_that_failed_is_forgotten_for_the_next_system(tmp_path: Path) -> None:
    broken = plant(tmp_path / "broken")
    (broken.parent / "code" / "probe_plant" / "valve.py").write_text("1 / 0\n")
    with pytest.raises(SystemFileError, match="ZeroDivisionError"):
        load_plan(broken)

    plan = load_plan(plant(tmp_path / "whole", "whole"))

    assert plan.services[0].entry == "probe_plant.valve:Valve"
    assert sys.modules["probe_plant.valve"].Valve.PLACE == "whole"


def test_what_was_imported_before_is_not_forgotten_with_a_system_that_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = plant(tmp_path / "one")
    code = own.parent / "code"
    (code / "probe_host.py").write_text(PROTOCOL)
    monkeypatch.syspath_prepend(code)
    host = importlib.import_module("probe_host")
    own.write_text(own.read_text().replace("probe_plant.protocol", "probe_host"))
    assert load_plan(own).services[0].protocol == "probe_host"
    monkeypatch.undo()

    other = plant(tmp_path / "two")
    (other.parent / "code" / "probe_host.py").write_text(PROTOCOL)
    other.write_text(other.read_text().replace("probe_plant.protocol", "probe_host"))
    with pytest.raises(SystemFileError, match="neither Python nor an installed package has"):
        load_plan(other)

    assert sys.modules["probe_host"] is host


def test_a_class_becomes_a_program_that_an_interpreter_of_its_own_finds(tmp_path: Path) -> None:
    plan = load_plan(plant(tmp_path))

    program = load_program(sources_of(plan)["probe_plant.valve:Valve"])

    assert program.name == "probe_plant.valve:Valve"
    assert program.entry == (
        "nexus.runtime.program:load probe_plant.valve:Valve probe_plant.protocol"
    )
    assert (program.path, program.ordinary) == (plan.path, False)
    assert program.digest == plan.services[0].program_digest
    assert callable(program.main)


def test_an_ordinary_program_is_not_imported_and_its_double_is_main(tmp_path: Path) -> None:
    file = plant(tmp_path)
    camera = tmp_path / "code" / "probe_plant" / "camera.py"
    camera.write_text("raise RuntimeError\n\nasync def main(context): ...\n")
    file.write_text(
        file.read_text().replace("probe_plant.valve:Valve", "probe_plant.camera:main")
        + 'ordinary = true\ndouble = "probe_plant.valve:Valve"\nisolation = "exec"\n'
    )

    plan = load_plan(file)
    program = load_program(sources_of(plan)["probe_plant.camera:main"])

    assert "probe_plant.camera" not in sys.modules
    assert program.ordinary
    assert program.entry == (
        "nexus.runtime.program:load_ordinary probe_plant.camera:main probe_plant.protocol"
    )
    assert plan.services[0].grants.streams


def test_the_double_counts_for_the_digest(tmp_path: Path) -> None:
    file = plant(tmp_path)
    code = tmp_path / "code"
    (code / "probe_camera.py").write_text("async def main(context): ...\n")
    (code / "probe_double.py").write_text(SERVICE)
    file.write_text(
        file.read_text().replace("probe_plant.valve:Valve", "probe_camera:main")
        + 'ordinary = true\ndouble = "probe_double:Valve"\nisolation = "exec"\n'
    )
    before = load_plan(file).services[0].program_digest
    (code / "probe_double.py").write_text(SERVICE + "LIMIT = 3\n")

    assert load_plan(file).services[0].program_digest != before


def test_a_link_has_room_for_one_largest_frame_whatever_its_protocol(tmp_path: Path) -> None:
    file = plant(tmp_path)
    wide = (
        PROTOCOL.replace(
            '    """Do."""', '    """Do."""\n    data: Annotated[bytes, Blob(size_max=3000)]'
        )
        .replace("import Final", "import Annotated, Final")
        .replace("import Message", "import Blob, Message")
    )
    client = '\n[service.client]\nprogram = "timed"\nuses = { valve = { depth = 1 } }\n'
    file.write_text(file.read_text() + client)
    narrow = load_plan(file).links[0].size
    other = plant(tmp_path / "other")
    (other.parent / "code" / "probe_plant" / "protocol.py").write_text(wide)
    other.write_text(other.read_text() + client)

    assert load_plan(other).links[0].size == MESSAGE_SIZE_MAX
    assert narrow == MESSAGE_SIZE_MAX, "a batch of meta's own requests is as large"


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("def f(:\n", "Python that can be read", "at valve.py:1"),
        ("x = 1\nimport nowhere_at_all\n", '("nowhere_at_all" is not)', "valve.py:2"),
        ("from probe_plant import no\n", "that can be imported", "ImportError at valve.py:1"),
        ("raise SystemExit(3)\n", "a module that can be imported", "SystemExit at valve.py:1: 3"),
        ("1 / 0\n", "a module that can be imported", "ZeroDivisionError at valve.py:1"),
        ("Valve = None\n", "a class", 'no "Valve"'),
        ("x = '\0'\n", "", "null bytes"),
    ],
)  # fmt: skip
def test_what_a_module_does_wrong_is_one_sentence(
    tmp_path: Path, text: str, expected: str, found: str
) -> None:
    file = plant(tmp_path)
    (tmp_path / "code" / "probe_plant" / "valve.py").write_text(text)

    with pytest.raises(SystemFileError) as caught:
        load_plan(file)

    error = caught.value
    assert (error.path, error.line) == (file, 6)
    assert expected in error.expected
    assert found in error.found
    assert str(error).isprintable()


def test_a_message_without_a_bound_is_refused_before_anything_is_booted(tmp_path: Path) -> None:
    file = plant(tmp_path)
    endless = PROTOCOL.replace('    """Do."""', '    """Do."""\n    data: bytes')
    (tmp_path / "code" / "probe_plant" / "protocol.py").write_text(endless)

    with pytest.raises(SystemFileError) as caught:
        load_plan(file)

    assert (caught.value.path, caught.value.line) == (file, 7)
    assert "messages with a bound" in caught.value.expected
    assert "BytesType" in caught.value.found
    assert str(caught.value).isprintable()


def test_programs_of_nexus_say_where_an_interpreter_of_its_own_finds_them() -> None:
    program = load_program(PROGRAMS["timed"])

    assert (program.entry, program.path) == ("nexus.services.timed:main", ())


# ------------------------------------------------------------------ a program that keeps a secret


def test_where_programs_are_executed_one_that_keeps_a_secret_is_not_imported() -> None:
    code = """
import sys
from nexus.init.programs import PROGRAMS, load_program
program = load_program(PROGRAMS["keystored"], executes=True)
print(program.entry, "cryptography" in sys.modules, "nexus.services.keystored" in sys.modules)
load_program(PROGRAMS["keystored"])
print("cryptography" in sys.modules)
"""

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.split() == ["nexus.services.keystored:main", "False", "False", "True"]


def test_its_main_and_its_digest_are_the_same_where_it_is_imported() -> None:
    imported = load_program(PROGRAMS["keystored"])
    executed = load_program(PROGRAMS["keystored"], executes=True)

    assert load_entry(executed.entry) is imported.main
    assert (executed.name, executed.digest) == (imported.name, imported.digest)
    with pytest.raises(AssertionError, match="interpreter of its own"):
        _ = executed.main(
            BootImage(
                name="keystored",
                service=service_id("keystored"),
                pid=Pid(2),
                generation=1,
                control=None,
                endpoint=Slot(0),
                now=Nanos(0),
                argument=b"",
            )
        ).send(None)
