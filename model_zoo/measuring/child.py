"""A process that does one thing after the other and tells what came of each, so that its end loses nothing."""

from __future__ import annotations

import multiprocessing
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Found = defaultdict[str, list[Figures]]
Step = tuple[str, Callable[[], Figures]]


def tell(sender: Connection, steps: Iterable[Step]) -> None:
    """In the process: sends (what, figures) of every step, or why it failed."""
    for what, run in steps:
        try:
            sender.send((what, run()))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            sender.send((what, {"fails": f"{type(error).__name__}: {error} ({where})"[:300]}))


def listen(work: Callable[..., None], given: tuple[Any, ...], start: float, timeout: float, found: Found) -> bool:
    """Let a new process do ``work(*given, sender)``, and take down what it sends; whether it came to its end.

    It is ended when nothing came for ``timeout`` seconds, ``start`` more for the first.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*given, sender), daemon=True)
    process.start()
    sender.close()
    limit = start + timeout
    try:
        while receiver.poll(limit):
            what, figures = receiver.recv()
            found[what].append(figures)
            limit = timeout
    except EOFError:
        return True
    finally:
        process.kill()
        process.join()
        receiver.close()
    return False
