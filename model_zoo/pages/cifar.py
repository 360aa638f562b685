"""Accuracy of every method, before and after training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from model_zoo.measuring.cifar import METHODS, NETWORKS, RATIOS
from model_zoo.peers import SMALL_STEPS
from model_zoo.records import Record, Results, bullets, mean_and_error, table

RULES = """\
- The trained weights are adapted to these images: *dense*. Its column "cut" is the accuracy before, of the published
  weights. *dense, tuned* is trained as long again, as the pruned networks are.
- Criteria, GSM and Torch-Pruning cut the adapted network, whose accuracy is the column "adapted": every device adapts
  its own, so those rows compare that start from the same. Rows without it are older than the column and started from
  *dense*. So is *obs*, whose value was read from the same network afterwards; the seconds of its row at 0.5 include the
  adaptation, and its cut took 25 of them.
- What reads data reads the same {seen} training images. Then norm statistics are taken anew from {recalibrated}
  batches, for a column of its own and nothing else; and what was cut is fine-tuned. Adaptation and fine-tuning are
  alike: {epochs} epochs of SGD, momentum 0.9, weight decay 1e-4, batches of {batch}, a rate of {lr} that falls to zero
  along a cosine.
- Learners and scratch have the epochs of their papers, of which {papers} count as these {epochs}. *slimming*: the
  published weights are trained with the penalty in place of the adaptation (paper: from random weights), by the paper's
  schedule; its strength is the paper's 1e-5, times what fewer and other steps take away from the sum of all rates.
  *gsm*: whole channels, where the paper has weights; 600 of its epochs, of which its base has 500; the weight decay is
  such that a passive weight shrinks as it does there; the paper does not fine-tune, which is the column before.
  *scratch*: gates for 10 epochs on random weights, then new ones for 160 divided by the ratio (Scratch-B), by the
  paper's schedule. *dhp*: random weights, a search of 100 epochs at most, then 300 for what is left, by its schedule;
  its strength suffices to meet the budget in a search, and the classifier is an ordinary layer, as in the released
  code: with one that is generated the loss was nan in the first epoch of all runs at this rate. The random weights of
  these two have not seen the hundreds of epochs that the published ones have.
- Torch-Pruning leaves the residual stream whole: where zeros are put to new channels ("option A"), what it makes of the
  stream does not run. It is given the smallest ratio of channels that meets the budget; a layer of which all channels
  would go it leaves whole, so that there need be none. *In steps*: as in its benchmark on CIFAR, {steps} steps towards
  no channels at all, up to the first that meets the budget.
- Images are cropped at random with 4 pixels of black around them, and mirrored. Accuracy is that on all test images
  after the last epoch; nothing was chosen by it.
- MACs are those of convolutions and linear layers, counted by ``fxprune.analyze`` for all; a budget is the largest
  number at or under the ratio. Times are of processes that share one device, as many as ``jobs`` above, so they only
  compare, and only those of one device; of a run that was interrupted they are those since then.\
"""


def page(results: Results) -> Sequence[str]:
    """Mean and standard error over seeds."""
    parts = [RULES.format(**results.head["rules"], steps=SMALL_STEPS)]
    for network in NETWORKS:
        if of := [r for r in results.lines if r.figures["network"] == network]:
            seeds = len({r.figures["seed"] for r in of})
            parts += [f"## {network}", f"Seeds: {seeds}. Accuracy in %.", _table(of, seeds)]
    failed = [f"{r.name}: {reason}" for r in results.lines for reason in r.failures.values()]
    return [*parts, "## Runs without a result", bullets(failed)] if failed else parts


def _table(records: Sequence[Record], seeds: int) -> str:
    rows: list[Sequence[str]] = []
    for ratio in (1.0, *RATIOS):
        for method in METHODS:
            asked = [r for r in records if (r.figures["method"], r.figures["ratio"]) == (method, ratio)]
            of = [r for r in asked if "accuracy" in r.figures]
            if asked and not of:
                rows.append([f"{ratio:g}", method, *["not reached"], *["–"] * 7])
            elif of:
                accuracies = [
                    mean_and_error(found) if (found := [100 * r.figures[key] for r in of if key in r.figures]) else "–"
                    for key in ("dense", "cut", "recalibrated", "accuracy")
                ]
                few = "" if len(of) == seeds else f", {len(of)} of {seeds} seeds"
                macs, params = (statistics.mean(r.figures[key] for r in of) for key in ("macs_ratio", "params"))
                took = statistics.mean(sum(r.seconds.values()) for r in of)
                cells = [f"{macs:.4f}", f"{params / 1e3:.0f}k", *accuracies[:-1], accuracies[-1] + few]
                rows.append([f"{ratio:g}", method, *cells, str(of[0].figures["epochs"]), f"{took:.0f}"])
    numbers = ("MACs used", "parameters", "adapted", "cut", "norms anew", "trained", "epochs", "seconds")
    return table({"MACs": "---:", "method": "---", **dict.fromkeys(numbers, "---:")}, rows)


def told(record: Record) -> str:
    """What is said of a run when it comes in."""
    f = record.figures
    if "accuracy" not in f:
        return f"{record.name}: {'; '.join(record.failures.values())}"
    before = "".join(f"{100 * f[key]:.2f} -> " for key in ("cut", "recalibrated") if key in f)
    seconds = " + ".join(f"{s:.0f}" for s in record.seconds.values())
    after = f"{100 * f['accuracy']:.2f} % at {f['macs_ratio']:.4f}"
    return f"{record.name}: {before}{after}, {f['epochs']} epochs, {seconds} s"
