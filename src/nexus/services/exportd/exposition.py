"""Series as text that Prometheus and its like scrape: OpenMetrics 1.0, and the older 0.0.4.

    rows of metricsd --by exported name--> families --checked against each other--> text

Every sample is labelled with the service that counts it and with its instance, which no service
can say of itself: a label of one of these names becomes exported_NAME. Names lose what a scraper
does not take, units of time become seconds. What would make the text invalid (two families that
share a name and differ, the same sample twice) is left out and counted.

*Source*: OpenMetrics 1.0.0 (prometheus/docs, specs/om/open_metrics_spec.md); the exposition format
0.0.4 (prometheus/docs, exposition_formats.md).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from nexus.protocols.metricsd import Kind, Series

SCALES: Final[Mapping[str, int]] = {"s": 0, "ms": 3, "us": 6, "ns": 9}
"""Units of time, by how many digits of seconds they are: base units are what a scraper expects."""
UNITS: Final[Mapping[str, str]] = {"B": "bytes", "By": "bytes", "1": ""}
SERVICE_LABEL: Final = "service"
INSTANCE_LABEL: Final = "instance"
OWN_LABELS: Final = frozenset((SERVICE_LABEL, INSTANCE_LABEL, "le", "quantile"))
SUFFIXES: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.COUNTER: ("_total", "_created"),
    Kind.GAUGE: ("",),
    Kind.HISTOGRAM: ("_bucket", "_count", "_sum", "_created"),
}
"""What the samples of a family are called, beside its name (OpenMetrics, "Metric types")."""
WORDS: Final[Mapping[Kind, str]] = {
    Kind.COUNTER: "counter",
    Kind.GAUGE: "gauge",
    Kind.HISTOGRAM: "histogram",
}
GO_DIGITS: Final = 6  # digits before the point, above which Go writes an exponent


class Format(Enum):
    """What is written, and what it is called in HTTP."""

    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Family:
    """Everything of one exported name."""

    name: str
    kind: Kind
    unit: str
    scale: int  # decimal digits by which values are shifted to be of that unit
    source: str  # its name in metricsd
    lines: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Exposition:
    """The text, and what it could not say."""

    text: bytes
    samples: int
    left_out: int  # series
    metrics_left_out: list[str]  # by their names in metricsd, each once


def exposition(rows: Iterable[Series], names: Mapping[int, str], kind: Format) -> Exposition:
    """The text for all rows; `names` are services by id."""
    families: dict[str, Family] = {}
    taken: dict[str, str] = {}  # name of a sample or a family -> the family
    seen: set[tuple[str, str]] = set()
    left_out = 0
    metrics: dict[str, None] = {}
    for row in rows:
        wanted = _family_of(row)
        family = families.get(wanted.name)
        if family is None and _claim(wanted, taken):
            family = families[wanted.name] = wanted
        labels = _labels(row, names)
        is_same = family is not None and (family.kind, family.unit, family.source) == (
            wanted.kind,
            wanted.unit,
            wanted.source,
        )
        if family is None or not is_same or (family.name, labels) in seen:
            left_out += 1
            metrics[row.name] = None
            continue
        seen.add((family.name, labels))
        family.lines += _samples(family, row, labels)
    lines: list[str] = []
    for family in sorted(families.values(), key=lambda each: each.name):
        lines += _head(family, kind)
        lines += family.lines
    if kind is Format.OPENMETRICS:
        lines.append("# EOF")
    text = "".join(f"{line}\n" for line in lines).encode()
    return Exposition(text, len(seen), left_out, list(metrics))


def _family_of(row: Series) -> Family:
    name = exported_name(row.name)
    if row.kind is Kind.COUNTER:
        name = name.removesuffix("_total") or "total"
    scale = SCALES.get(row.unit)
    unit = "seconds" if scale is not None else exported_name(UNITS.get(row.unit, row.unit))
    if unit and not name.endswith(f"_{unit}"):  # one that is called "seconds" too
        if scale is not None:
            name = name.removesuffix(f"_{row.unit}")
        name = f"{name}_{unit}"
    return Family(name, row.kind, unit, scale or 0, row.name)


def exported_name(name: str) -> str:
    """A name as scrapers take it."""
    return "".join(
        each if each.isascii() and (each.isalnum() or each == "_") else "_" for each in name
    )


def _claim(family: Family, taken: dict[str, str]) -> bool:
    """Whether no other family has one of its names; they are its own then."""
    own = {family.name, *(f"{family.name}{suffix}" for suffix in SUFFIXES[family.kind])}
    if any(each in taken for each in own):
        return False
    taken.update(dict.fromkeys(own, family.name))
    return True


def _head(family: Family, kind: Format) -> list[str]:
    name = family.name
    if kind is Format.TEXT and family.kind is Kind.COUNTER:
        name = f"{name}_total"
    head = [f"# HELP {name} {_escaped(family.source)}, as its services count it."]
    head.append(f"# TYPE {name} {WORDS[family.kind]}")
    if kind is Format.OPENMETRICS and family.unit:
        head.append(f"# UNIT {name} {family.unit}")
    return head


def _samples(family: Family, row: Series, labels: str) -> list[str]:
    name, scale = family.name, family.scale
    if row.kind is Kind.COUNTER:
        return [f"{name}_total{{{labels}}} {decimal(row.value, scale)}"]
    if row.kind is Kind.GAUGE:
        return [f"{name}{{{labels}}} {decimal(row.value, scale)}"]
    lines: list[str] = []
    count = 0
    bounds = [canonical(bound, scale) for bound in row.bounds] + ["+Inf"]
    buckets = [*row.buckets, *([0] * len(bounds))][: len(bounds)]
    latest = -1.0  # no bound is below 0
    for bound, bucket in zip(bounds, buckets, strict=True):
        count += bucket
        if float(bound) == latest:
            _ = lines.pop()  # to a scraper, whose numbers are floats, these two are one
        latest = float(bound)
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {count}')
    # The sum of the buckets and not `count`: a scraper refuses a histogram that contradicts itself.
    lines.append(f"{name}_count{{{labels}}} {count}")
    lines.append(f"{name}_sum{{{labels}}} {decimal(row.sum, scale)}")
    return lines


def _labels(row: Series, names: Mapping[int, str]) -> str:
    pairs = {
        SERVICE_LABEL: name_of(row.service, names),
        INSTANCE_LABEL: str(row.generation),
    }
    for label in sorted(row.labels, key=lambda each: each.key):
        key = exported_name(label.key)
        if key in OWN_LABELS or key.startswith("__"):
            key = f"exported_{key.lstrip('_')}"
        _ = pairs.setdefault(key, label.value)
    return ",".join(f'{key}="{_escaped(value)}"' for key, value in pairs.items())


def name_of(service: int, names: Mapping[int, str]) -> str:
    """A service's name, or its id in hexadecimal."""
    return names.get(service) or f"{service:016x}"


def _escaped(text: str) -> str:
    """Escaped as in a label's value; carriage returns and their like are no line's end there."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def decimal(value: int, scale: int) -> str:
    """`value` shifted by `scale` decimal digits, exactly."""
    if not scale:
        return str(value)
    sign = "-" if value < 0 else ""
    whole, part = divmod(abs(value), 10**scale)
    digits = f"{part:0{scale}}".rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def canonical(value: int, scale: int) -> str:
    """A bound of a bucket as Go writes a float, which is what scrapers compare."""
    text = decimal(value, scale)
    whole, _, part = text.partition(".")
    if len(whole) > GO_DIGITS:
        digits = f"{whole}{part}".rstrip("0")
        mantissa = f"{digits[0]}.{digits[1:]}" if len(digits) > 1 else digits
        return f"{mantissa}e+{len(whole) - 1:02}"
    if whole == "0" and part.startswith("0000"):
        return repr(float(text))  # which writes an exponent where Go does
    return text if part else f"{whole}.0"


def chosen(accept: str | None) -> Format:
    """What a client that says so wants: of those it names the one it likes best."""
    if accept is None:
        return Format.OPENMETRICS
    best = (0.0, Format.OPENMETRICS)
    for item in accept.split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        values = dict(each.replace(" ", "").partition("=")[::2] for each in parameters)
        found = _format_of(media.lower(), values.get("version", ""))
        weight = _weight(values.get("q", "1"))
        if found is not None and weight > best[0]:
            best = (weight, found)
    return best[1] if best[0] else Format.TEXT


def _format_of(media: str, version: str) -> Format | None:
    if media in ("application/openmetrics-text", "application/*"):
        return Format.OPENMETRICS if version in ("", "1.0.0", "0.0.1") else None
    if media in ("text/plain", "text/*"):
        return Format.TEXT if version in ("", "0.0.4") else None
    return Format.OPENMETRICS if media == "*/*" else None


def _weight(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0
