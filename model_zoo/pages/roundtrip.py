"""What is the same on the way of every network, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence

from model_zoo.records import Record, Results, bullets, number, state, table

LOADED = "loaded: tensors and outputs identical"  # the check that says so


def _cells(record: Record) -> list[str]:
    f, s = record.figures, record.seconds
    refused = f.get("original_class", "–")
    return [
        record.name,
        number(f.get("ratio"), ".4f"),
        f"{f.get('safetensors_mb', '–')} MB",
        f"{f.get('pt2_mb', '–')} MB",
        "identical" if record.checks.get(LOADED) == "" else "**differs**",
        "identical" if f.get("program_identical") else number(f.get("program"), ".0e"),
        number(f.get("onnx"), ".0e"),
        "yes" if refused == "" else "no: " + refused.partition(", at ")[2].partition(". Use")[0],
        " / ".join(number(s.get(key), ".0f") for key in ("prune and save", LOADED, "onnxruntime")),
        state(record),
    ]


def page(results: Results, wanted: Sequence[str]) -> Sequence[str]:
    """What holds for all of the networks that are wanted, and a table."""
    found = results.lines
    identical = sum(r.figures.get("program_identical", False) for r in found)
    lines = [
        f"{sum(r.passed for r in found)} of {len(found)} networks pass every check: of a network that was pruned, "
        "changed as by fine-tuning, saved, and loaded in a new process, all tensors and outputs are bit for bit those "
        "from before.",
        f"The outputs of the program without the class are bit for bit the same in {identical} of {len(found)}.",
    ]
    missing = [spec for spec in wanted if spec not in results.records]
    if missing and len(found) > len(wanted) // 2:
        lines.insert(0, f"Not run yet: {', '.join(missing)}.")
    errors = [r.figures["onnx"] for r in found if "onnx" in r.figures]
    if errors:
        providers = ", ".join(sorted({r.figures["provider"] for r in found if "provider" in r.figures}))
        lines.append(f"onnxruntime ({providers}) and the loaded network differ by {max(errors):.0e} at most.")
    texts = ("network", "loaded in a new process", ".pt2 without the class", "into the class", "checks")
    columns = (
        "network", "MACs that stay", ".safetensors", ".pt2", "loaded in a new process", ".pt2 without the class",
        "ONNX", "into the class", "prune and save / load / export s", "checks",
    )  # fmt: skip
    aligned = {name: "---" if name in texts else "---:" for name in columns}
    return [bullets(lines), table(aligned, map(_cells, found))]
