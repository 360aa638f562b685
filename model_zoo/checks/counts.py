"""MACs and parameters: counted by torch, promised by the report, asked for by the budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxprune.recording.inputs import make_inputs
from model_zoo.checks.case import Case, check

BUDGET_SLACK = 0.01


def count_macs(module: nn.Module, args: Any, kwargs: Any) -> int:
    """Multiply-accumulates by torch's own counter, which counts two operations for each.

    It counts nothing of the fused kernels of nn.MultiheadAttention in eval mode and of LSTMs on the CPU, and in some
    versions nothing of attention's: they are switched off.
    """
    learned = [p for p in module.parameters() if p.requires_grad]  # the counter trips over a parameter that is an input
    fused, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    module.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.backends.mkldnn.enabled = onednn
        for parameter in learned:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


@check("macs")
def _macs(case: Case) -> str:
    """Our count is torch's, of the model, its recording and the pruned module; parameters likewise."""
    report, inputs = case.report, make_inputs(case.inputs)
    counted = {name: count_macs(getattr(case, name), *inputs) for name in ("model", "dense", "pruned")}
    parameters = {name: sum(p.numel() for p in getattr(case, name).parameters()) for name in ("model", "pruned")}
    case.figures |= {
        "macs_before": counted["dense"],
        "macs_after": counted["pruned"],
        "ratio": counted["pruned"] / counted["dense"],
        "params_before": parameters["model"],
        "params_after": parameters["pruned"],
    }
    promised = (report.macs_before, report.macs_before, report.macs_after, report.params_before, report.params_after)
    found = (*counted.values(), *parameters.values())
    return "" if found == promised else f"counted {found} in model, dense, pruned; the report says {promised}"


@check("budget")
def _budget(case: Case) -> str:
    """At or under the budget, and within 1 % of it."""
    return outside_budget(case.figures["ratio"], case.flops)


def outside_budget(ratio: float, flops: float) -> str:
    if (1 - BUDGET_SLACK) * flops <= ratio <= flops:
        return ""
    return f"{ratio:.4f} of the MACs stay; the budget is {flops}"
