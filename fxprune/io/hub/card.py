"""The model card: what was pruned, what stays, how it was checked, how to load it, how to make it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.errors import InputError, is_real
from fxprune.io.text import quantity
from fxprune.reports.report import Latency, Report

Accuracy = Mapping[str, Any]  # what was measured -> of the pruned network, or of the dense and the pruned one


@dataclass(frozen=True)
class Figures:
    """What a report does not know: ``accuracy`` by name, ``latency``, ``validation`` from ``fxprune.export``, and the
    ``command`` that made the network."""

    accuracy: Accuracy
    latency: Latency | None
    validation: Any
    command: str


def check_accuracy(accuracy: Any) -> Accuracy:
    """Raises:
    InputError: it is something else than names and numbers, or one of these says nothing.
    """
    given = {} if accuracy is None else accuracy
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and _pair(v) for name, v in given.items()):
        raise InputError(
            f"accuracy={accuracy!r} must be a dict of what was measured: {{'ImageNet top-1': 80.6}}, or with the dense "
            "network's before it, {'ImageNet top-1': (81.2, 80.6)}."
        )
    for name, value in given.items():
        bad = [number for number in _pair(value) or () if number is not None and not math.isfinite(number)]
        if bad:
            raise InputError(f"accuracy={accuracy!r}: {name!r} is {bad[0]}, which is no result; leave it out.")
    return given


def _pair(value: Any) -> tuple[Any, Any] | None:
    if is_real(value):
        return None, value
    two = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2 and all(map(is_real, value))
    return (value[0], value[1]) if two else None


@dataclass(frozen=True)
class Loader:
    """What of transformers loads a network: ``autos``, its auto classes; ``code``: with the code in the folder."""

    autos: Sequence[str]
    code: bool


def card(report: Report, figures: Figures, versions: Mapping[str, str], name: str, loader: Loader | None) -> str:
    """The page, in Markdown.

    Args:
        report: of the pruning.
        figures: what else was measured.
        versions: of packages.
        name: of the folder or repository.
        loader: of a network of transformers.
    """
    library = "fxprune" if loader is None else "transformers"
    parts = [
        f"---\nlibrary_name: {library}\ntags:\n- fxprune\n- pruning\n---",
        f"# {report.model}, pruned",
        f"A smaller {report.model}: channels were cut by fxprune, method `{report.method}`{_asked(report)}"
        f"{_before(report)}. What stays of every layer is in `plan.json`.",
        _table(report, figures),
        "MACs: multiply-accumulates of one forward pass on the example inputs, as `torch.utils.flop_counter` counts.",
        "## Checked",
        "\n".join(f"- {line}" for line in _checks(report, figures.validation)),
        "## Use",
        _use(report.model, name, loader),
        "## Make it again",
        _again(report, figures.command),
        "Versions: " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _asked(report: Report) -> str:
    return "" if report.budget is None else ", budget `{}={:g}`".format(*report.budget)


def _before(report: Report) -> str:
    times = len(report.plan.steps) - 1
    return f", of a network that had been pruned before ({times}x), against which the figures are" if times else ""


def _table(report: Report, figures: Figures) -> str:
    rows = [
        (what, quantity(before), quantity(after), f"{after / before:.1%}" if before else "")
        for what, before, after in (
            ("MACs", report.macs_before, report.macs_after),
            ("parameters", report.params_before, report.params_after),
        )
    ]
    latency = figures.latency or report.latency
    if latency is not None:
        where = f"{latency.device}, {latency.provider}, batch size {latency.batch}"
        what = f"milliseconds ({where}, {latency.version})"
        rows.append((what, f"{latency.dense_ms:.2f}", f"{latency.pruned_ms:.2f}", f"{latency.ratio:.1%}"))
    for what, value in figures.accuracy.items():
        dense, pruned = _pair(value) or (None, None)
        rows.append(
            (" ".join(what.split()).replace("|", "\\|"), "–" if dense is None else f"{dense:g}", f"{pruned:g}", "")
        )
    lines = [f"| | {'dense' if report.plan.earlier is None else 'before'} | pruned | stays |", "|---|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _checks(report: Report, validation: Any) -> list[str]:
    error, double = report.oracle_error, report.oracle_error_in_double
    lines = ["The pruned network was not compared with the masked original."]
    if error is not None and report.oracle_compared == "numbers":
        more = "" if double is None else f", {double:.1e} in double"
        lines = [f"The pruned network computes what the masked original does: relative error {error:.1e}{more}."]
    if report.proof is not None:
        lines += [f"{' '.join(line.split())}." for line in report.proof.lines()]
    if report.reconstruction is not None:
        lines.append(f"Weights were refitted to what the dense network computes: {report.reconstruction.summary}.")
    if validation is None:
        return [*lines, "onnxruntime: not run."]
    return [
        *lines,
        f"onnxruntime {validation.onnxruntime_version}, opset {validation.opset}: error {validation.max_abs_error:.1e} "
        f"absolute, {validation.max_rel_error:.1e} relative, against torch.",
    ]


def _use(model: str, name: str, loader: Loader | None) -> str:
    if loader is None:
        dense = f"dense = ...  # a fresh, unpruned {model}, with any weights"
        return _python("import fxprune", "", dense, f'network = fxprune.load_pretrained("{name}", dense)')
    trusted = ", trust_remote_code=True" if loader.code else ""
    ways = [
        _python(f"from transformers import {auto}", "", f'network = {auto}.from_pretrained("{name}"{trusted})')
        for auto in loader.autos[:1]
    ]
    ways.append(_python("import fxprune", "", f'network = fxprune.load_pretrained("{name}")'))
    return f"\n\nor, {'without the code in this folder' if loader.code else 'the same'}:\n\n".join(ways)


def _again(report: Report, command: str) -> str:
    budget = "" if report.budget is None else ", {}={:g}".format(*report.budget)
    call = f'small = fxprune.prune(dense, example_inputs, method="{report.method}"{budget})'
    made = f"```sh\n{command}\n```" if command else _python(call) if report.plan.earlier is None else ""
    exact = 'small = fxprune.apply(dense, fxprune.PruningPlan.load("plan.json"), example_inputs)'
    return f"{made}\n\nThe same channels of any weights:\n\n{_python(exact)}".lstrip()


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
