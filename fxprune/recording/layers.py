"""A layer that was traced through for nothing is that layer again.

A subclass with a ``forward`` of its own is traced through, since only a run tells what it computes. Where that turns
out to be ``F.linear(x, layer.weight, layer.bias)``, the node calls ``nn.Linear``, which computes that: quantisers and
adapters (torchao, PEFT) look for layers, and would pass over a function of two parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import fx, nn


def restore_linears(root: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Make such layers of ``root`` linear layers, and their nodes calls of these.

    Args:
        root: the tree of the recording, see ``clone_tree``: there they are shells.
        graph: its nodes; changed.
        modules: of the model, by the names that they have in ``root`` too.
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not F.linear:
            continue
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        name = _parameter(given["weight"]).removesuffix(".weight")
        model, bias = modules.get(name), _parameter(given.get("bias"))
        if (
            not name
            or model is None
            or not _is_subclass(model)
            or bias != ("" if model.bias is None else f"{name}.bias")
        ):
            continue
        layer = root.get_submodule(name)
        layer.__class__ = nn.Linear
        layer.__dict__.update(in_features=model.in_features, out_features=model.out_features)
        parameters = [value for key, value in given.items() if key != "input" and value is not None]
        node.op, node.target, node.args, node.kwargs = "call_module", name, (given["input"],), {}
        for parameter in parameters:
            if not parameter.users:
                graph.erase_node(parameter)


def _parameter(given: object) -> str:
    """The name of a parameter that a node takes, "" if it is computed or none."""
    return str(given.target) if isinstance(given, fx.Node) and given.op == "get_attr" else ""


def _is_subclass(module: nn.Module) -> bool:
    """Another package's linear layer that holds a weight and a bias, and nothing else."""
    if not isinstance(module, nn.Linear) or type(module).__module__.startswith("torch.nn."):
        return False
    return {*module._parameters} == {"weight", "bias"} and not module._buffers and not module._modules
