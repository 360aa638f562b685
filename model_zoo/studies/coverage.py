"""Networks pruned to half their MACs, with everything checked that fxprune promises of the result.

What is checked: ``model_zoo/checks``. Every network runs in a process of its own, with a limit of time and memory:
one that fails loses nothing. ``NETWORK@PART`` prunes a submodule in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from model_zoo.networks import NETWORKS, everything, families, read_list, torchvision
from model_zoo.pages.coverage import page
from model_zoo.records import Record
from model_zoo.study import Add, Options, Study, each, passed

PRELOADED = ("torchvision", "timm", "onnxscript", "torch.onnx", "fxprune.api", "fxprune.deploy", "model_zoo.checks")


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
