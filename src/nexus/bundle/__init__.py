"""Makes system sets out of a system file, on the machine of who releases them.

What nexus.sets writes is content; here it is found: the package tree, the system's own programs,
the system file and its policy files, and the SBOM. No device imports this.
"""

from nexus.bundle.build import HEALTH_DEFAULT, SBOM, Release, build
from nexus.bundle.gather import PYTHON, SYSTEM, WrongContent, package_folder
from nexus.bundle.needs import NotInstalled, base_of

__all__ = [
    "HEALTH_DEFAULT",
    "PYTHON",
    "SBOM",
    "SYSTEM",
    "NotInstalled",
    "Release",
    "WrongContent",
    "base_of",
    "build",
    "package_folder",
]
