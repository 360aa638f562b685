"""Torch-Pruning on the networks of the comparisons: its pruners, brought to a budget of MACs.

It is driven as its documentation and its example for timm's vision transformers do: ``global_pruning``, the classifier
ignored, every attention's ``num_heads`` given and the width of its heads pruned, the modules' own numbers repaired by
hand afterwards; gradients for its Taylor criterion are summed over batches. It knows ratios of channels only, so the
smallest ratio is sought whose network has at most so many MACs, counted by ``fxprune.analyze`` like everybody's. Or, as
in its benchmark on CIFAR, it goes in many small steps towards no channels at all, and stops where the MACs are reached.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune

SMALL_STEPS = 400  # of its benchmark on CIFAR
STEPS = 10  # ratios that are tried from small to large; too large a one makes it skip layers, and MACs rise again
HALVINGS = 6  # of the interval before the first that is good: it ends 0.2 % of the channels wide
Importance = Literal["group_norm", "taylor"]


def is_here() -> bool:
    """Whether Torch-Pruning is installed."""
    return importlib.util.find_spec("torch_pruning") is not None


def torch_pruning(
    model: nn.Module,
    example: Tensor,
    macs: int,
    importance: Importance,
    batches: Iterable[Any] = (),
    isomorphic: bool = False,
    ignored: Sequence[str] = (),
    round_to: int = 1,
) -> nn.Module:
    """The network with at most ``macs`` that keeps the most channels by Torch-Pruning's choice; ``model`` stays.

    Args:
        model: trained.
        example: an input [1, ...].
        macs: most that the result may have.
        importance: the Euclidean norm of a group, or first-order Taylor over ``batches``.
        batches: (inputs, labels), for ``"taylor"``.
        isomorphic: rank only groups of the same structure together.
        ignored: names of layers whose outputs stay, besides the classifier's.
        round_to: kept channels are a multiple of this.

    Raises:
        ValueError: no ratio gives a network of so few MACs that still runs.
    """
    gradients = _gradients(model, batches) if importance == "taylor" else {}

    def attempt(ratio: float) -> nn.Module | None:
        pruned = copy.deepcopy(model)
        for name, parameter in pruned.named_parameters():
            parameter.requires_grad_(True)
            parameter.grad = gradients[name].clone() if gradients else None
        prune_once(pruned, example, ratio, importance, isomorphic, ignored, round_to)
        pruned.zero_grad(set_to_none=True)
        return pruned if fxprune.analyze(pruned, example).macs() <= macs else None

    coarse = ((step / STEPS, found) for step in range(1, STEPS) if (found := attempt(step / STEPS)) is not None)
    high, best = next(coarse, (1.0, None))
    if best is None:
        raise ValueError(f"Torch-Pruning gives no network of {macs} MACs at any ratio of channels.")
    low = high - 1 / STEPS
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        if (found := attempt(ratio)) is None:
            low = ratio
        else:
            high, best = ratio, found
    return best


def torch_pruning_in_steps(model: nn.Module, example: Tensor, macs: int, ignored: Sequence[str] = ()) -> nn.Module:
    """The first network with at most ``macs`` of ``SMALL_STEPS``, each by the group norms of what the one before left.

    Raises:
        ValueError: none of them has so few.
    """
    pruned = copy.deepcopy(model).requires_grad_(True).eval()
    pruner = _pruner(pruned, example, 1.0, "group_norm", ignored, iterative_steps=SMALL_STEPS)
    for _ in range(SMALL_STEPS):
        pruner.step()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            pruned(example)
        if counter.get_total_flops() // 2 <= macs:
            return pruned
    raise ValueError(f"Torch-Pruning gives no network of {macs} MACs in {SMALL_STEPS} steps.")


def prune_once(
    model: nn.Module,
    example: Tensor,
    ratio: float,
    importance: Importance = "group_norm",
    isomorphic: bool = False,
    ignored: Sequence[str] = (),
    round_to: int = 1,
) -> nn.Module:
    """``model`` itself without this share of its channels: its graph is built, and it is pruned once."""
    _pruner(model, example, ratio, importance, ignored, isomorphic=isomorphic, round_to=round_to).step()
    for attention in _attentions(model):
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
    return model


def _attentions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]


def _pruner(
    model: nn.Module, example: Tensor, ratio: float, importance: Importance, ignored: Sequence[str], **options: Any
) -> Any:
    """Of all channels together, of a network that its graph is built of here."""
    import torch_pruning as tp

    classifiers = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    whole = [*classifiers, *(model.get_submodule(name) for name in ignored)]
    kinds = {"group_norm": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parameters that it finds by itself
        return tp.pruner.BasePruner(
            model, example, importance=kinds[importance](), global_pruning=True, pruning_ratio=ratio,
            ignored_layers=whole, num_heads={m.qkv: m.num_heads for m in _attentions(model)}, prune_head_dims=True,
            in_channel_groups={}, out_channel_groups={}, **options,  # its defaults are shared between pruners
        )  # fmt: skip


def _gradients(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Of the loss, summed over batches, with batch statistics from training as they are."""
    seen = copy.deepcopy(model).eval().requires_grad_(True)
    for images, labels in batches:
        F.cross_entropy(seen(images), labels).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in seen.named_parameters()}
