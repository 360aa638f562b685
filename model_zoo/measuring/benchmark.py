"""fxprune and its peer in turn, in a process of their own: seconds and memory."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from model_zoo.records import Record

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
