"""The files of a new service: protocol, class, system file with its policy, test."""

import keyword
import re
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from nexus.abi import INIT_NAME
from nexus.cli.trial import tried_plan
from nexus.init.errors import SystemFileError

NAME_SIZE_MAX: Final = 32  # characters; the rights made of it have 48
NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
TAKEN: Final = frozenset({"policyd", "logd", "operator", "timed", "kernel", "nexus", INIT_NAME})
SUFFIX: Final = ".in"
PACKAGE: Final = "PACKAGE"  # stands for the package's name in a template's path


class ScaffoldError(Exception):
    """Nothing was written; the text is a sentence that says what to do."""


def package_of(name: str) -> str:
    """The Python package of a service: "water-valve" is water_valve."""
    return name.replace("-", "_")


def scaffold(name: str, directory: Path) -> list[Path]:
    """Write the files of a new service into a new directory; their paths, in order.

    Raises ScaffoldError for a name that cannot be, a directory that exists, or a disk that says no.
    """
    if not NAME.fullmatch(name) or len(name) > NAME_SIZE_MAX:
        raise ScaffoldError(
            f'"{name[:NAME_SIZE_MAX]}" is no name of a service: take at most {NAME_SIZE_MAX} small '
            "letters, digits and hyphens, such as water-valve"
        )
    if name in TAKEN:
        raise ScaffoldError(f'"{name}" is one of Nexus\' own names: take another')
    if keyword.iskeyword(package_of(name)):
        raise ScaffoldError(f'"{name}" is a word of Python\'s own: take another')
    if directory.exists():
        raise ScaffoldError(f"{directory} exists: take another name, or remove it first")
    texts = _rendered(name)
    _check(name, texts)
    try:
        _write(texts, directory)
    except OSError as error:
        raise ScaffoldError(
            f"{error.filename or directory} cannot be written: {error.strerror}"
        ) from error
    return [directory / path for path, _ in texts]


def _check(name: str, texts: list[tuple[str, str]]) -> None:
    """See, in a directory that is thrown away, that `nexus check` takes what is to be written.

    It refuses names of packages that Python or an installed package has. Raises ScaffoldError.
    """
    with tempfile.TemporaryDirectory(prefix="nexus-new-") as made:
        directory = Path(made) / name
        try:
            _write(texts, directory)
            _ = tried_plan(directory / "system.toml")
        except SystemFileError as error:
            raise ScaffoldError(
                f'"{name}" cannot be the name of a service: expected {error.expected}, '
                f"found {error.found}; take another"
            ) from error
        except OSError as error:
            raise ScaffoldError(f"{made} cannot be written: {error.strerror}") from error


def _write(texts: list[tuple[str, str]], directory: Path) -> None:
    """All files or none: they are made beside the directory, which then appears at once."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as made:
        whole = Path(made) / directory.name
        for path, text in texts:
            file = whole / path
            file.parent.mkdir(parents=True, exist_ok=True)
            _ = file.write_text(text)
        _ = whole.rename(directory)


def _rendered(name: str) -> list[tuple[str, str]]:
    """Path and text of each file."""
    package = package_of(name)
    words = {
        "@NAME@": name,
        "@PACKAGE@": package,
        "@CLASS@": "".join(part.capitalize() for part in name.split("-")),
    }
    root = resources.files("nexus.cli") / "templates" / "service"
    rendered = []
    for path, template in _templates(root, ""):
        text = template.read_text()
        for word, value in words.items():
            text = text.replace(word, value)
        rendered.append((path.replace(PACKAGE, package).removesuffix(SUFFIX), text))
    return sorted(rendered)


def _templates(directory: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found = []
    for entry in directory.iterdir():
        path = f"{prefix}{entry.name}"
        if entry.is_dir():
            found += _templates(entry, f"{path}/")
        elif entry.name.endswith(SUFFIX):
            found.append((path, entry))
    return found
