"""The bill of materials of a set, as CycloneDX 1.6 in JSON.

Equal for equal content: its serial number is a digest of what it lists, and it has no time.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import metadata
from typing import Final

from backports import zstd
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.dependency import Dependency
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from nexus import __version__
from nexus.bundle.gather import PYTHON, Contents
from nexus.sets import Base

SPACE: Final = uuid.UUID("8d5b1ea4-6a0c-5a30-9d4f-4f7c5c1f3a51")  # of serial numbers of sets
LICENSE: Final = "Apache-2.0"  # pyproject.toml
TEXT_LICENSE_MAX: Final = 64  # characters; what is longer is the licence itself, not its name


def sbom(
    system: str, version: str, files: Contents, base: Base, services: Mapping[str, str]
) -> bytes:
    """What is in a set (Nexus and each service's program, with digests) and what it needs below
    it. `services` are the digests of their programs, hexadecimal."""
    root = Component(
        name=system, version=version, type=ComponentType.FIRMWARE, bom_ref=f"set:{system}@{version}"
    )
    parts = [_nexus(files), *(_service(name, services[name]) for name in sorted(services))]
    below = [_interpreter(base), *(_library(name, of) for name, of in base.distributions.items())]
    listed = {name: sha256(content.data).hexdigest() for name, content in sorted(files.items())}
    told = json.dumps([system, version, listed, services, base.python, base.distributions])
    bom = Bom(
        components=[*parts, *below],
        dependencies=[
            _needs(root, parts),
            *(_needs(part, below) for part in parts),
            *(_needs(each, []) for each in below),
        ],
        serial_number=uuid.uuid5(SPACE, told),
        metadata=BomMetaData(
            component=root, properties=[Property(name="nexus:zstd", value=zstd.zstd_version)]
        ),
    )
    bom.metadata.timestamp = None  # type: ignore[assignment]  # BomMetaData fills in the time
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _needs(what: Component, of: Sequence[Component]) -> Dependency:
    return Dependency(what.bom_ref, [Dependency(each.bom_ref) for each in of])


def _nexus(files: Contents) -> Component:
    """The package tree, with one digest over its files."""
    digest = sha256()
    for path, content in sorted(files.items()):
        if path.startswith(f"{PYTHON}/"):
            digest.update(f"{path}\0{len(content.data)}\0".encode())
            digest.update(content.data)
    return Component(
        name="nexus-os",
        version=__version__,
        type=ComponentType.FRAMEWORK,
        bom_ref=f"pkg:pypi/nexus-os@{__version__}",
        purl=PackageURL("pypi", name="nexus-os", version=__version__),
        licenses=[LicenseExpression(LICENSE)],
        hashes=[_sha256(digest.hexdigest())],
    )


def _service(name: str, digest: str) -> Component:
    return Component(
        name=name,
        type=ComponentType.APPLICATION,
        bom_ref=f"service:{name}",
        hashes=[_sha256(digest)],
    )


def _interpreter(base: Base) -> Component:
    return Component(
        name="python",
        version=base.python,
        type=ComponentType.PLATFORM,
        bom_ref=f"python@{base.python}",
        scope=ComponentScope.EXCLUDED,
        licenses=[LicenseExpression("PSF-2.0")],
    )


def _library(name: str, version: str) -> Component:
    """A distribution of the base system: needed, and not in the set."""
    about = metadata(name)
    told = {key: about[key] for key in ("License-Expression", "License") if key in about}
    expression, text = told.get("License-Expression"), told.get("License")
    licenses: list[LicenseExpression | DisjunctiveLicense] = []
    if expression:
        licenses.append(LicenseExpression(expression))
    elif text and len(text) <= TEXT_LICENSE_MAX and "\n" not in text:
        licenses.append(DisjunctiveLicense(name=text))
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"pkg:pypi/{name}@{version}",
        purl=PackageURL("pypi", name=name, version=version),
        scope=ComponentScope.EXCLUDED,
        licenses=licenses,
    )


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)
