"""One network, pruned by fxprune and by Torch-Pruning, and what that takes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.deploy.stopwatch import bench
from fxprune.recording import record
from model_zoo import networks
from model_zoo.measuring.meter import Meter
from model_zoo.peers import prune_once

BUDGET = 0.5  # of the MACs, where the peer's result says nothing


class Bench:
    """One network, and what is timed on it; the peer prunes this share of its channels."""

    def __init__(self, spec: str, channels: float):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = networks.load(spec).eval()
        self.args, self.kwargs = networks.example_inputs(self.model)
        self.channels, self.budget = channels, BUDGET
        self.graph: Any = None

    def forward(self) -> dict[str, Any]:
        with torch.no_grad():
            self.model(*self.args, **self.kwargs)
            with Meter() as meter:
                self.model(*self.args, **self.kwargs)
        return meter.figures()

    def peer(self) -> dict[str, Any]:
        """The MACs of its network become our budget; why there are none, if it does not run."""
        model = copy.deepcopy(self.model)
        with Meter() as meter:
            pruned = prune_once(model, self.args[0], self.channels)
        try:
            macs = fxprune.analyze(pruned, self.args, example_kwargs=self.kwargs).macs()
        except fxprune.FxpruneError as error:
            return {**meter.figures(), "fails": str(error)[:300]}
        if self.graph is None:
            self.graph = fxprune.analyze(self.model, self.args, example_kwargs=self.kwargs)
            self.budget = min(1.0, macs / self.graph.macs())
        return {**meter.figures(), "macs": macs}

    def ours(self, verify: bool = False) -> dict[str, Any]:
        how: dict[str, Any] = {"flops": self.budget, "round_to": 1, "verify": verify, "progress": False}
        with Meter() as meter:
            pruned = fxprune.prune(self.model, self.args, example_kwargs=self.kwargs, **how)
        report, self.kept = pruned.meta["fxprune"], pruned
        done = {"macs": report.macs_after, "dense_macs": report.macs_before, "stages": report.seconds}
        return {**meter.figures(), **done}

    def floor(self) -> dict[str, Any]:
        """A recorded run without data, and a copy of the weights that stay."""
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

        def beside(pruned: nn.Module) -> Any:
            return bench(self.model, pruned, self.args, provider="CPUExecutionProvider", threads=1)

        peer = prune_once(copy.deepcopy(self.model), self.args[0], self.channels)
        ours, theirs = beside(self.kept), beside(peer)
        return {"dense_ms": ours.dense_ms, "ours_ms": ours.pruned_ms, "peer_ms": theirs.pruned_ms}
