"""The `nexus` command. Exit codes: 0 green, 1 red, 2 wrong usage or a wrong system file."""

from nexus.cli.command import main

__all__ = ["main"]
