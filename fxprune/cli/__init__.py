"""The command line: ``fxprune prune``, ``inspect``, ``apply``, ``export``, ``validate``, ``compare``, ``methods``.

Results go to stdout, progress to stderr. An error of ours is one sentence on stderr and exit code 2. torch is imported
only once there is something to do with it, so that ``--help`` and a mistyped option answer at once. With ``--json``
stdout holds one JSON object.

``words`` are the commands and what each is given, ``commands`` what they do.
"""

import os
import sys
from collections.abc import Sequence

from fxprune.cli.words import EXIT_ERROR, parser
from fxprune.errors import FxpruneError

__all__ = ["main", "parser"]

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        options.run(options)
        sys.stdout.flush()
    except FxpruneError as error:
        print(f"fxprune: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("fxprune: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Without this, Python complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
