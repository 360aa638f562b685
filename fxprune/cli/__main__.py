"""``python -m fxprune.cli``."""

import sys

from fxprune.cli import main

sys.exit(main())
