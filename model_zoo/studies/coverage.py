"""Networks pruned to half their MACs, with everything checked that fxprune promises of the result.

What is checked: ``model_zoo/checks.py``. Every network runs in a process of its own, with a limit of time and memory:
one that fails loses nothing. ``NETWORK@PART`` prunes a submodule in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from model_zoo.networks import NETWORKS, everything, families, read_list, torchvision
from model_zoo.records import Record, Results, bullets, number, state, table
from model_zoo.study import Add, Options, Study, each, passed

NEARLY_ALL = 0.9995
PRELOADED = ("torchvision", "timm", "onnxscript", "torch.onnx", "fxprune.api", "fxprune.deploy", "model_zoo.checks")
STAGES = {"recording": "record", "analysing": "label", "selecting": "select", "rewriting": "rewrite"}


def _measured(spec: str, options: Options) -> Record:
    from model_zoo.checks import measure, measure_on_meta

    given: Any = {"flops": options.flops, "attention": options.attention}
    if options.meta:
        return measure_on_meta(spec, **given)
    return measure(spec, **given, method=options.method, onnx=options.onnx)


def _told(record: Record) -> str:
    why = "; ".join(f"{n}: {why}" for n, why in record.failures.items())
    ratio = record.figures.get("ratio", float("nan"))
    return f"{record.name}: {sum(record.seconds.values()):.0f} s, ratio {ratio:.4f}, {why or 'ok'}"


# -- the page ----------------------------------------------------------------------------------------------------------


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


# -- the studies -------------------------------------------------------------------------------------------------------


def _options(meta: bool, attention: str) -> Callable[[Add], None]:
    import argparse

    def declare(add: Add) -> None:
        switch = argparse.BooleanOptionalAction
        add("--list", type=Path, metavar="FILE", help="take the networks from a file with one name a line")
        add("--meta", action=switch, default=meta, help="without weights: record, label, plan, rewrite; no oracle")
        add("--onnx", action=switch, default=True, help="export and check ONNX")
        add("--flops", type=float, default=0.5, help="budget (default: 0.5)")
        add("--method", default="l2", help="method (default: l2)")
        add("--attention", default=attention, help=f"head_dim or heads (default: {attention})")

    return declare


def _study(
    name: str,
    about: str,
    names: Callable[[], Iterable[str]],
    meta: bool = False,
    attention: str = "head_dim",
    **more: Any,
) -> Study:
    return Study(
        name, about, lambda options: read_list(options.list) if options.list else names(), each(_measured), page,
        options=_options(meta, attention), doc=__doc__, finished=passed, told=_told, open=True, strict=True, apart=True,
        jobs=True, threads=None, memory=16,
        preload=PRELOADED,
        **more,
    )  # fmt: skip


COVERAGE = _study("coverage", "24 networks at half of their MACs, every promise checked; 20 minutes", lambda: NETWORKS)
FAMILIES = _study("families", "the same of the smallest architecture of every timm family", families)
HEADS = _study("families-heads", "whole heads cut in these, on the meta device", families, meta=True, attention="heads")
TORCHVISION = replace(_study("torchvision", "everything in torchvision", torchvision), needs=("torchvision",))
TIMM = _study("timm", "every architecture of timm, on the meta device", everything, meta=True, file="all.jsonl")
LISTS = {"families": families, "torchvision": torchvision, "all": everything}
