"""What a measurement leaves behind: one JSON object per network in a file that only grows, and a page made from it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fxprune

RESULTS = Path(__file__).parent / "results"

_VERSIONS = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "transformers",
    "ultralytics",
    "diffusers",
    "torch-pruning",
    "numpy",
)
NEARLY_ALL = 0.9995
_STAGES = {"recording": "record", "analysing": "label", "selecting": "select", "rewriting": "rewrite"}


@dataclass
class Record:
    """One network's line in the result file. ``checks``: name -> the reason why it fails, or ""."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        return {name: reason for name, reason in self.checks.items() if reason}

    @property
    def passed(self) -> bool:
        return bool(self.checks) and not self.failures


def header(command: str) -> dict[str, Any]:
    """What a result depends on besides the code."""
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "fxprune": fxprune.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS if name in installed},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def begin(path: Path, command: str, **others: Any) -> None:
    """A new result file: its first line says what it is made with, and ``others``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(header(command) | others) + "\n")


def append(path: Path, record: Record) -> None:
    """One more line."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    """The header and the last record of every network."""
    head, *lines = (json.loads(line) for line in path.read_text().splitlines())
    return head, {line["name"]: Record(**line) for line in lines if "name" in line}


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a markdown table; the second row says how columns are aligned."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def heading(head: dict[str, Any]) -> list[str]:
    """The first paragraphs of a page: the command, and what it was run with."""
    return [f"# {head['command']}", ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")]


def table(records: Iterable[Record]) -> str:
    """A markdown table, one line per network."""
    columns = {
        "network": "---",
        "GMACs": "---:",
        "pruned": "---:",
        "ratio": "---:",
        "parameters": "---:",
        "prunable MACs": "---:",
        "masked ≡ pruned": "---:",
        "ONNX": "---:",
        "/".join(_STAGES.values()) + " s": "---:",
        "all s": "---:",
        "GiB": "---:",
        "checks": "---",
    }
    rows = [columns, columns.values(), *map(_cells, records)]
    return markdown(rows)


def _cells(record: Record) -> list[str]:
    f, bad = record.figures, record.failures
    reasons = "; ".join(f"{name}: {reason}" for name, reason in bad.items()).replace("|", "\\|")
    state = f"**fails** {reasons}" if bad else f"{len(record.checks)} pass"
    stages = f.get("stages", {})
    return [
        record.name,
        *([f"{f[key] / 1e9:.3f}" for key in ("macs_before", "macs_after")] if "macs_before" in f else "––"),
        f"{f['ratio']:.4f}" if "ratio" in f else "–",
        f"{f['params_before'] / 1e6:.2f} M → {f['params_after'] / 1e6:.2f} M" if "params_before" in f else "–",
        f"{f['prunable_share']:.1%}" if "prunable_share" in f else "–",
        *(f"{f[key]:.0e}" + _in_double(f, key) if f.get(key) is not None else "–" for key in ("oracle", "onnx")),
        " / ".join(f"{stages[name]:.1f}" for name in _STAGES) if stages else "–",
        f"{sum(record.seconds.values()):.0f}",
        f"{f['memory_gib']:.1f}" if "memory_gib" in f else "–",
        state,
    ]


def _in_double(figures: dict[str, Any], key: str) -> str:
    double = figures.get(f"{key}_in_double")
    return "" if double is None else f" (double: {double:.0e})"


def summary(records: Iterable[Record]) -> list[str]:
    """What holds for all of them together, one sentence each."""
    records = list(records)
    ratios = [r.figures["ratio"] for r in records if "ratio" in r.figures]
    shares = [r.figures["prunable_share"] for r in records if "prunable_share" in r.figures]
    compiling = [sum(r.figures["stages"].get(s, 0) for s in _STAGES) for r in records if "stages" in r.figures]
    lines = [f"{sum(r.passed for r in records)} of {len(records)} networks pass every check."]
    for key, what in (("oracle", "Masked original and pruned model"), ("onnx", "PyTorch and onnxruntime")):
        errors = [r.figures[key] for r in records if r.figures.get(key) is not None]
        doubles = [r.figures[f"{key}_in_double"] for r in records if r.figures.get(f"{key}_in_double") is not None]
        rounded = f"; {max(doubles):.0e} in double where float32 was above its tolerance" if doubles else ""
        if errors:
            lines.append(f"{what} differ by {max(errors):.0e} at most, relative to the largest output{rounded}.")
    if ratios:
        lines.append(f"MACs that stay: {min(ratios):.4f} to {max(ratios):.4f} of the dense model's.")
        lines.append(f"At least 90 % of the MACs are prunable in {sum(s >= 0.9 for s in shares)} of {len(shares)}.")
        lines.append(
            f"Record, label, select and rewrite: {sorted(compiling)[len(compiling) // 2]:.1f} s at the median, "
            f"{max(compiling):.1f} s at most."
        )
    return lines


def held(records: Iterable[Record]) -> list[str]:
    """Of the networks that have MACs which no cut can lower: what share, and why."""
    return [
        f"- {r.name}: {1 - r.figures['prunable_share']:.1%} of the MACs. {'; '.join(r.figures['held'])}"
        for r in records
        if r.figures.get("prunable_share", 1) < NEARLY_ALL
    ]


def write_page(results: Path) -> None:
    """The result file as a page beside it: what it was made with, the summary, the table, and what is not prunable."""
    head, records = read(results)
    made = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    parts = [f"# {head['command']}", made, "\n".join(f"- {line}" for line in summary(records.values()))]
    parts.append(table(records.values()))
    if lines := held(records.values()):
        parts += ["## MACs that no cut can lower, and why", "\n".join(lines)]
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
