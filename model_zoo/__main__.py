"""``python -m model_zoo``."""

import sys

from model_zoo.runner import main

if __name__ == "__main__":
    sys.exit(main())
