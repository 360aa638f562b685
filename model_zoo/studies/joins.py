"""Whether it pays that layers choose what they read of a stream (`latency=fxprune.LatencyBudget(..., joins=True)`).

Half of the dense network's latency on onnxruntime, one thread, is met as always; then the milliseconds that the table
of kernels predicts of that are met once more, with choices where the table says that they pay. Both then run in turn:
medians of at least 31 runs. The share of the dense latency was measured before, beside the dense network. Scores are
l2, weights random, norm statistics too. *Kept* is the share of all scores that stays; without choices layers count as
reading all of a stream. Other work ran on the two cores, so milliseconds of different rows, and predicted and measured
ones, are not to be compared, only those of one row with and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import fxprune
from fxprune.deploy.joins import freed, savings, twins_of
from fxprune.deploy.latency import Clock
from fxprune.methods import ModelState, resolve, score_groups
from fxprune.options import LatencyBudget
from fxprune.pipeline import Cut, Dense, Stages, compress, record_and_analyse
from fxprune.recording.inputs import infer_inputs
from fxprune.rewriting.selections import readers_of_joins
from fxprune.selection.budget import Budget
from model_zoo.networks import load
from model_zoo.networks.random_weights import randomise
from model_zoo.records import Record, Results, table
from model_zoo.study import Options, Study, each, rules

NETWORKS, BATCHES, RATIO = ("resnet18", "resnet50", "mobilenetv2_100"), (1, 8), 0.5
CASES = [f"{network}, {batch}" for network in NETWORKS for batch in BATCHES]


def scored(dense: Dense, cut: Cut) -> list[Any]:
    tensors = dict([*dense.module.named_parameters(), *dense.module.named_buffers()])
    return score_groups(resolve("l2"), ModelState(dense.graph, tensors))  # type: ignore[arg-type]


def measured(case: str, options: Options) -> Record:
    name, batch = case.split(", ")
    model = load(f"timm:{name}").eval()
    args, kwargs = infer_inputs(model)
    randomise(model, lambda: (args, kwargs))
    how = LatencyBudget(RATIO, provider="CPUExecutionProvider", threads=1, batch=int(batch))
    dense = record_and_analyse(model, args, kwargs, "head_dim", (), Stages(False), verify=True)
    cut = Cut(Budget("latency", RATIO), round_to=(16, 8, 4, 2, 1))
    clock = Clock(dense, how, 16)
    plain = clock.compress(dense, scored(dense, cut), clock.within(cut), "l2")
    report = plain.meta["fxprune"]
    tied = report.plan.channels(dense.graph)
    figures: dict[str, Any] = {
        "dense_ms": report.latency.dense_ms, "plain_ms": report.latency.pruned_ms, "ratio": report.latency.ratio,
        "plain_predicted": clock.cost(tied) / 1e6,
        "readers": len(readers_of_joins(dense.module, dense.graph)), "joins": [],
    }  # fmt: skip
    found = freed(dense, how, cut, scored, tied)
    if found is not None:
        clock, graph, scores = Clock(found.dense, how, 16), found.dense.graph, scored(found.dense, cut)
        twin = tied[twins_of(graph, dense.graph)]
        ratio = min(1.0, clock.cost(twin) / clock.cost(graph.everything()))
        within = clock.within(replace(found.cut, budget=Budget("latency", ratio)))
        joined = compress(found.dense, scores, within, "l2")
        keep = joined.meta["fxprune"].plan.channels(graph, dense.graph)
        x = args[0].repeat(int(batch), 1, 1, 1)[: int(batch)]
        beside = fxprune.bench(plain, joined, x, provider=how.provider, threads=1)
        figures |= {
            "joins": list(found.dense.joins), "plain_ms": beside.dense_ms, "joined_ms": beside.pruned_ms,
            "joined_predicted": clock.cost(keep) / 1e6, "oracle": joined.meta["fxprune"].oracle_error,
            "saved": sum(savings(graph, clock.cost, found.dense.joins, keep).values()) / 1e6,
            "joined_kept": found.share(graph, keep), "plain_kept": found.share(dense.graph, tied),
            "plain_predicted": clock.cost(twin) / 1e6,
        }  # fmt: skip
    return Record(case, figures)


def page(results: Results) -> Sequence[str]:
    rows = []
    for name, record in results.records.items():
        f = record.figures
        row = [name, f"{len(f['joins'])} of {f['readers']}", f"{f['ratio']:.2f}"]
        row += [f"{f['plain_predicted']:.1f}", f"{f['plain_ms']:.1f}"]
        if f["joins"]:
            row += [f"{f['joined_predicted']:.1f}", f"{f['joined_ms']:.1f}", f"{f['saved']:.2f}"]
            row += [f"{f['plain_kept']:.1%}", f"{f['joined_kept']:.1%}"]
        rows.append(row + [""] * (10 - len(row)))
    columns = [
        "network, batch", "layers that choose", "of the dense latency, without", "without: predicted ms", "without: ms",
        "with: predicted ms", "with: ms", "of that saved by choices", "kept without", "kept with",
    ]  # fmt: skip
    none = [name for name, record in results.records.items() if not record.figures["joins"]]
    left = [case for case in CASES if case not in results.records]
    told = [f"No choice is predicted to keep more of the scores: {'; '.join(none) or 'nowhere'}."]
    return [table(columns, rows), *told, *([f"Not measured yet: {'; '.join(left)}."] if left else [])]


STUDY = Study(
    "joins", "whether layers that choose what they read of a stream pay, at half of the latency", lambda _: CASES,
    each(measured), page, doc=__doc__, rules=rules(__doc__),
)  # fmt: skip
