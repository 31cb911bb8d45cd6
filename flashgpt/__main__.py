"""`python -m flashgpt`, which is the command `flashgpt`."""

import sys

from flashgpt.cli import main

sys.exit(main())
