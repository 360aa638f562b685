"""Where the recordings on two inputs part."""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor, fx, nn

import fxprune
from model_zoo.networks.subject import Inputs
from model_zoo.records import raised


def parting(model: nn.Module, one: Inputs, other: Inputs) -> str:
    """The source of the first node at which recordings on the two inputs differ, and the two nodes."""
    try:
        first, second = (fxprune.record(copy.deepcopy(model), args, kwargs) for args, kwargs in (one, other))
    except Exception as error:
        return f"not recorded: {raised(error)}"
    steps = [[node for node in graph.graph.nodes if _name(node) not in _ARITHMETIC] for graph in (first, second)]
    for mine, its in zip(*steps, strict=False):
        texts = _text(mine), _text(its)
        if texts[0] != texts[1]:
            return f"{its.meta.get('source', '')}: {texts[0]} | {texts[1]}"
        if mine.op == "get_attr" and _differ(first, second, str(mine.target)):
            user = next(iter(mine.users), mine)
            return f"{user.meta.get('source', '')}: the value of {mine.target}, read by {_text(user)}"
    more = len(steps[1]) - len(steps[0])
    return f"{more} nodes more" if more else "no node: a value outside the graph"


_ARITHMETIC = {"placeholder", "size", "getattr", *vars(operator)} - {"matmul", "getitem"}  # sizes, and made of them


def _name(node: fx.Node) -> str:
    return "placeholder" if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))


def _text(node: fx.Node) -> str:
    """What the node does, and which numbers it was given; other nodes are left out, so their names do not matter."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: "…")
    return f"{_name(node)}{args}{kwargs or ''}".replace("'…'", "…")[:200]


def _differ(one: fx.GraphModule, other: fx.GraphModule, name: str) -> bool:
    a, b = (operator.attrgetter(name)(module) for module in (one, other))
    return isinstance(a, Tensor) and isinstance(b, Tensor) and not (a.shape == b.shape and torch.equal(a, b))
