"""Training: gradients wherever the dense model has them, and what train() and eval() switch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxprune
from fxprune.recording.inputs import make_inputs, tensors_of
from fxprune.verification import relative_error, zero_slices
from model_zoo.checks.case import DIFFERENT, SAME, Case, check, equal
from model_zoo.networks import split_part

MODES_BATCH = 2  # stochastic depth drops whole samples: one alone might stay
DROP = 0.2

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@check("training")
def _training(case: Case) -> str:
    """One step in train mode gives every parameter a finite gradient wherever the dense model's has one.

    It may be zero where that of the masked dense model is, or next to that: all that a small layer has left may be dead
    behind a ReLU. Branches that exist in train mode only (auxiliary classifiers) are not in a recording of eval mode,
    pruned or not: they are listed in the figures.
    """
    original, dense, pruned = (_gradients(case, getattr(case, name)) for name in ("model", "dense", "pruned"))
    case.figures["training_only"] = len(original.keys() - dense.keys())
    case.figures["gradients"] = len(pruned)
    used = {str(node.target) for node in case.dense.graph.nodes if node.op in ("call_module", "get_attr")}
    missing = [name for name in original if name not in pruned and (name in used or name.rpartition(".")[0] in used)]
    missing += [name for name in dense if name not in pruned and name not in missing]
    if missing:
        return f"no gradient for {len(missing)} parameters: {', '.join(missing[:3])}"
    dead = [name for name, grad in pruned.items() if grad.zero and name in dense and not dense[name].zero]
    if dead and (dead := sorted({*dead} & _alive(case))):
        return f"zero gradients for {len(dead)} parameters: {', '.join(dead[:3])}"
    broken = [name for name, grad in pruned.items() if not grad.finite]
    return f"gradients that are not finite: {', '.join(broken[:3])}" if broken else ""


@check("modes")
def _modes(case: Case) -> str:
    """Dropout and stochastic depth react to train() and eval() as in the original.

    The plan is applied to a fresh instance of the network with dropout and stochastic depth switched on where it has
    such options. Norm layers stay in eval, so that nothing else can react.
    """
    model, options = _stochastic(case.spec)
    case.figures["stochastic"] = options
    model.load_state_dict(case.state)
    args, kwargs = make_inputs(case.inputs)
    pruned = fxprune.apply(model.eval(), case.report.plan, args, kwargs)
    error = relative_error(case.run(pruned), case.run(case.pruned))
    if not error <= SAME:
        return f"the plan applied to a fresh instance computes something else: relative error {error:.1e}"
    reactions = {}
    for name, module in (("original", model), ("pruned", pruned)):
        calm = case.run(module.eval(), MODES_BATCH)
        _train_without_norms(module)
        one, again, other = (case.run(module, MODES_BATCH, noise=noise) for noise in (0, 0, 5))
        if not equal(one, again):
            return f"the {name} in train mode differs from run to run with one seed"
        reactions[name] = (_differ(one, calm), _differ(other, calm))
        if not equal(case.run(module.eval(), MODES_BATCH), calm):
            return f"the {name} is not what it was after train() and eval()"
    case.figures["reacts"] = reactions["original"][0]
    if reactions["original"] == reactions["pruned"]:
        return ""
    return f"train and eval differ, original {reactions['original']}, pruned {reactions['pruned']}"


class _Gradient(NamedTuple):
    zero: bool
    finite: bool


def _gradients(case: Case, module: nn.Module) -> dict[str, _Gradient]:
    """Parameter -> what its gradient is like, of the sum of squares, in train mode, batch 2; ``module`` stays as is."""
    module = copy.deepcopy(module)
    _backward(case, module)
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    result = {name: _Gradient(not bool(g.any()), bool(g.isfinite().all())) for name, g in found.items()}
    module.zero_grad()
    return result


def _alive(case: Case) -> set[str]:
    """The parameters whose gradient in the masked dense model is more than what is rounded, in the slices that stay.

    Before a norm a scale has none but for that, and a sum of what was rounded is zero by chance.
    """
    masked = copy.deepcopy(case.dense)
    zero_slices(masked, case.report.plan)
    _backward(case, masked)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    zero_slices(masked, case.report.plan)
    largest = {name: float(g.detach().abs().max()) for name, g in masked.named_parameters() if g.numel()}
    rounded = torch.finfo(torch.float32).eps * max(largest.values(), default=0.0)
    return {name for name, size in largest.items() if size > rounded}


def _backward(case: Case, module: nn.Module) -> None:
    args, kwargs = make_inputs(case.inputs, batch=2)
    torch.manual_seed(0)
    loss = sum(output.square().sum() for output in tensors_of(module.train()(*args, **kwargs)))
    assert isinstance(loss, Tensor)
    loss.backward()


def _stochastic(spec: str) -> tuple[nn.Module, dict[str, float]]:
    """A fresh instance with dropout and stochastic depth where the network has such options, and the options."""
    network, part = split_part(spec)
    library, _, name = network.partition(":")
    make: Callable[..., nn.Module]
    if library == "timm":
        import timm

        make, options = partial(timm.create_model, name), {"drop_rate": DROP, "drop_path_rate": DROP}
    else:
        from torchvision import models

        fixed: dict[str, Any] = {"weights_backbone": None, "init_weights": False}
        known = {*inspect.signature(models.get_model_builder(name)).parameters}
        known |= {"init_weights"} if name in ("googlenet", "inception_v3") else set()
        fixed = {key: value for key, value in fixed.items() if key in known}
        make, options = partial(models.get_model, name, **fixed), {"dropout": DROP}
    for names in (list(options), list(options)[:1], []):
        chosen = {key: options[key] for key in names}
        try:
            model = make(**chosen)
            return model.get_submodule(part), chosen
        except TypeError:  # the network has no such option
            continue
    raise AssertionError("a network without options cannot fail here")


def _train_without_norms(module: nn.Module) -> None:
    module.train()
    for child in module.modules():
        if isinstance(child, _NORMS):
            child.eval()


def _differ(one: Any, other: Any) -> bool:
    """Of the outputs that both have: some networks return more in train mode."""
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=False))
    return relative_error([a for a, _ in pairs], [b for _, b in pairs]) > DIFFERENT
