"""The 24 networks on a GPU: pruned there, exported in float32 and float16, compared with torch on it, and timed.

    python -m model_zoo.gpu_check                     the 24, to model_zoo/results/gpu.json and gpu.md
    python -m model_zoo.gpu_check timm:resnet50       some
    python -m model_zoo.gpu_check --resume            those without a passing entry in the file
    python -m model_zoo.gpu_check --jobs 8            eight at a time are pruned and exported; timed is one alone

Without a GPU that torch and onnxruntime both work on, the command says so, writes nothing, and ends with exit code 2.
A network with random weights is pruned to half its MACs on the GPU. Dense and pruned network are exported, and
onnxruntime's CUDA provider must give what torch gives on the same GPU. Then both are timed in turn at several batch
sizes, inputs and outputs on the device; a latency is the median of three medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.deploy.runtime import CUDA, Session
from fxprune.errors import FxpruneError
from fxprune.recording.inputs import describe_inputs, make_inputs, map_leaves, tensors_of
from model_zoo.checks import randomise
from model_zoo.networks import NETWORKS, example_inputs, load
from model_zoo.records import RESULTS, Record, header, markdown

OUT = RESULTS / "gpu.json"
BATCHES = (1, 32, 128)
DTYPES = ("float32", "float16")
KINDS = ("dense", "pruned")
ROUNDS, LEAST, SECONDS = 3, 10, 0.2  # rounds, and at least so many runs and seconds in each
EXIT_NO_GPU = 2


@dataclass(frozen=True)
class Place:
    """Where to check. ``device``: of torch; ``provider``: of onnxruntime, on the same device."""

    device: str = "cuda"
    provider: str = CUDA

    def why_not(self) -> str:
        """Why nothing can be checked here, or ""."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        try:
            with tempfile.TemporaryDirectory() as folder:
                given = torch.randn(1, 4, device=self.device)
                fxprune.export(nn.Linear(4, 4).to(self.device), Path(folder) / "a.onnx", given, provider=self.provider)
        except FxpruneError as error:
            return str(error)
        return ""

    def described(self) -> dict[str, str]:
        """The device, by the name that its maker gave it."""
        if self.device != "cuda":
            return {"device": self.device, "provider": self.provider}
        return {"device": torch.cuda.get_device_name(), "provider": self.provider, "cuda": str(torch.version.cuda)}


def prepare(spec: str, place: Place, folder: Path, flops: float = 0.5, method: str = "l2") -> Record:
    """One network, pruned, exported into a folder, and checked there; never raises."""
    record = Record(spec)
    networks: dict[str, nn.Module] = {}
    _stage(record, "prune", lambda: networks.update(_networks(spec, place, record, flops, method)))
    for dtype in DTYPES if networks else ():
        for kind, network in networks.items():
            _stage(record, f"{kind} {dtype}", _exported(network, folder, kind, dtype, place, record))
    return record


def clock(record: Record, place: Place, folder: Path, batches: Sequence[int] = BATCHES) -> None:
    """Latencies of what ``prepare`` left in the folder, where both networks are right; never raises."""
    inputs = record.figures.pop("inputs", None)
    for dtype in DTYPES:
        if all(record.checks.get(f"{kind} {dtype}", "not run") == "" for kind in KINDS):
            for batch in batches:
                _stage(record, f"latency {dtype} {batch}", _timed(folder, place, inputs, batch, dtype, record))


def _stage(record: Record, name: str, work: Callable[[], None]) -> None:
    """What it raises becomes the reason why the check of this name fails."""
    record.checks[name] = ""
    try:
        work()
    except Exception as error:  # out of memory too: a table with a hole is worth having
        record.checks[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _networks(spec: str, place: Place, record: Record, flops: float, method: str) -> dict[str, nn.Module]:
    """Dense and pruned, both as recorded graphs, on the device."""
    torch.manual_seed(0)
    model = load(spec).eval()
    args, kwargs = example_inputs(model)
    inputs = record.figures["inputs"] = describe_inputs(args, kwargs)
    randomise(model, inputs)
    model.to(place.device)
    args, kwargs = map_leaves(lambda v: v.to(place.device) if isinstance(v, torch.Tensor) else v, (args, kwargs))
    dense = fxprune.record(model, args, kwargs)
    small = fxprune.prune(model, args, example_kwargs=kwargs, flops=flops, method=method, progress=False)
    report = small.meta["fxprune"]
    record.figures |= {"ratio": report.macs_after / report.macs_before, "oracle": report.oracle_error}
    return {"dense": dense, "pruned": small}


def _exported(
    network: nn.Module, folder: Path, kind: str, dtype: str, place: Place, record: Record
) -> Callable[[], None]:
    def work() -> None:
        path = _file(folder, kind, dtype)
        found = fxprune.export(network, path, provider=place.provider, half=dtype == "float16")
        record.figures.setdefault("onnx", {}).setdefault(dtype, {})[kind] = found.max_rel_error

    return work


def _file(folder: Path, kind: str, dtype: str) -> Path:
    return folder / f"{kind}-{dtype}.onnx"


def _timed(
    folder: Path, place: Place, inputs: Mapping[str, Any], batch: int, dtype: str, record: Record
) -> Callable[[], None]:
    def work() -> None:
        sessions = {kind: Session(_file(folder, kind, dtype), place.provider) for kind in KINDS}
        tensors = tensors_of(make_inputs(inputs, batch=batch))
        tensors = [t.to(getattr(torch, dtype)) if t.is_floating_point() else t for t in tensors]
        times: dict[str, list[float]] = {kind: [] for kind in sessions}
        for _ in range(ROUNDS):
            for kind, session in sessions.items():
                times[kind].append(session.latency_ms(tensors, SECONDS, least=LEAST))
        latencies = record.figures.setdefault("latency_ms", {}).setdefault(dtype, {})
        latencies[str(batch)] = {kind: round(statistics.median(found), 4) for kind, found in times.items()}

    return work


def write(path: Path, head: Mapping[str, Any], records: Mapping[str, Record]) -> None:
    """All that was found, as JSON and as a page beside it."""
    data = {**head, "networks": [asdict(record) for record in records.values()]}
    path.write_text(json.dumps(data, indent=1) + "\n")
    made = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    passed = sum(record.passed for record in records.values())
    lines = [f"# {head['command']}", made, f"- {passed} of {len(records)} networks pass every check.", table(records)]
    path.with_suffix(".md").write_text("\n\n".join(lines) + "\n")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    """What ``write`` wrote."""
    data = json.loads(path.read_text())
    return data, {entry["name"]: Record(**entry) for entry in data.pop("networks")}


def table(records: Mapping[str, Record]) -> str:
    """A markdown table, one line per network: errors of the pruned one, latencies of both."""
    columns = {
        (dtype, batch): None
        for record in records.values()
        for dtype, found in record.figures.get("latency_ms", {}).items()
        for batch in found
    }
    head = ["network", "MACs that stay", *(f"{dtype}: error" for dtype in DTYPES)]
    head += [f"{dtype}, batch {batch}: dense → pruned ms" for dtype, batch in columns]
    rows = [head, ["---", *["---:"] * (len(head) - 1), "---"]]
    for record in records.values():
        f = record.figures
        errors = [f.get("onnx", {}).get(dtype, {}).get("pruned", float("nan")) for dtype in DTYPES]
        cells = [record.name, f"{f.get('ratio', float('nan')):.4f}", *(f"{error:.0e}" for error in errors)]
        for dtype, batch in columns:
            pair = f.get("latency_ms", {}).get(dtype, {}).get(batch)
            cells.append(
                f"{pair['dense']:.2f} → {pair['pruned']:.2f} ({pair['pruned'] / pair['dense']:.2f})" if pair else "–"
            )
        bad = "; ".join(f"{name}: {why}" for name, why in record.failures.items()).replace("|", "\\|")
        rows.append([*cells, f"**fails** {bad}" if bad else f"{len(record.checks)} pass"])
    rows[0].append("checks")
    return markdown(rows)


def run(
    specs: Sequence[str],
    out: Path,
    command: str,
    place: Place,
    batches: Sequence[int] = BATCHES,
    resume: bool = False,
    jobs: int = 1,
) -> int:
    """Check the networks at a place, and write what was found after each; the exit code of the command.

    ``jobs``: so many are pruned and exported at a time, each in a process of its own, before they are timed in turn.
    """
    reason = place.why_not()
    if reason:
        print(f"gpu_check: nothing can be checked here, and nothing was written: {reason}", file=sys.stderr)
        return EXIT_NO_GPU
    head: dict[str, Any] = {**header(command), **place.described()}
    records: dict[str, Record] = {}
    if resume and out.exists():
        before, records = read(out)
        if before["device"] != head["device"]:
            print(f"gpu_check: {out} is of another device, {before['device']}; give another --out", file=sys.stderr)
            return EXIT_NO_GPU
        head = before
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = [spec for spec in specs if spec not in records or not records[spec].passed]
    for start in range(0, len(todo), jobs):
        with tempfile.TemporaryDirectory() as name:
            for number, (folder, record) in enumerate(_prepared(todo[start : start + jobs], place, Path(name), jobs)):
                clock(record, place, folder, batches)
                spec = todo[start + number]
                records[spec] = record
                write(out, head, records)
                print(f"{spec}: {record.failures or 'ok'}", flush=True)
    return 1 if any(not record.passed for record in records.values()) else 0


def _prepared(specs: Sequence[str], place: Place, root: Path, jobs: int) -> list[tuple[Path, Record]]:
    folders = [root / str(number) for number in range(len(specs))]
    for folder in folders:
        folder.mkdir()
    places = [place] * len(specs)
    if jobs == 1:
        return [*zip(folders, map(prepare, specs, places, folders), strict=True)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [*zip(folders, pool.map(prepare, specs, places, folders), strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a check failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m model_zoo.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="timm:NAME or torchvision:NAME (default: the 24)")
    parser.add_argument("--out", type=Path, default=OUT, help="result file (default: model_zoo/results/gpu.json)")
    parser.add_argument("--resume", action="store_true", help="keep the file, run what has no passing entry in it")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes to time (1 32 128)")
    parser.add_argument("--jobs", type=int, default=1, help="networks to prune and export at a time (1)")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    command = " ".join(["python -m model_zoo.gpu_check", *options.names])
    return run(options.names or NETWORKS, options.out, command, Place(), options.batches, options.resume, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
