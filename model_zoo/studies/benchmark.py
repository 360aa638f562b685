"""Seconds from a model to its pruned model: fxprune and Torch-Pruning on the same networks, in turn.

Every network has a process of its own, in which both run in turn on fresh copies of it, on one thread. Given are the
medians, of the time on the clock and of the processor time of the process, which what else runs on the machine disturbs
less. Torch-Pruning prunes 30 % of the channels by their Euclidean norm over the whole network (building its graph and
pruning once, in place); fxprune is then given the MACs that it reached as its budget, with ``method="l2"``,
``round_to=1`` and ``verify=False``: what the verification adds is a column of its own. Where Torch-Pruning's network
does not run, or ``--timeout`` ends it, fxprune's budget is half of the MACs.

*Floor* is what cannot be avoided: one recorded run without data (on the meta device) and a copy of the weights that
stay. *Forward* is one run of the dense network on the processor. *Memory* is the most that the process held above what
it held before. *MACs* are those of the results, as counted by ``fxprune.analyze``.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from model_zoo.records import Record, Results, bullets, number, table
from model_zoo.study import Add, Study, each

NETWORKS = [
    f"timm:{name}"
    for name in """
    resnet50 resnet152 densenet201 mobilenetv3_large_100 efficientnet_b4 convnext_base inception_v4 hrnet_w32
    resnest50d vgg16_bn
    """.split()
]
CHANNELS = 0.3  # the share that the peer prunes; about half of the MACs go
BUDGET = 0.5  # of the MACs, where the peer's result says nothing
START = 120  # seconds for a process to load a network


class Meter:
    """Seconds on the clock and of the processor, and the most memory, of what runs inside."""

    def __enter__(self) -> Meter:
        gc.collect()
        self._before = _reset_peak()
        self._cpu, self._clock = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.clock, self.cpu = time.perf_counter() - self._clock, time.process_time() - self._cpu
        self.mib = (_status("VmHWM") - self._before) / 1024

    def figures(self) -> dict[str, float]:
        return {"s": self.clock, "cpu_s": self.cpu, "mib": self.mib}


def _status(field: str) -> int:
    """A line of ``/proc/self/status`` in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _reset_peak() -> int:
    """Let the kernel count the process's peak memory anew; what it holds now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


class Bench:
    """One network, and what is timed on it."""

    def __init__(self, spec: str):
        import torch

        from model_zoo.networks import example_inputs, load

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = load(spec).eval()
        self.args, self.kwargs = example_inputs(self.model)
        self.budget = BUDGET
        self.graph: Any = None

    def forward(self) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            self.model(*self.args, **self.kwargs)
            with Meter() as meter:
                self.model(*self.args, **self.kwargs)
        return meter.figures()

    def peer(self) -> dict[str, Any]:
        from model_zoo.peers import prune_once

        model = copy.deepcopy(self.model)
        with Meter() as meter:
            pruned = prune_once(model, self.args[0], CHANNELS)
        return {**meter.figures(), **self._result(pruned)}

    def ours(self, verify: bool = False) -> dict[str, Any]:
        import fxprune

        with Meter() as meter:
            pruned = fxprune.prune(
                self.model, self.args, example_kwargs=self.kwargs, flops=self.budget, round_to=1, verify=verify,
                progress=False,
            )  # fmt: skip
        report = pruned.meta["fxprune"]
        self.kept = pruned
        return {
            **meter.figures(), "macs": report.macs_after, "dense_macs": report.macs_before, "stages": report.seconds,
        }  # fmt: skip

    def floor(self) -> dict[str, Any]:
        import torch

        from fxprune.recording import record

        model = copy.deepcopy(self.model).to("meta")
        args = tuple(torch.empty_like(a, device="meta") for a in self.args)
        record(model, args, self.kwargs)
        kept = [*self.kept.parameters(), *self.kept.buffers()]
        with Meter() as meter:
            record(model, args, self.kwargs)
            _ = [tensor.detach().clone() for tensor in kept]
        return meter.figures()

    def latency(self) -> dict[str, Any]:
        """Milliseconds of the dense network, of ours and of the peer's at equal MACs."""
        from fxprune.deploy.stopwatch import bench
        from model_zoo.peers import prune_once

        given: Any = {"provider": "CPUExecutionProvider", "threads": 1}
        peer = prune_once(copy.deepcopy(self.model), self.args[0], CHANNELS)
        ours = bench(self.model, self.kept, self.args, **given)
        theirs = bench(self.model, peer, self.args, **given)
        return {"dense_ms": ours.dense_ms, "ours_ms": ours.pruned_ms, "peer_ms": theirs.pruned_ms}

    def _result(self, pruned: Any) -> dict[str, Any]:
        """The MACs of the peer's network, which become our budget; why there are none, if it does not run."""
        import fxprune

        try:
            macs = fxprune.analyze(pruned, self.args, example_kwargs=self.kwargs).macs()
        except fxprune.FxpruneError as error:
            return {"fails": str(error)[:300]}
        if self.graph is None:
            self.graph = fxprune.analyze(self.model, self.args, example_kwargs=self.kwargs)
            self.budget = min(1.0, macs / self.graph.macs())
        return {"macs": macs}


def _work(spec: str, rounds: int, peer: bool, latency: bool, sender: Connection) -> None:
    """Runs in the new process: sends (what, figures) of everything that is done, one after the other."""
    bench = Bench(spec)
    sender.send(("started", {}))

    def step(what: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            sender.send((what, run()))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            sender.send((what, {"fails": f"{type(error).__name__}: {error} ({where})"[:300]}))

    if peer:
        step("peer, first", bench.peer)
    step("ours, first", bench.ours)
    for _ in range(rounds):
        step("ours", bench.ours)
        if peer:
            step("peer", bench.peer)
        step("forward", bench.forward)
        step("floor", bench.floor)
    step("verified", lambda: bench.ours(verify=True))
    if latency:
        step("latency", bench.latency)


def measured(spec: str, rounds: int, timeout: float, latency: bool = False, work: Any = _work) -> Record:
    """One network. A peer that takes longer than ``timeout`` seconds is ended, and ours goes on without it."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    ended = ""
    if not _run(work, (spec, rounds, True, latency), timeout, found):
        ended = f"no end within {timeout:g} s"
        done = len(found["ours"])
        if done < rounds:
            _run(work, (spec, rounds - done, False, False), timeout, found)
    figures: dict[str, Any] = {"channels": CHANNELS}
    for what in ("ours", "peer", "forward", "floor"):
        good = [f for f in found[what] if "s" in f]
        for key in ("s", "cpu_s"):
            if good:
                figures[f"{what}_{key}"] = statistics.median(f[key] for f in good)
        held = [f["mib"] for f in (*found[what], *found[f"{what}, first"]) if "mib" in f]
        if held:  # later runs are given memory that the process has already
            figures[f"{what}_mib"] = max(held)
    for what in ("ours", "peer"):
        said: dict[str, Any] = next((f for f in reversed(found[what] or found[f"{what}, first"])), {})
        figures |= {f"{what}_{key}": said[key] for key in ("macs", "dense_macs", "fails", "stages") if key in said}
    if ended:
        figures["peer_fails"] = ended
    figures |= {"runs": len(found["ours"]), "verified_s": found["verified"][0].get("s") if found["verified"] else None}
    figures["first_s"] = found["ours, first"][0].get("s") if found["ours, first"] else None
    figures |= found["latency"][0] if found["latency"] else {}
    return Record(spec, figures)


def _run(work: Any, given: tuple[Any, ...], timeout: float, found: dict[str, list[dict[str, Any]]]) -> bool:
    """Let a new process work, and take down what it sends; whether it came to its end."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*given, sender), daemon=True)
    process.start()
    sender.close()
    limit = timeout + START
    try:
        while receiver.poll(limit):
            what, figures = receiver.recv()
            found[what].append(figures)
            limit = timeout
    except EOFError:
        return True
    finally:
        process.kill()
        process.join()
        receiver.close()
    return False


# -- the page ---------------------------------------------------------------------------------------------------------


def page(results: Results) -> Sequence[str]:
    lines = results.lines
    parts = [(__doc__ or "").split("\n\n", 1)[1].strip(), _table(lines), _verdict(lines)]
    if timed := [r for r in lines if "ours_ms" in r.figures]:
        rows = ([r.name, *(f"{r.figures[key]:.2f}" for key in ("dense_ms", "ours_ms", "peer_ms"))] for r in timed)
        heads = ["network", "dense ms", "fxprune ms", "Torch-Pruning ms"]
        parts += ["## Latency in onnxruntime at equal MACs", table(heads, rows)]
    if fails := [f"{r.name}: {r.figures['peer_fails']}" for r in lines if "peer_fails" in r.figures]:
        parts += ["## Where Torch-Pruning gives no network", bullets(fails)]
    return [*parts, results.image("seconds of both")]


def _table(records: Sequence[Record]) -> str:
    columns = [
        "network", "forward s", "floor s", "fxprune s", "Torch-Pruning s", "ratio", "in processor time",
        "fxprune / floor", "verified s", "MiB fxprune", "MiB Torch-Pruning", "MACs fxprune", "MACs Torch-Pruning",
    ]  # fmt: skip
    rows = []
    for record in records:
        f = record.figures
        rows.append([
            record.name,
            *(_pair(f, what) for what in ("forward", "floor", "ours", "peer")),
            _quotient(f, "ours_s", "peer_s"), _quotient(f, "ours_cpu_s", "peer_cpu_s"),
            _quotient(f, "ours_cpu_s", "floor_cpu_s"), number(f.get("verified_s"), ".3g"),
            *(number(f.get(key), ".0f") for key in ("ours_mib", "peer_mib")),
            *(f"{f[key] / f['ours_dense_macs']:.3f}" if key in f else "–" for key in ("ours_macs", "peer_macs")),
        ])  # fmt: skip
    return table(columns, rows) + "\n\n(In brackets: processor time.)"


def short_table(records: Sequence[Record]) -> str:
    """Seconds of processor time and memory of both, a line per network."""
    rows = []
    for record in records:
        f = record.figures
        seconds, mib = ([f.get(f"{who}_{what}") for who in ("ours", "peer")] for what in ("cpu_s", "mib"))
        cells = [*(number(s, ".3g") for s in seconds), _quotient(f, "ours_cpu_s", "peer_cpu_s")]
        rows.append([record.name.partition(":")[2], *cells, *(number(m, ".0f") for m in mib)])
    return table(["network", "fxprune s", "Torch-Pruning s", "ratio", "fxprune MiB", "Torch-Pruning MiB"], rows)


def _pair(figures: dict[str, Any], what: str) -> str:
    if f"{what}_s" not in figures:
        return "–"
    return f"{figures[f'{what}_s']:.3g} ({figures[f'{what}_cpu_s']:.3g})"


def _quotient(figures: dict[str, Any], top: str, bottom: str) -> str:
    return f"{figures[top] / figures[bottom]:.2f}" if top in figures and bottom in figures else "–"


def _verdict(records: Sequence[Record]) -> str:
    both = [r for r in records if "ours_cpu_s" in r.figures and "peer_cpu_s" in r.figures]
    if not both:
        return ""
    ratios = {r.name: r.figures["ours_cpu_s"] / r.figures["peer_cpu_s"] for r in both}
    slower = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio > 1]
    long = {r.name: ratios[r.name] for r in both if r.figures["peer_cpu_s"] > 10}
    lines = [
        "Ratios of processor time, fxprune to Torch-Pruning, against what was aimed at:",
        f"- never above 1: {'missed by ' + ', '.join(slower) if slower else 'reached'};",
        f"- at most 0.5 at the median: {statistics.median(ratios.values()):.2f};",
        "- at most 0.1 where Torch-Pruning takes more than 10 s: "
        + (", ".join(f"{name} {ratio:.2f}" for name, ratio in long.items()) or "there is none") + ".",
    ]  # fmt: skip
    return "\n".join(lines)


def plot(results: Results) -> None:
    """Seconds of both, of a forward run and of the floor, one row per network."""
    from matplotlib.figure import Figure

    records = [r for r in results.lines if "ours_s" in r.figures]
    figure = Figure(figsize=(8, 1 + 0.45 * len(records)), layout="constrained")
    axes = figure.subplots()
    marks = {
        "peer": ("Torch-Pruning", "s"),
        "ours": ("fxprune", "o"),
        "floor": ("floor", "|"),
        "forward": ("forward", "x"),
    }
    for what, (label, mark) in marks.items():
        points = [(r.figures[f"{what}_cpu_s"], row) for row, r in enumerate(records) if f"{what}_cpu_s" in r.figures]
        if points:
            axes.plot(*zip(*points, strict=True), mark, label=label)
    axes.set(xscale="log", xlabel="seconds of processor time", yticks=range(len(records)))
    axes.set_yticklabels([r.name.partition(":")[2] for r in records])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(results.plot, dpi=120)


def _options(add: Add) -> None:
    add("--rounds", type=int, default=5, help="runs of each, in turn (default: 5)")
    add("--timeout", type=float, default=300, help="seconds for one run (default: 300)")
    add("--latency", action="store_true", help="onnxruntime's latency of both results as well, which is slow")


STUDY = Study(
    "benchmark", "seconds and memory from a model to its pruned model, beside Torch-Pruning", lambda _: NETWORKS,
    each(lambda spec, options: measured(spec, options.rounds, options.timeout, options.latency)), page, plot, _options,
    needs=("torch-pruning",), doc=__doc__, open=True,
)  # fmt: skip
