"""The echo service of the D-Bus variant, typed: the same fields as bench.echo."""

# mypy: ignore-errors
# ruff: noqa: F821, N802 (dbus-fast reads D-Bus signatures from annotations)

from dbus_fast.service import ServiceInterface, method

DATA = b"d" * 24


class EchoInterface(ServiceInterface):
    """One method, Read: s key, u offset, u size -> b ok, ay data."""

    @method()
    def Read(self, key: "s", offset: "u", size: "u") -> "bay":
        """Answer with as many fields as our reply has."""
        return [key != "" and offset + size > 0, DATA]
