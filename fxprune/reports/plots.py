"""matplotlib, where it is installed, and only when something is drawn."""

from __future__ import annotations

import os
from typing import Any

from fxprune.errors import InputError
from fxprune.io.files import replacing


def new_figure(size: tuple[float, float]) -> Any:
    """An empty ``matplotlib.figure.Figure`` of so many inches, of no window and no global state.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Plots need matplotlib: pip install 'fxprune[plots]'.") from error
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write it; the ending of the path chooses the format.

    Raises:
        InputError: the path cannot be written, or its ending is none of matplotlib's formats.
    """
    known = figure.canvas.get_supported_filetypes()
    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    if ending not in known:
        raise InputError(f"cannot draw {os.fspath(path)!r}: matplotlib writes {', '.join(sorted(known))}")
    with replacing(path) as draft:
        figure.savefig(draft, format=ending)
