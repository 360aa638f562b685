"""MACs and latency that stay of every network, batch size and cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model_zoo.records import Record, Results, bullets, table


def page(results: Results) -> Sequence[str]:
    """Where it was measured, the table, and what is not where it should be."""
    records = results.records
    devices = sorted({r.figures["device"] for r in records.values()})
    threads = sorted({str(r.figures["threads"] or "all") for r in records.values()})
    wanted = [r for r in records.values() if r.checks]
    return [
        f"On {'; '.join(devices)}; threads: {', '.join(threads)}.",
        *(f"## {name}\n\n{latencies(found)}" for name, found in by_engine(records).items()),
        f"{sum(r.passed for r in wanted)} of {len(wanted)} are where they should be (bold are not).",
        bullets(f"{name}: {r.checks['latency']}" for name, r in records.items() if r.failures),
    ]


def by_engine(records: Mapping[str, Record]) -> dict[str, dict[str, Record]]:
    """Those of one engine and version together."""
    found: dict[str, dict[str, Record]] = {}
    for name, record in records.items():
        engine = f"{record.figures['provider']}, {record.figures['version']}"
        found.setdefault(engine, {})[name] = record
    return found


def latencies(records: Mapping[str, Record]) -> str:
    """A line per network and batch size: MACs and latency that stay, as ratios."""
    rows: dict[tuple[str, int], dict[str, Record]] = {}
    for record in records.values():
        f = record.figures
        rows.setdefault((f["network"], f["batch"]), {})[f["cut"]] = record
    networks, cuts = ([*dict.fromkeys(r.figures[key] for r in records.values())] for key in ("network", "cut"))
    lines = []
    for network, batch in sorted(rows, key=lambda row: (networks.index(row[0]), row[1])):
        found = rows[network, batch]
        aligned = sorted({r.figures["round_to"] for cut, r in found.items() if "round_to" not in cut})
        dense = next(iter(found.values())).figures["dense_ms"]
        cells = [f"{dense:.1f}", *(_cell(found.get(cut)) for cut in cuts), ", ".join(map(str, aligned))]
        lines.append([network, str(batch), *cells])
    return table(["network", "batch", "dense ms", *(f"{cut}: MACs → latency" for cut in cuts), "aligned to"], lines)


def _cell(record: Record | None) -> str:
    if record is None:
        return "–"
    ratio = f"{record.figures['ratio']:.3f}"
    return f"{record.figures['macs_ratio']:.3f} → {f'**{ratio}**' if record.failures else ratio}"
