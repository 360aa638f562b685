"""Tables of networks that were pruned and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from model_zoo.records import Record, Results, bullets, number, state, table

NEARLY_ALL = 0.9995
STAGES = {"recording": "record", "analysing": "label", "selecting": "select", "rewriting": "rewrite"}


def networks_table(records: Iterable[Record]) -> str:
    """One line per network."""
    columns = ["network", "GMACs", "pruned", "ratio", "parameters", "prunable MACs", "masked ≡ pruned", "ONNX"]
    columns += ["/".join(STAGES.values()) + " s", "all s", "GiB", "checks"]
    return table(dict.fromkeys(columns, "---:") | {"network": "---", "checks": "---"}, map(_cells, records))


def _cells(record: Record) -> list[str]:
    f = record.figures
    stages = f.get("stages", {})
    return [
        record.name,
        *([f"{f[key] / 1e9:.3f}" for key in ("macs_before", "macs_after")] if "macs_before" in f else "––"),
        number(f.get("ratio"), ".4f"),
        f"{f['params_before'] / 1e6:.2f} M → {f['params_after'] / 1e6:.2f} M" if "params_before" in f else "–",
        number(f.get("prunable_share"), ".1%"),
        *(number(f.get(key), ".0e") + _in_double(f, key) for key in ("oracle", "onnx")),
        " / ".join(f"{stages[name]:.1f}" for name in STAGES) if stages else "–",
        f"{sum(record.seconds.values()):.0f}",
        number(f.get("memory_gib"), ".1f"),
        state(record),
    ]


def _in_double(figures: dict[str, Any], key: str) -> str:
    double = figures.get(f"{key}_in_double")
    return "" if double is None or figures.get(key) is None else f" (double: {double:.0e})"


def summary(records: Iterable[Record]) -> list[str]:
    """What holds for all of them together, one sentence each."""
    records = list(records)

    def known(key: str) -> list[Any]:
        return [r.figures[key] for r in records if r.figures.get(key) is not None]

    ratios, shares = known("ratio"), known("prunable_share")
    compiling = sorted(sum(stages.get(s, 0) for s in STAGES) for stages in known("stages"))
    lines = [f"{sum(r.passed for r in records)} of {len(records)} networks pass every check."]
    for key, what in (("oracle", "Masked original and pruned model"), ("onnx", "PyTorch and onnxruntime")):
        doubles = known(f"{key}_in_double")
        rounded = f"; {max(doubles):.0e} in double where float32 was above its tolerance" if doubles else ""
        if errors := known(key):
            lines.append(f"{what} differ by {max(errors):.0e} at most, relative to the largest output{rounded}.")
    if ratios:
        lines.append(f"MACs that stay: {min(ratios):.4f} to {max(ratios):.4f} of the dense model's.")
        lines.append(f"At least 90 % of the MACs are prunable in {sum(s >= 0.9 for s in shares)} of {len(shares)}.")
        lines.append(
            f"Record, label, select and rewrite: {compiling[len(compiling) // 2]:.1f} s at the median, "
            f"{compiling[-1]:.1f} s at most."
        )
    return lines


def page(results: Results) -> Sequence[str]:
    """The summary, the table, and what is not prunable."""
    held = [
        f"{r.name}: {1 - r.figures['prunable_share']:.1%} of the MACs. {'; '.join(r.figures['held'])}"
        for r in results.lines
        if r.figures.get("prunable_share", 1) < NEARLY_ALL
    ]
    parts = [bullets(summary(results.lines)), networks_table(results.lines)]
    return [*parts, "## MACs that no cut can lower, and why", bullets(held)] if held else parts
