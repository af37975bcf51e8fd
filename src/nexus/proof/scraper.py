"""One page of exportd's over its socket, read as any scraper reads it.

For whoever looks from outside of the services, and imports nothing of theirs.
"""

import socket
from pathlib import Path
from typing import Final

REQUEST: Final = (
    b"GET /metrics HTTP/1.1\r\n"
    b"Host: localhost\r\n"
    b"Accept: application/openmetrics-text; version=1.0.0\r\n"
    b"Connection: close\r\n"
    b"\r\n"
)
SCRAPE_WAIT: Final = 5.0  # seconds for each step; a page comes in milliseconds
SCRAPE_SIZE_MAX: Final = 4 * 1024 * 1024  # bytes; a page of the selftest system has some ten KiB
READ_SIZE: Final = 64 * 1024


def kept_at(state: Path, boot: int) -> Path:
    """Where the bytes of a boot's scrape are."""
    return state / f"scraped-{boot}"


def scrape(path: Path) -> bytes:
    """Everything that comes over the socket after one request; what came until it failed."""
    data = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SCRAPE_WAIT)
        try:
            connection.connect(str(path))
            connection.sendall(REQUEST)
            while len(data) < SCRAPE_SIZE_MAX:
                part = connection.recv(READ_SIZE)
                if not part:
                    break
                data += part
        except OSError:
            return data  # the check says what is missing
    return data
