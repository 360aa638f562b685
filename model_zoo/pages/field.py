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
    for name, (fine, asked, guards) in counts(records).items():
        lines.append(f"{name}: {fine} of {asked}" + (f", {guards} of them guarded" if guards else ""))
    return bullets(lines)


def short(records: Iterable[Record]) -> str:
    """One line per network and check that fails, or "" if there is none."""
    rows = [[r.name, check, why.replace("|", "\\|")] for r in records for check, why in r.failures.items()]
    return table(dict.fromkeys(("network", "check", "why"), "---"), rows) if rows else ""


def other_budgets(records: Iterable[Record], usual: float) -> str:
    """The networks that could not be pruned so far, and how far they were."""
    ratios = {record.name: record.figures.get("flops", usual) for record in records}
    told = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio != usual]
    return f"The smallest ratio that can be reached is larger than {usual:g}: {', '.join(told)}." if told else ""


def page(results: Results) -> Sequence[str]:
    records = sorted(results.lines, key=lambda record: record.name)
    usual = min((record.figures["flops"] for record in records if "flops" in record.figures), default=1.0)
    groups = {group: [r for r in records if r.name.startswith(f"{group}:")] for group in _groups(records)}
    parts = [f"{sum(record.passed for record in records)} of {len(records)} networks fall short nowhere."]
    for group, these in groups.items():
        parts += [f"## {group}", counted(these)]
    falls_short = short(records)
    if falls_short:
        parts += ["## What falls short", falls_short]
    return [*parts, other_budgets(records, usual), _not_asked(records)]


def _groups(records: Iterable[Record]) -> list[str]:
    return sorted({record.name.rpartition(":")[0] for record in records})


def _not_asked(records: Iterable[Record]) -> str:
    """What the dense model does not do by itself."""
    rows = [[r.name, check, why] for r in records for check, why in r.figures.get("not asked", {}).items()]
    if not rows:
        return ""
    return "## What the dense model does not do itself\n\n" + table(
        dict.fromkeys(("network", "check", "why"), "---"), [[cell.replace("|", "\\|") for cell in row] for row in rows]
    )
