"""`python -m flashgpt`, which is the command `flashgpt`, and what torchrun starts."""

import os
import sys

from flashgpt.cli import main
from flashgpt.launch import Launch

try:
    status = main()
except SystemExit as end:  # another process said why
    status = end.code if isinstance(end.code, int) else 1
if status and Launch.here().size > 1:
    # Python's own way out waits for threads of process groups whose other end is gone, and now and
    # then aborts in one: torchrun would take that for the cause.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
