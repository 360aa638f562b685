"""What a measurement leaves behind: one JSON object per case in a file that only grows."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

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
    "torchao",
    "openvino",
    "executorch",
    "litert-torch",
    "lightning",
    "accelerate",
    "peft",
    "numpy",
)


@dataclass
class Record:
    """One case's line in the result file. ``checks``: name -> the reason why it fails, or ""."""

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


class Layout(NamedTuple):
    """Of a result file: a header and a line per record, unless something else is said.

    ``document``: the file is one JSON object, which has the records as a list under this key. ``named_by``: records are
    their figures alone, of which these make the name.
    """

    document: str | None = None
    named_by: tuple[str, ...] = ()

    def record(self, entry: dict[str, Any]) -> Record:
        if "name" in entry:
            return Record(**entry)
        return Record(", ".join(str(entry[key]) for key in self.named_by), entry)

    def entry(self, record: Record) -> dict[str, Any]:
        return record.figures if self.named_by and not record.failures else asdict(record)


LINES = Layout()


class Results(NamedTuple):
    """What is in a result file: what it was made with, and the last record of every case."""

    head: dict[str, Any]
    records: dict[str, Record]
    path: Path

    @property
    def lines(self) -> list[Record]:
        return [*self.records.values()]

    @property
    def plot(self) -> Path:
        return self.path.with_suffix(".png")

    def image(self, what: str) -> str:
        """The plot beside the file in a page, or "" where there is none."""
        return f"![{what}]({self.plot.name})" if self.plot.exists() else ""


def header(command: str) -> dict[str, Any]:
    """What a result depends on besides the code."""
    return {
        "fxprune": fxprune.__version__,
        "python": platform.python_version(),
        **_versions(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def begun(path: Path) -> bool:
    """Whether there is a result file, with something in it."""
    return path.exists() and path.stat().st_size > 0


def begin(path: Path, command: str, layout: Layout = LINES, **others: Any) -> None:
    """A new result file: it first says what it is made with, and ``others``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = header(command) | others
    path.write_text((_document(head, layout, []) if layout.document else json.dumps(head)) + "\n")


def go_on(path: Path, command: str, layout: Layout = LINES, **others: Any) -> None:
    """Say in a result file that what follows was measured on another day or with something else, if that is so.

    Raises:
        ValueError: among ``others`` are other rules (a mapping) than those that the file was begun with.
    """
    if layout.document:
        return
    first = json.loads(path.read_text().partition("\n")[0])
    now = json.loads(json.dumps(header(command) | others))
    changed = {key: value for key, value in now.items() if key not in ("command", "date") and value != first.get(key)}
    for key, value in changed.items():
        if isinstance(value, dict):
            was = first.get(key, {})
            differ = [f"{k} {was.get(k)}, now {v}" for k, v in value.items() if v != was.get(k)]
            raise ValueError(f"{path} was measured with {'; '.join(differ)}: take what it has, or pass another --out")
    if changed or now["date"][:10] != first["date"][:10]:
        with path.open("a") as file:
            file.write(json.dumps({"date": now["date"], **changed}) + "\n")


def append(path: Path, record: Record, layout: Layout = LINES) -> None:
    """One record more."""
    if layout.document:
        head, records = read(path, layout)
        records[record.name] = record
        path.write_text(_document(head, layout, records.values()) + "\n")
        return
    with path.open("a") as file:
        file.write(json.dumps(layout.entry(record)) + "\n")


def _document(head: dict[str, Any], layout: Layout, records: Iterable[Record]) -> str:
    return json.dumps({**head, str(layout.document): [*map(layout.entry, records)]}, indent=1)


def read(path: Path, layout: Layout = LINES) -> tuple[dict[str, Any], dict[str, Record]]:
    """The header, with what was otherwise whenever it was gone on with, and the last record of every case."""
    if layout.document:
        head = json.loads(path.read_text())
        entries = head.pop(layout.document)
    else:
        head, *entries = (json.loads(line) for line in path.read_text().splitlines())
        if not layout.named_by:
            head = _together([head, *(entry for entry in entries if "name" not in entry)])
    records = (layout.record(entry) for entry in entries if "name" in entry or layout.named_by)
    return head, {record.name: record for record in records}


def _together(heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One header of several, the first of which is complete: every value once."""
    result = dict(heads[0])
    for key in dict.fromkeys(key for later in heads[1:] for key in later if key != "command"):
        result[key] = " and ".join(dict.fromkeys(str(head[key]) for head in heads if key in head))
    return result


def raised(error: BaseException) -> str:
    """An error as the reason why a check fails; files of installed packages by their place in them."""
    text = re.sub(r"[^\s\"'(]*-packages/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:400]}"


@contextmanager
def stage(record: Record, name: str) -> Iterator[None]:
    """Time a stage; what it raises becomes the reason of its failure. Copies of networks that it made are gone."""
    start = time.perf_counter()
    record.checks[name] = ""
    try:
        yield
    except Exception as error:
        record.checks[name] = raised(error)
    record.seconds[name] = round(time.perf_counter() - start, 2)
    gc.collect()  # graph modules refer to themselves


# -- pages -------------------------------------------------------------------------------------------------------------


def table(columns: Mapping[str, str] | Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table. ``columns``: heads, each with ``---`` or ``---:``; or heads, of which the first is a text."""
    if not isinstance(columns, Mapping):
        columns = dict(zip(columns, ["---", *["---:"] * (len(columns) - 1)], strict=True))
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, columns.values(), *rows))


def heading(head: Mapping[str, Any]) -> list[str]:
    """The first paragraphs of a page: the command, and what it was run with."""
    date = {"date": days(head)} if " and " in head.get("date", "") else {}
    shown = {key: value for key, value in {**head, **date}.items() if key != "command" and not isinstance(value, dict)}
    return [f"# {head['command']}", ", ".join(f"{key} {value}" for key, value in shown.items())]


def days(head: Mapping[str, Any]) -> str:
    """When the results of this header were measured."""
    return " and ".join(dict.fromkeys(re.findall(r"\d{4}-\d\d-\d\d", head["date"])))


def bullets(lines: Iterable[str]) -> str:
    """A list of texts, in which nothing is a link."""
    return "\n".join("- " + line.replace("](", "]\\(") for line in lines)


def reasons(record: Record) -> str:
    """The checks that fail, and why, for a cell of a table; "" if none does."""
    return "; ".join(f"{name}: {reason}" for name, reason in record.failures.items()).replace("|", "\\|")


def state(record: Record) -> str:
    return f"**fails** {reasons(record)}" if record.failures else f"{len(record.checks)} pass"


def number(value: float | None, form: str = "") -> str:
    """In this form; a dash where there is none."""
    return "–" if value is None else format(value, form)


def seeds(count: int) -> str:
    """So many of them, in words."""
    return "1 seed" if count == 1 else f"{count} seeds"


def mean_and_error(values: Sequence[float]) -> str:
    """With the standard error of the mean where there are several."""
    spread = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """With the standard deviation where there are several."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
