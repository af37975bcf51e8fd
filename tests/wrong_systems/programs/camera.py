"""An ordinary program. That it is not imported by a check shows in that it would fail."""

import nexus_camera_driver  # type: ignore[import-not-found]


async def main(context: object) -> int:
    """Run until the context says stop."""
    await nexus_camera_driver.run(context)
    return 0


def plain(context: object) -> int:
    """Not a coroutine function."""
    return 0
