"""It would end the process that imports it."""

import sys

sys.exit("bye")
