"""Before and after the cut by rule, how the support shrinks, and sizes of files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_zoo.records import Results, mean_and_deviation, seeds, table

PAPER = {  # accuracy dense and after the cut, by network and compression: table 1 of the paper
    ("lenet_300_100", 60): (98.19, 98.18),
    ("lenet_5", 125): (99.21, 99.22),
    ("lenet_5", 300): (99.21, 99.06),
}
PAPER_TICKETS = {  # accuracy of the first weights with GSM's zeros, trained anew, as the paper has it
    ("lenet_300_100", 60): 98.22,
    ("lenet_5", 125): 99.04,
    ("lenet_5", 300): 98.88,
}


def page(results: Results) -> Sequence[str]:
    """Mean and deviation over seeds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in results.lines:
        found.setdefault((record.figures["network"], record.figures["compression"]), []).append(record.figures)
    return [part for key, figures in sorted(found.items()) for part in _of(key, figures)]


def _of(key: tuple[str, int], figures: Sequence[dict[str, Any]]) -> list[str]:
    network, compression = key
    first = figures[0]
    epochs = f"{first['epochs']} epochs of 235 steps with batches of {first['batch']}"
    kept = f"{first['kept']} of {first['weights']} weights stay; {seeds(len(figures))}; {epochs}"
    return [
        f"## {network}, {compression} times\n\n{kept}.",
        table(["rule", "dense", "before the cut", "after the cut", "weights above 1e-4", "norm cut"], [
            *([["the paper's table", *(f"{each:.2f}" for each in (told[0], told[1], told[1])), "", ""]]
              if (told := PAPER.get(key)) else []),
            *(_row(rule, figures) for rule in first["rules"]),
        ]),
        *_beside([figure["beside"] for figure in figures if "beside" in figure], PAPER_TICKETS.get(key)),
        "Weights above 1e-4, and in brackets how many were active in that epoch, of the first seed:",
        table(["epoch", *first["rules"]], [_epoch(epoch, first["rules"]) for epoch in _epochs(first["rules"])]),
        "Bytes of files, and milliseconds of onnxruntime for one image, of the first seed:",
        table(["file", "bytes", "ms"], _files(first["files"])),
    ]  # fmt: skip


def _row(rule: str, figures: Sequence[dict[str, Any]]) -> list[str]:
    last = [figure["rules"][rule][-1] for figure in figures]
    cells = [_percent([f["dense"] for f in figures])]
    cells += [_percent([f[key] for f in last]) for key in ("before", "after")]
    support = ", ".join(str(f["support"]) for f in last)
    return [rule, *cells, support, f"{sum(f['norm_cut'] for f in last) / len(last):.1e}"]


def _beside(figures: Sequence[dict[str, Any]], ticket: float | None) -> Sequence[str]:
    """What else leaves as many weights; of older records nothing."""
    if not figures:
        return []
    rows = [] if ticket is None else [["the paper's ticket", "", "", f"{ticket:.2f}"]]
    for name, first in figures[0].items():
        cut, trained = (_percent([f[name][key] for f in figures]) for key in ("cut", "accuracy"))
        rows.append([name, cut, str(first["epochs"]), trained])
    return [f"As many weights by other means, {seeds(len(figures))}:", table(["", "cut", "epochs", "trained"], rows)]


def _epochs(rules: dict[str, Any]) -> list[int]:
    return sorted({look["epoch"] for looks in rules.values() for look in looks})


def _epoch(epoch: int, rules: dict[str, Any]) -> list[str]:
    looks = ({look["epoch"]: look for look in looks}.get(epoch) for looks in rules.values())
    return [str(epoch), *("" if look is None else f"{look['support']} ({look['active']})" for look in looks)]


def _files(files: dict[str, Any]) -> list[list[str]]:
    rows = [[n, f"{v}", _ms(files.get(f"{n}, ms"))] for n, v in files.items() if n.endswith((")", "save", "export"))]
    return [*rows, [f"{files['left']} weights, their places at random, and biases", f"{files['entropy']}", ""]]


def _percent(shares: Sequence[float]) -> str:
    return mean_and_deviation([100 * share for share in shares])


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
