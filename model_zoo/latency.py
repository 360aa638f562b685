"""Latency of what is left, beside the dense network's, on onnxruntime.

    python -m model_zoo.latency               six networks at batch sizes 1 and 8; about an hour
    python -m model_zoo.latency --resume      what has no line in the result file yet
    python -m model_zoo.latency --page        the page from the result file

Every network is pruned by the magnitude of its (random) weights: to half of its MACs with default settings, to half of
its MACs with any number of channels (``round_to=1``), and to half of its latency. Dense and pruned network then run in
turn, ``fxprune.bench``: medians of at least 31 runs each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fxprune
from fxprune.io.specs import load_model
from fxprune.recording.inputs import infer_inputs
from model_zoo.recipes.common import positive
from model_zoo.records import RESULTS, Record, append, begin, heading, markdown, read

BATCHES = (1, 8)
THREADS = 1  # of the processor: more are disturbed by whatever else runs
TOLERANCE = 0.05  # of the latency that was asked for


class Cut(NamedTuple):
    """Arguments of ``prune``, and what the latency ratio should be: ``most`` at most, or near ``aim``."""

    options: Mapping[str, Any]
    most: Mapping[str, float] | None = None
    aim: float | None = None


# The ratios that half of the MACs should reach by default.
MOST = {
    "resnet50": 0.5,
    "mobilenetv3_large_100": 0.6,
    "efficientnet_b0": 0.6,
    "convnext_tiny": 0.5,
    "vit_small_patch16_224": 0.6,
    "swin_tiny_patch4_window7_224": 0.7,
}
CUTS = {
    "flops=0.5": Cut({"flops": 0.5}, most=MOST),
    "flops=0.5, round_to=1": Cut({"flops": 0.5, "round_to": 1}),
    "latency=0.5": Cut({"latency": 0.5}, aim=0.5),
}


def name_of(network: str, batch: int, cut: str) -> str:
    return f"{network}, batch {batch}, {cut}"


def measured(network: str, batch: int, cut: str, threads: int, provider: str | None) -> Record:
    """One network pruned in one way."""
    torch.manual_seed(0)
    model = load_model(f"timm:{network}").eval()
    args, _ = infer_inputs(model)
    x = torch.randn(batch, *args[0].shape[1:])
    how = CUTS[cut]
    given = dict(how.options)
    if "latency" in given:
        given["latency"] = fxprune.LatencyBudget(given["latency"], provider, threads)
    pruned = fxprune.prune(model, x, **given, progress=False)
    report = pruned.meta["fxprune"]
    latency = fxprune.bench(model, pruned, x, threads=threads, provider=provider)
    figures = {
        "network": network, "batch": batch, "cut": cut, "macs_ratio": report.macs_after / report.macs_before,
        "round_to": report.round_to, "oracle": report.oracle_error, **latency.data(),
    }  # fmt: skip
    record = Record(name_of(network, batch, cut), figures, dict(report.seconds))
    if how.most is not None:
        most = how.most[network]
        record.checks["latency"] = "" if latency.ratio <= most else f"{latency.ratio:.3f}, at most {most} wanted"
    if how.aim is not None:
        far = abs(latency.ratio - how.aim) > TOLERANCE
        record.checks["latency"] = f"{latency.ratio:.3f}, {how.aim} +- {TOLERANCE} wanted" if far else ""
    return record


def page(results: Path) -> str:
    head, records = read(results)
    devices = sorted({f"{r.figures['provider']} on {r.figures['device']}" for r in records.values()})
    threads = sorted({str(r.figures["threads"] or "all") for r in records.values()})
    parts = heading(head)
    parts += [(__doc__ or "").partition("\n\n    python")[0]]
    parts += [f"{'; '.join(devices)}; threads of onnxruntime: {', '.join(threads)}."]
    parts += [(__doc__ or "").rpartition("\n\n")[2].strip()]
    parts.append(table(records))
    failing = [f"- {name}: {r.checks['latency']}" for name, r in records.items() if r.failures]
    wanted = [r for r in records.values() if r.checks]
    parts.append(f"{sum(r.passed for r in wanted)} of {len(wanted)} are where they should be (bold are not).")
    parts += ["\n".join(failing)] if failing else []
    return "\n\n".join(parts) + "\n"


def table(records: Mapping[str, Record]) -> str:
    """A line per network and batch size: MACs and latency that stay, as ratios."""
    columns = ["network", "batch", "dense ms", *(f"{cut}: MACs → latency" for cut in CUTS), "aligned to"]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for network in MOST:
        for batch in BATCHES:
            found = {cut: records.get(name_of(network, batch, cut)) for cut in CUTS}
            known = [record for record in found.values() if record is not None]
            if known:
                steps = sorted(
                    {r.figures["round_to"] for c, r in found.items() if r and "round_to" not in CUTS[c].options}
                )
                rows.append([network, str(batch), f"{known[0].figures['dense_ms']:.1f}",
                             *(cell(record) for record in found.values()), ", ".join(map(str, steps))])  # fmt: skip
    return markdown(rows)


def cell(record: Record | None) -> str:
    if record is None:
        return "–"
    ratio = f"{record.figures['ratio']:.3f}"
    return f"{record.figures['macs_ratio']:.3f} → {f'**{ratio}**' if record.failures else ratio}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS / "latency.jsonl", metavar="FILE", help="one line per run; only grows")
    add("--resume", action="store_true", help="go on with what is there")
    add("--page", action="store_true", help="only make the page of the result file")
    add("--networks", nargs="+", choices=MOST, default=list(MOST))
    add("--batches", nargs="+", type=positive, default=list(BATCHES))
    add("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    add("--threads", type=positive, default=THREADS, help=f"of the processor (default: {THREADS})")
    add("--provider", help="onnxruntime's execution provider (default: CUDA, or the CPU)")
    options = parser.parse_args(argv)
    if not options.page:
        torch.set_num_threads(1)
        if not (options.resume and options.results.exists()):
            begin(options.results, "python -m model_zoo.latency")
        for batch in options.batches:
            for network in options.networks:
                for cut in options.cuts:
                    if name_of(network, batch, cut) not in read(options.results)[1]:
                        record = measured(network, batch, cut, options.threads, options.provider)
                        append(options.results, record)
                        print(f"{record.name}: MACs {record.figures['macs_ratio']:.3f}, latency "
                              f"{record.figures['ratio']:.3f} {record.failures or ''}", flush=True)  # fmt: skip
    options.results.with_suffix(".md").write_text(page(options.results))


if __name__ == "__main__":
    main()
