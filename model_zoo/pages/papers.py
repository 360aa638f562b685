"""What the four papers print, beside what came of it here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from model_zoo.measuring.similarity import Sizes
from model_zoo.pages.gsm_mnist import PAPER as GSM
from model_zoo.pages.gsm_mnist import PAPER_TICKETS as TICKETS
from model_zoo.pages.similarity import compared, findings
from model_zoo.records import RESULTS, Record, mean_and_deviation, read, seeds, table

COLUMNS = dict.fromkeys(("of", "the paper", "here", "data and schedule here", "what differs"), "---")
DHP_RESNET_20 = (92.54, 91.54, 51.8)  # table 1: accuracy dense and pruned, MACs that stay in %


def papers_table(folder: Path = RESULTS) -> str:
    """A row for every figure of a paper that something here can be held against."""
    return table(COLUMNS, [*_gsm(folder), *_search(folder), *_structures(folder), *_cifar(folder)])


def _records(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Record]]:
    return read(folder / f"{name}.jsonl") if (folder / f"{name}.jsonl").exists() else ({}, {})


def _gsm(folder: Path) -> Iterator[list[str]]:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in _records(folder, "gsm_mnist")[1].values():
        found.setdefault((record.figures["network"], record.figures["compression"]), []).append(record.figures)
    for (network, compression), figures in sorted(found.items()):
        if (network, compression) not in GSM:
            continue
        dense, after = GSM[network, compression]
        first = figures[0]
        how = (
            f"MNIST, {first['epochs']} epochs of 235 steps as there, batches of {first['batch']}, {seeds(len(figures))}"
        )
        whole = mean_and_deviation([100 * f["dense"] for f in figures])
        for rule in first["rules"]:
            last = [f["rules"][rule][-1] for f in figures]
            before, cut = (mean_and_deviation([100 * f[key] for f in last]) for key in ("before", "after"))
            differs = f"batches of 256 there; the active set is {rule}" if "held" in rule else "batches of 256 there"
            paper = f"{dense:.2f} → {after:.2f}"
            of = f"GSM, {network} at {compression} times: accuracy dense → after the cut"
            yield [of, paper, f"{whole} → {cut} ({before} before the cut)", how, differs]
        beside = [f["beside"]["ticket"] for f in figures if "beside" in f]
        if beside and (network, compression) in TICKETS:
            yield [
                f"GSM, {network} at {compression} times: its zeros in the first weights, trained anew",
                f"{TICKETS[network, compression]:.2f}",
                mean_and_deviation([100 * ticket["accuracy"] for ticket in beside]),
                f"MNIST, {beside[0]['epochs']} epochs of 235 steps, batches of {first['batch']}, {seeds(len(beside))}",
                "batches of 256 there",
            ]


def _search(folder: Path) -> Iterator[list[str]]:
    records = _records(folder, "search_cost")[1]
    if records:
        times = ", ".join(f"{r.figures['times_cpu']:.1f} ({name})" for name, r in records.items())
        first = next(iter(records.values())).figures
        how = (
            f"scikit-learn's digits, or CIFAR-10 where named; gates {first['gates']} epochs, training {first['train']}"
        )
        yield [
            "Scratch: how much faster than a training its search is", "at least 10 times (CIFAR-10)", times, how,
            "fewer images; on digits narrower networks",
        ]  # fmt: skip


def _structures(folder: Path) -> Iterator[list[str]]:
    for study, images in (("similarity", "drawn images"), ("similarity_cifar10", "CIFAR-10 from JPEG, {} images")):
        head, records = _records(folder, study)
        if not records:
            continue
        sizes = Sizes.of(head)
        names = sizes.names()
        if any(name not in records for name in names):
            continue
        values = {what: value for what, value, _ in findings(sizes, compared(records, names))}
        random, ends = (values[f"{which}, among each other"] for which in ("random weights", "ends of trainings"))
        yield [
            "Scratch: structures from random weights are more diverse than those from trained ones", "so it says",
            f"{'yes' if random < ends else 'no'}: mean correlation {random:.3f} against {ends:.3f}",
            f"{images.format(sizes.images)}, VGG16-BN of {sizes.width:g} of its width, {sizes.epochs[-1]} epochs",
            "CIFAR-10, all images, whole width, 160 epochs there",
        ]  # fmt: skip


def _cifar(folder: Path) -> Iterator[list[str]]:
    head, records = _records(folder, "cifar")
    of: dict[tuple[str, float], list[Record]] = {}
    for record in records.values():
        if record.figures["network"] == "resnet20":
            of.setdefault((record.figures["method"], record.figures["ratio"]), []).append(record)
    if not of:
        return
    dense = mean(100 * r.figures["accuracy"] for r in of["dense", 1.0])
    data = f"CIFAR-10 from JPEG; for 160 epochs of a paper {head['rules']['epochs']}; "
    told = {
        "slimming": (
            "Slimming",
            "ResNet-164 at 76 % of its MACs: 94.58 → 94.92",
            "from published weights",
            "network, MACs, length",
        ),
        "scratch": ("Scratch", "not at hand", "from random weights", "length"),
        "dhp": (
            "DHP",
            "{:.2f} → {:.2f} at {:.1f} % of the MACs".format(*DHP_RESNET_20),
            "from random weights",
            "batches of 128 in place of 64, length",
        ),
    }
    for method, (what, paper, begun, differs) in told.items():
        runs = of.get((method, 0.5), [])
        done = [r.figures["accuracy"] for r in runs if r.passed or "accuracy" in r.figures]
        here = f"{dense:.2f} → {mean_and_deviation([100 * a for a in done])}" if done else "the search diverged"
        of_what = f"{what}, ResNet-20: accuracy dense → pruned"
        yield [of_what, paper, f"{here} at half of the MACs", data + begun, differs]
