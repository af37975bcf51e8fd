"""A linked tree is importable, and its commands start, from any folder."""

import subprocess
import sys
from pathlib import Path

from tools.link import link


def test_the_command_runs_the_function_that_the_project_names(tmp_path: Path) -> None:
    root, site, scripts = (tmp_path / name for name in ("a tree", "site", "bin"))
    for folder in (root / "src", site, scripts):
        folder.mkdir(parents=True)
    (root / "pyproject.toml").write_text(
        '[project]\nname = "thing"\n[project.scripts]\nhello = "thing:main"\n'
    )
    (root / "src" / "thing.py").write_text("def main():\n    print('here')\n    return 3\n")

    link(root, python=Path(sys.executable), site=site, scripts=scripts)

    assert (site / "thing.pth").read_text() == f"{root / 'src'}\n"
    done = subprocess.run(
        [scripts / "hello"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (3, "here\n")
