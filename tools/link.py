"""Make this tree importable in the virtual environment that runs this, with its commands.

The same as an editable install, without a build backend to download: a path file that names
src/, and one script per entry of [project.scripts].
"""

import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

# The shell reads the first lines, Python all but the first: a path may hold spaces, or be long.
SCRIPT: Final = """\
#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
import sys

from {module} import {function}

sys.exit({function}())
"""


def link(root: Path, *, python: Path, site: Path, scripts: Path) -> None:
    """Write the path file into `site` and the commands of pyproject.toml into `scripts`."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    (site / f"{project['name']}.pth").write_text(f"{root / 'src'}\n", "utf-8")
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        script = scripts / name
        script.write_text(SCRIPT.format(python=python, module=module, function=function), "utf-8")
        script.chmod(0o755)


if __name__ == "__main__":
    if sys.prefix == sys.base_prefix:
        sys.exit("link.py: run me with the Python of a virtual environment (make venv)")
    link(
        ROOT,
        python=Path(sys.executable),
        site=Path(sysconfig.get_path("purelib")),
        scripts=Path(sysconfig.get_path("scripts")),
    )
