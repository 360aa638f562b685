"""What holds of pruned networks in their model's place: counts per library and check, and every network that falls
short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model_zoo.records import Record, Results, bullets, table


def counts(records: Iterable[Record]) -> dict[str, tuple[int, int, int]]:
    """Check -> in how many networks it holds, how many were asked, and in how many of these it was a guard."""
    found: dict[str, tuple[int, int, int]] = {}
    for record in records:
        for name, reason in record.checks.items():
            fine, asked, guards = found.get(name, (0, 0, 0))
            guarded = record.figures.get("cells", {}).get(name, {}).get("state") == "guarded"
            found[name] = fine + (not reason), asked + 1, guards + guarded
    return found


def counted(records: Iterable[Record]) -> str:
    """One line per check."""
    lines = []
    records = sorted(records, key=lambda record: -len(record.checks))  # the checks in the order of one that has most
    for name, (fine, asked, guards) in counts(records).items():
        lines.append(f"{name}: {fine} of {asked}" + (f", {guards} of them guarded" if guards else ""))
    return bullets(lines)


def short(records: Iterable[Record]) -> str:
    """One line per network and check that fails, or "" if there is none."""
    return _whys((record.name, check, why) for record in records for check, why in record.failures.items())


def other_budgets(records: Iterable[Record]) -> str:
    """The networks that could not be pruned as far as asked, and how far they were."""
    told = [f"{r.name} {r.figures['smallest']:.2f}" for r in records if "smallest" in r.figures]
    return f"Pruned to the smallest ratio that can be reached: {', '.join(told)}." if told else ""


def not_asked(records: Iterable[Record]) -> str:
    """One line per network and check that the dense model does not pass itself, or "" if there is none."""
    asked = ((record.name, record.figures.get("not asked", {})) for record in records)
    return _whys((name, check, why) for name, reasons in asked for check, why in reasons.items())


def page(results: Results) -> Sequence[str]:
    records = sorted(results.lines, key=lambda record: record.name)
    parts = [f"{sum(record.passed for record in records)} of {len(records)} networks fall short nowhere."]
    for group in sorted({_group(record) for record in records}):
        parts += [f"## {group}", counted(record for record in records if _group(record) == group)]
    for heading, text in (
        ("What falls short", short(records)),
        ("What the dense model does not do itself, and is not asked", not_asked(records)),
        ("Other budgets", other_budgets(records)),
    ):
        parts += [f"## {heading}", text] if text else []
    return parts


def _group(record: Record) -> str:
    return record.name.rpartition(":")[0]


def _whys(rows: Iterable[tuple[str, str, str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return table(dict.fromkeys(("network", "check", "why"), "---"), cells) if cells else ""
