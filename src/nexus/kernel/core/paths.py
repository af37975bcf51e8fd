"""How long the path of a port's socket may be."""

from typing import Final

SOCKET_PATH_SIZE_MAX: Final = 107  # bytes; sun_path of unix(7) without its final zero
