"""Run the tests of one package: `python -m tools.package_tests timed`.

A test belongs to a package if it imports it: nexus.NAME, nexus.services.NAME,
nexus.kernel.NAME or nexus.protocols.NAME. The mission's crate names (nexus-ipc) are understood.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PLACES: Final = (
    "nexus",
    "nexus.services",
    "nexus.kernel",
    "nexus.protocols",
    "nexus.services.demo",
)


def modules_of(name: str) -> tuple[str, ...]:
    """The modules a package's name may stand for."""
    plain = name.removeprefix("nexus-").replace("-", "_")
    return tuple(f"{place}.{plain}" for place in PLACES)


def files_of(root: Path, name: str) -> list[Path]:
    """The test files that import the package, in order of path."""
    wanted = modules_of(name)
    return [
        path
        for path in sorted((root / "tests").rglob("test_*.py"))
        if any(
            module == want or module.startswith(f"{want}.")
            for module in _imports(path)
            for want in wanted
        )
    ]


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
    return found


def main(arguments: list[str]) -> int:
    """Run pytest on them; 2 if there are none."""
    if len(arguments) != 1:
        print("usage: python -m tools.package_tests NAME", file=sys.stderr)
        return 2
    tests = files_of(ROOT, arguments[0])
    if not tests:
        print(
            f"test-pkg: no test imports {arguments[0]!r}: name a package under src/nexus, "
            "a service, a kernel or a protocol",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "pytest", *map(str, tests)], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
