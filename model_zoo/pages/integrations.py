"""A table per network: every way it goes, dense and pruned; then what fails, and what a library does not take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model_zoo.records import Record, Results, bullets, table

COLUMNS = ("way", "error, dense → pruned", "ms, dense → pruned", "share", "MB, dense → pruned", "same ops", "the class")


def _row(record: Record) -> list[str]:
    f = record.figures
    dense, pruned, own = f["dense"], f.get("pruned"), f.get("class")
    as_class = "–" if own is None else f"{own['error']:.0e}"
    if pruned is None or "ms" not in pruned:
        return [f["way"], f"{dense['error']:.0e} → **fails**", *["–"] * 4, as_class]
    share = f"{pruned['ms'] / dense['ms']:.2f}"
    ops = "yes" if not record.checks["ops"] else "**no**"
    return [
        f["way"],
        f"{dense['error']:.0e} → {pruned['error']:.0e}",
        f"{dense['ms']:.1f} → {pruned['ms']:.1f}",
        f"**{share}**" if record.checks.get("milliseconds") else share,
        f"{dense['bytes'] / 1e6:.1f} → {pruned['bytes'] / 1e6:.1f}",
        ops if dense["ops"] else "–",
        as_class,
    ]


def _of(records: Iterable[Record]) -> list[str]:
    """The section of one network."""
    records = [*records]
    went = [record for record in records if "dense" in record.figures]
    why_not: dict[bool, list[str]] = {True: [], False: []}
    for record in records:
        if "dense fails" in record.figures:
            text = f"{record.figures['way']}: {record.figures['dense fails']}"
            why_not["dense" in record.figures].append(text)
    ended = [f"{r.name}: {r.checks['process']}" for r in records if "process" in r.checks]
    why = [f"{r.figures['way']}, {check}: {text}" for r in went for check, text in r.failures.items()]
    ratio = next((f"{r.figures['macs_ratio']:.3f} of the MACs stay." for r in went), "")
    return [
        ratio,
        table(COLUMNS, map(_row, went)) if went else "",
        "What falls short:" if why or ended else "",
        bullets(why + ended),
        "The dense model's own class does not go; its recording stands for it in the table:" if why_not[True] else "",
        bullets(why_not[True]),
        "Not gone here:" if why_not[False] else "",
        bullets(why_not[False]),
    ]


def page(results: Results, wanted: Sequence[str]) -> Sequence[str]:
    """What holds, what is not run yet of the cases that are wanted, and a section for each network."""
    records = results.lines
    missing = [name for name in wanted if name not in results.records]
    went = [record for record in records if "dense" in record.figures]
    fine = sum(record.checks.get("pruned") == "" for record in went)
    parts = [
        f"Dense, {len(went)} of {len(records)} go; of these {fine} do pruned, as graph and as class, and "
        f"{sum(record.passed for record in went)} pass every check."
    ]
    if missing and len(missing) < len(wanted):
        parts.append(f"Not run yet: {'; '.join(missing)}.")
    for network in dict.fromkeys(record.name.partition(", ")[0] for record in records):
        parts += [f"## {network}", *_of(r for r in records if r.name.startswith(f"{network}, "))]
    return parts
