"""Networks of five libraries, pruned and exported: of how many there is an ONNX file that computes what they do.

Every network is pruned to 0.6 of its MACs (l2), or to the smallest ratio that can be reached, which is recorded.
``fxprune.export`` writes the ONNX file and compares it with torch in onnxruntime: fresh inputs, and other batch sizes
where the network runs at others. Nothing is excused: what torch.onnx cannot write counts as what fxprune cannot.
Every network runs in a process of its own, within limits of time and memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import fxprune
from model_zoo.networks.libraries import LEFT_OUT, PRELOAD, group_option, names
from model_zoo.pages import field
from model_zoo.records import Record, Results, stage
from model_zoo.studies.field import FLOPS, METHOD
from model_zoo.study import Options, Study, each, rules


def measure(spec: str, options: Options) -> Record:
    """One network; never raises."""
    from model_zoo.checks.places import pruned_to
    from model_zoo.networks import libraries

    record = Record(spec, {"group": spec.partition(":")[0]})
    with stage(record, "load"):
        subject = libraries.load(spec)
    if not record.failures:
        with stage(record, "prune"):
            pruned, ratio = pruned_to(subject, FLOPS, METHOD)
            record.figures |= {"smallest": ratio} if ratio != FLOPS else {}
    if not record.failures:
        with stage(record, "export"), tempfile.TemporaryDirectory() as folder:
            args, kwargs = subject.example()
            file = fxprune.export(pruned, Path(folder) / "pruned.onnx", args, kwargs, provider="CPUExecutionProvider")
            record.figures |= {"error": file.max_rel_error, "batches": file.batches, "opset": file.opset}
    return record


def page(results: Results) -> Sequence[str]:
    errors = [record.figures["error"] for record in results.lines if "error" in record.figures]
    fixed = sorted(record.name for record in results.lines if len(record.figures.get("batches", ())) == 1)
    told = [f"Outputs differ by {max(errors):.0e} at most, relative to the largest."] if errors else []
    told += [f"Of one batch size, as the pruned network is: {', '.join(fixed)}."] if fixed else []
    return [*told, *field.page(results)]


STUDY = Study(
    "exported", "networks of five libraries, pruned, exported to ONNX and run; two hours",
    lambda options: names(options.group), each(measure), page,
    options=group_option,
    needs=(LEFT_OUT,), doc=__doc__, rules=rules(__doc__),
    open=True, strict=True, apart=True, jobs=True, timeout=600, memory=16, preload=PRELOAD,
)  # fmt: skip
