"""Prune, save, load in a new process, export, run: twelve real networks give identical outputs on the way.

    python -m model_zoo.roundtrip                     the 12, to model_zoo/results/roundtrip.jsonl and .md
    python -m model_zoo.roundtrip timm:resnet50       some
    python -m model_zoo.roundtrip --resume            those without a passing line in the file

A network with random weights is pruned to half its MACs; a few weights are changed afterwards, as fine-tuning would.
The file that ``fxprune.save`` writes is loaded in a new process into an instance with other weights: every tensor and
the outputs at another batch size must be the same, bit for bit. There the loaded network is exported, and onnxruntime
compared. The ``.pt2`` file is loaded and run without the class.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.errors import ConversionError
from fxprune.recording.inputs import describe_inputs, make_inputs, tensors_of
from fxprune.verification import relative_error
from model_zoo.checks import ONNX_TOLERANCE, SAME, randomise
from model_zoo.networks import example_inputs, load
from model_zoo.records import RESULTS, Record, append, begin, read

NETWORKS = (
    *(
        f"timm:{name}"
        for name in """
        resnet50 resnext50_32x4d densenet121 efficientnet_b0 mobilenetv3_large_100 regnety_008 convnext_tiny
        vit_small_patch16_224 swin_tiny_patch4_window7_224 mobilevit_s
        """.split()
    ),
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:deeplabv3_resnet50",
)
OUT = RESULTS / "roundtrip.jsonl"
OTHER_BATCH = 3
TIMEOUT = 1800  # seconds


def measure(spec: str, flops: float = 0.5, method: str = "l2") -> Record:
    """The whole way of one network; never raises."""
    record = Record(spec)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _stage(record, "prune and save", lambda: _write(spec, folder, record.figures, flops, method))
        if not record.failures:
            _stage(record, "new process", lambda: _told(spec, folder, record))
    return record


def _stage(record: Record, name: str, work: Callable[[], None]) -> None:
    """Time it; what it raises becomes the reason why the check of this name fails."""
    start = time.perf_counter()
    record.checks[name] = ""
    try:
        work()
    except Exception as error:
        record.checks[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    record.seconds[name] = round(time.perf_counter() - start, 2)


def _write(spec: str, folder: Path, figures: dict[str, Any], flops: float, method: str) -> None:
    torch.manual_seed(0)
    model = load(spec).eval()
    args, kwargs = example_inputs(model)
    inputs = describe_inputs(args, kwargs)
    randomise(model, inputs)
    small = fxprune.prune(model, args, example_kwargs=kwargs, flops=flops, method=method, progress=False)
    report = small.meta["fxprune"]
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    small.eval()
    for suffix in ("safetensors", "pt2"):
        fxprune.save(small, folder / f"small.{suffix}")
        figures[f"{suffix}_mb"] = round((folder / f"small.{suffix}").stat().st_size / 1e6, 1)
    try:
        fxprune.into(model, small)
        figures["original_class"] = ""
    except ConversionError as error:
        figures["original_class"] = str(error)
    figures |= {"ratio": report.macs_after / report.macs_before, "oracle": report.oracle_error}
    args, kwargs = make_inputs(inputs, batch=OTHER_BATCH, seed=1)
    with torch.no_grad():
        expected = tensors_of(small(*args, **kwargs))
    torch.save({"inputs": (args, kwargs), "expected": expected, "state": small.state_dict()}, folder / "expected.pt")


def _told(spec: str, folder: Path, record: Record) -> None:
    """Run ``_read`` in a new process; its checks and figures go into the record."""
    command = [sys.executable, "-W", "ignore", "-m", "model_zoo.roundtrip", "--read", str(folder), spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    told = Record(**json.loads(done.stdout.splitlines()[-1]))
    record.figures |= told.figures
    record.checks |= told.checks
    record.seconds |= told.seconds


def _read(spec: str, folder: Path) -> Record:
    """What the new process does."""
    record = Record(spec)
    torch.manual_seed(1)
    model = load(spec).eval()
    given = torch.load(folder / "expected.pt", weights_only=True)
    (args, kwargs), expected = given["inputs"], given["expected"]
    loaded: dict[str, Any] = {}

    def outputs(module: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors_of(module(*args, **kwargs))

    def same(found: Sequence[torch.Tensor]) -> bool:
        return len(found) == len(expected) and all(map(torch.equal, found, expected))

    def data() -> None:
        small = loaded["small"] = fxprune.load(folder / "small.safetensors", model).eval()
        state = small.state_dict()
        if list(state) != list(given["state"]) or not all(torch.equal(state[n], t) for n, t in given["state"].items()):
            raise AssertionError("a tensor differs")
        if not same(outputs(small)):
            raise AssertionError(f"outputs differ by {relative_error(outputs(small), expected):.1e}")

    def program() -> None:
        found = outputs(fxprune.load(folder / "small.pt2"))
        record.figures["program"] = error = relative_error(found, expected)
        record.figures["program_identical"] = same(found)
        if error > SAME:
            raise AssertionError(f"outputs differ by {error:.1e}")

    def onnx() -> None:
        validation = fxprune.export(loaded["small"], folder / "small.onnx")
        record.figures["onnx"], record.figures["provider"] = validation.max_rel_error, validation.provider
        if validation.max_rel_error > ONNX_TOLERANCE:
            raise AssertionError(f"outputs differ by {validation.max_rel_error:.1e}")

    _stage(record, "loaded: tensors and outputs identical", data)
    _stage(record, "program", program)
    if "small" in loaded:
        _stage(record, "onnxruntime", onnx)
    return record


def table(records: Iterable[Record]) -> str:
    """A markdown table, one line per network."""
    rows = [
        "| network | MACs that stay | .safetensors | .pt2 | loaded in a new process | .pt2 without the class "
        "| ONNX | into the class | prune and save / load / export s | checks |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | --- | ---: | --- |",
    ]
    for record in records:
        f, s, bad = record.figures, record.seconds, record.failures
        loaded = "loaded: tensors and outputs identical"
        alike = "identical" if f.get("program_identical") else f"{f.get('program', float('nan')):.0e}"
        refused = f.get("original_class", "–")
        cells = [
            record.name,
            f"{f.get('ratio', float('nan')):.4f}",
            f"{f.get('safetensors_mb', '–')} MB",
            f"{f.get('pt2_mb', '–')} MB",
            "identical" if record.checks.get(loaded) == "" else "**differs**",
            alike,
            f"{f.get('onnx', float('nan')):.0e}",
            "yes" if refused == "" else "no: " + refused.partition(", at ")[2].partition(". Use")[0],
            " / ".join(f"{s.get(key, float('nan')):.0f}" for key in ("prune and save", loaded, "onnxruntime")),
            "**fails** " + "; ".join(f"{k}: {v}" for k, v in bad.items()) if bad else f"{len(record.checks)} pass",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_page(path: Path) -> None:
    """The result file as a page beside it."""
    head, records = read(path)
    made = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    found = list(records.values())
    identical = sum(r.figures.get("program_identical", False) for r in found)
    lines = [
        f"- {sum(r.passed for r in found)} of {len(found)} networks pass every check: of a network that was pruned, "
        "changed as by fine-tuning, saved, and loaded in a new process, all tensors and outputs are bit for bit those "
        "from before.",
        f"- The outputs of the program without the class are bit for bit the same in {identical} of {len(found)}.",
    ]
    missing = [spec for spec in NETWORKS if spec not in records]
    if missing and len(records) > len(NETWORKS) // 2:
        lines.insert(0, f"- Not run yet: {', '.join(missing)}.")
    errors = [r.figures["onnx"] for r in found if "onnx" in r.figures]
    if errors:
        providers = ", ".join(sorted({r.figures["provider"] for r in found if "provider" in r.figures}))
        lines.append(f"- onnxruntime ({providers}) and the loaded network differ by {max(errors):.0e} at most.")
    path.with_suffix(".md").write_text(
        "\n\n".join([f"# {head['command']}", made, "\n".join(lines), table(found)]) + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m model_zoo.roundtrip", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="timm:NAME or torchvision:NAME (default: the 12)")
    parser.add_argument("--out", type=Path, default=OUT, help="result file, one JSON object per line")
    parser.add_argument("--resume", action="store_true", help="keep the file, run what has no passing line in it")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.read:
        print(json.dumps(asdict(_read(options.names[0], options.read))))
        return 0
    records: dict[str, Record] = {}
    if options.resume and options.out.exists():
        records = read(options.out)[1]
    else:
        begin(options.out, " ".join(["python -m model_zoo.roundtrip", *options.names]))
    for spec in options.names or NETWORKS:
        if spec in records and records[spec].passed:
            continue
        records[spec] = measure(spec)
        append(options.out, records[spec])
        write_page(options.out)
        print(f"{spec}: {records[spec].failures or 'ok'}", flush=True)
    return 1 if any(not record.passed for record in records.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
